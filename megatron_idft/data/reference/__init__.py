"""What a reference model said of each trained token, read from scores of any origin, as columns beside packs.

May import data/chat and corpus. Begin with columns.py.
"""
