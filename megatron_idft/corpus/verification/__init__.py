"""Is a response right: its final answer against the reference, and phrases that betray a hint.

May import nothing else of this package but errors. Begin with verifier.py, whose tests come in the order of the files.
"""
