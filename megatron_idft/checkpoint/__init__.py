"""Models between Hugging Face safetensors folders and Megatron checkpoints, and which checkpoint can be trusted.

May import torch and Megatron's own reader of old common states. Begin with convert.py, then families.py: a table each.
"""
