"""What a training needs, from its flags, before a GPU is touched: pure arithmetic, without torch and Megatron.

May import errors only. Begin with plan.py; shape.py holds the inputs.
"""
