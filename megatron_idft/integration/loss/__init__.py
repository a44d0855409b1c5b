"""The loss in Megatron's trainer: the hook, its flags, its metrics, and where the trainer is wrapped.

May import platform; of the other rooms loss, objectives, statistics, inference. Begin with hook.py, then trainer.py.
"""
