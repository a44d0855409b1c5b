"""The program `train`: data, batches, evaluation, checkpoints, and how a training ends.

May import loss and platform. Begin with program.py.
"""
