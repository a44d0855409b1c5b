"""What a realignment reads: the records by index, and what other engines wrote for them.

May import corpus. Begin with record_store.py.
"""
