"""The output of a realignment: an outcome for every record, and the corpus that is merged from them.

May import corpus. Begin with outcomes.py.
"""
