"""The program `train`: data, batches, evaluation, checkpoints, and how a training ends.

May import loss, platform and statistics. Begin with program.py.
"""
