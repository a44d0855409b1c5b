"""The report on scored corpora: a page for a person, and the same numbers as JSON.

May import corpus/scores and corpus/lint. Begin with builder.py, then page.py.
"""
