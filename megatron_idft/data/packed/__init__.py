"""Conversations tokenized by many processes into packs of whole documents, in Megatron's memory-mapped form."""
