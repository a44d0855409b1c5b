"""Conversations tokenized by many processes into packs of whole documents, in Megatron's memory-mapped form."""

from megatron_idft.data.packed.packing import Packs, best_fit_decreasing
from megatron_idft.data.packed.prepare import Prepared, prepare
from megatron_idft.data.packed.settings import PrepareSettings
from megatron_idft.data.packed.store import Pack, PackedStore
from megatron_idft.data.packed.workers import PrepareError

__all__ = [
    "Pack",
    "PackedStore",
    "Packs",
    "PrepareError",
    "PrepareSettings",
    "Prepared",
    "best_fit_decreasing",
    "prepare",
]
