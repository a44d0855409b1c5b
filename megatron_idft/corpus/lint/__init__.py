"""The linter of scored corpora: verdicts in plain language, each with its threshold and source.

May import corpus/scores. Begin with linter.py; thresholds.py says where each number comes from.
"""
