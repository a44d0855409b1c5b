"""`plan`: training flags to plain numbers, by Megatron's own parser and checks.

May import loss, training and platform. Begin with request.py.
"""
