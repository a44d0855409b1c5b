"""Is a response right: its final answer against the reference, and phrases that betray a hint.

May import only errors and processes. Begin with verifier.py, whose tests come in the order of the files.
"""
