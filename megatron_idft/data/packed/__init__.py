"""Conversations tokenized by many processes into packs of whole documents, in Megatron's memory-mapped form.

May import data/chat and corpus. Begin with prepare.py; dataset.py and blend.py read what it wrote.
"""
