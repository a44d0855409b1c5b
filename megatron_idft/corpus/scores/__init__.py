"""A scored corpus: rows of statistics, their folder, one pass over them, and selection of records by them.

May import records and the ledger. Begin with rows.py: what is known of a record; then folder.py.
"""
