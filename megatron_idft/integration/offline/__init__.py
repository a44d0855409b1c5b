"""The programs `score` and `realign`: a Megatron model over a corpus, shared by launches that come and go.

May import loss, training and platform. Begin with program.py: what both have in common.
"""
