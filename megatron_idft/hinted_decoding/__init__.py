"""Hinted Decoding (arXiv 2602.12222): a corpus rewritten into the model's own distribution, and still right.

May import corpus, data and inference's requests. Begin with mixing.py, the share of the hint; then stages/pipeline.py.
"""
