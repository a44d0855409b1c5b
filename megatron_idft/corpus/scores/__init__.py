"""Scored records: the statistics of each, one pass over those of a corpus, and selection by an expression.

May import corpus' own files, no folder of it. Begin with rows.py, the columns; then corpus' scored_folder.
"""
