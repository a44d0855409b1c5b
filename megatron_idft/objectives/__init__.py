"""Objectives: per-token statistics -> a detached weight w of the token's loss -w log_prob.

May import statistics and torch. Begin with objective.py, then online.py and with_reference.py.
"""

from megatron_idft.objectives.objective import KernelFormula, Objective, TokenFunction
from megatron_idft.objectives.online import DEFT_EPSILON, ce, chord, cll, deft, dft, entropy, idft, power
from megatron_idft.objectives.registry import objective_names, register, resolve_objective
from megatron_idft.objectives.schedule import LambdaSchedule
from megatron_idft.objectives.with_reference import (
    asft,
    asft_topk,
    distill,
    gift,
    iw,
    minor_sft,
    prift,
    psft,
    sft_k3,
    sft_topk,
)

__all__ = [
    "DEFT_EPSILON",
    "KernelFormula",
    "LambdaSchedule",
    "Objective",
    "TokenFunction",
    "asft",
    "asft_topk",
    "ce",
    "chord",
    "cll",
    "deft",
    "dft",
    "distill",
    "entropy",
    "gift",
    "idft",
    "iw",
    "minor_sft",
    "objective_names",
    "power",
    "prift",
    "psft",
    "register",
    "resolve_objective",
    "sft_k3",
    "sft_topk",
]
