"""Hinted Decoding (arXiv 2602.12222): a corpus rewritten into the model's own distribution, and still right."""
