"""The report on scored corpora: a page for a person, and the same numbers as JSON.

May import corpus/scores and corpus/lint. Begin with builder.py; the page is templates/corpus_report.html.
"""
