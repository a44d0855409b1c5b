"""The input of a realignment: the records by index, and the texts that other engines wrote for them.

May import corpus. Begin with record_store.py.
"""
