"""Is a response right: its final answer against the reference, and phrases that betray a hint."""
