"""Hinted Decoding (arXiv 2602.12222): a corpus rewritten into the model's own distribution, and still right.

May import corpus, data and inference's requests; nothing of Megatron. Begin with mixing.py, then stages/pipeline.py.
"""
