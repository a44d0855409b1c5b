"""Megatron on this machine: where it comes from, its repairs, CPU mode, libraries, signals, ranks, Hugging Face models.

May import inference and what knows no Megatron. Begin with start.py: what every program does first.
"""
