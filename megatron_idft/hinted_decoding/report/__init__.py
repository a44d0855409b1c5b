"""The report on a realigned corpus: a page for a person, and the same numbers as JSON.

May import corpus and hinted_decoding/output. Begin with page.py, then summary.py and numbers.py.
"""
