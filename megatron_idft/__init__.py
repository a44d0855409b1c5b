"""On-policy supervised fine-tuning for Megatron-LM.

Importing this package changes nothing anywhere: no module is patched, no device is touched, and torch is imported only
when a name that needs it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from megatron_idft.integration.loss.hook import install, uninstall
    from megatron_idft.loss import LossOutput, vocab_parallel_loss
    from megatron_idft.loss.linear import UpstreamWatch, vocab_parallel_linear_loss
    from megatron_idft.objectives import (
        Objective,
        asft,
        asft_topk,
        ce,
        chord,
        cll,
        deft,
        dft,
        distill,
        entropy,
        gift,
        idft,
        iw,
        minor_sft,
        power,
        prift,
        psft,
        resolve_objective,
        sft_k3,
        sft_topk,
    )
    from megatron_idft.statistics import Reference, TokenStatistics, centered_log_likelihood

_HOME = {
    "LossOutput": "megatron_idft.loss",
    "Objective": "megatron_idft.objectives",
    "Reference": "megatron_idft.statistics",
    "TokenStatistics": "megatron_idft.statistics",
    "UpstreamWatch": "megatron_idft.loss.linear",
    "asft": "megatron_idft.objectives",
    "asft_topk": "megatron_idft.objectives",
    "ce": "megatron_idft.objectives",
    "centered_log_likelihood": "megatron_idft.statistics",
    "chord": "megatron_idft.objectives",
    "cll": "megatron_idft.objectives",
    "deft": "megatron_idft.objectives",
    "dft": "megatron_idft.objectives",
    "distill": "megatron_idft.objectives",
    "entropy": "megatron_idft.objectives",
    "gift": "megatron_idft.objectives",
    "idft": "megatron_idft.objectives",
    "install": "megatron_idft.integration.loss.hook",
    "iw": "megatron_idft.objectives",
    "minor_sft": "megatron_idft.objectives",
    "power": "megatron_idft.objectives",
    "prift": "megatron_idft.objectives",
    "psft": "megatron_idft.objectives",
    "resolve_objective": "megatron_idft.objectives",
    "sft_k3": "megatron_idft.objectives",
    "sft_topk": "megatron_idft.objectives",
    "uninstall": "megatron_idft.integration.loss.hook",
    "vocab_parallel_linear_loss": "megatron_idft.loss.linear",
    "vocab_parallel_loss": "megatron_idft.loss",
}

__all__ = [
    "LossOutput",
    "Objective",
    "Reference",
    "TokenStatistics",
    "UpstreamWatch",
    "__version__",
    "asft",
    "asft_topk",
    "ce",
    "centered_log_likelihood",
    "chord",
    "cll",
    "deft",
    "dft",
    "distill",
    "entropy",
    "gift",
    "idft",
    "install",
    "iw",
    "minor_sft",
    "power",
    "prift",
    "psft",
    "resolve_objective",
    "sft_k3",
    "sft_topk",
    "uninstall",
    "vocab_parallel_linear_loss",
    "vocab_parallel_loss",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'megatron_idft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
