"""Records in and out, the ledger that launches share, verdicts, scores and their report.

May import nothing of Megatron and no torch. Begin with records.py; each folder is a step that a corpus may take.
"""
