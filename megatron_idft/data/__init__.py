"""Conversations to tokens and loss masks (chat/), to packs of whole documents (packed/), to datasets.

May import corpus, and torch for datasets; nothing of Megatron. Begin with chat/conversations.py.
"""
