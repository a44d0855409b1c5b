"""Is a response right: its final answer against the reference, and phrases that betray a hint.

May import only errors and processes. Begin with verifier.py, which compares texts, then numbers, then formulas.
"""
