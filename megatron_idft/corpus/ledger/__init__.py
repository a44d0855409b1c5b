"""Which chunks of a job are done, shared by independent launches through one folder.

May import nothing else of this package but errors and files. Begin with ledger.py.
"""
