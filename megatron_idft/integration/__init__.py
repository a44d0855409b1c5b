"""Everything that knows Megatron's trainer, in rooms: loss, training, offline, plan, platform. script.py is `run`.

May import every other room but cli. Begin with loss/hook.py: the one place of a model that is touched.
"""
