"""Conversations tokenized by many processes, cut or left out where too long, into packs in Megatron's mapped form.

May import data/chat and corpus. Begin with prepare.py; records.py keeps a cache, dataset.py and epochs.py read packs.
"""
