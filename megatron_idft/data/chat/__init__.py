"""One conversation to token ids and a loss mask that is proven from the chat template.

May import corpus. Begin with conversations.py; mask_proof.py finds what the assistant said and proves it.
"""
