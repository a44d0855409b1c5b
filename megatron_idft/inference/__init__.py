"""Text from a Megatron model: the batched decode engine, its blocks, and sampling over a sharded vocabulary.

May import loss, statistics, torch and Megatron. Begin with requests.py, then engine.py, which holds the decode step.
"""
