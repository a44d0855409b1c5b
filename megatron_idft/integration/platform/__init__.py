"""Megatron on this machine: where it comes from, its repairs, CPU mode, libraries, signals, ranks, Hugging Face models.

May import checkpoint and no other room of integration. Begin with start.py: what every program does first.
"""
