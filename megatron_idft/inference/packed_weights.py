"""Copies of linear layers' weights in oneDNN's own layout, for decode steps of a few rows on the CPU.

torch's matrix product there (MKL's) re-orders the weights in each call. With thousands of rows that is nothing; with
eight it takes longer than the product, which then runs at a quarter of the speed at which the weights could be read.
A copy that was re-ordered once saves it. `tools/benchmarks/decoding.py` measures both. Small weights stay in a cache,
and a call of oneDNN takes 20 microseconds more than one of MKL.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_idft.inference.served import ServedModel

# Fewer are read from the weights as they are, as fast; of more the product itself takes the time.
_FEWEST_ROWS, _MOST_ROWS = 3, 64
_FEWEST_WEIGHTS = 1 << 18  # of a layer
_SHARE_OF_HOST = 0.25  # of what is available: copies that would take more are not made


class PackedWeights:
    """On a GPU, and for weights that are not fp32, there are none.

    Attributes:
        bytes: of the copies that are made when the first step has a use for them; 0 if none are.
    """

    def __init__(self, model: ServedModel) -> None:
        self._direct = model.direct
        self._layers = _layers(model) if model.device.type == "cpu" and torch.backends.mkldnn.is_available() else {}
        weights = {weight.data_ptr(): weight.nbytes for weight in self._layers.values()}
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if sum(weights.values()) > psutil.virtual_memory().available * _SHARE_OF_HOST / processes:
            self._layers = {}
        self.bytes = sum(weights.values()) if self._layers else 0
        self._packed: dict[Any, Tensor] = {}
        self._made_of: list[tuple[int, int]] = []

    @contextmanager
    def used(self, rows: int) -> Iterator[None]:
        """While it lasts, the layers multiply with the copies where these are faster for so many rows."""
        if not self._layers or not _FEWEST_ROWS <= rows <= _MOST_ROWS:
            yield
            return
        self._update()
        for layer, packed in self._packed.items():
            layer.__dict__["_forward_impl"] = _product(packed)
        if self._direct is not None:
            self._direct.packed = self._packed
        try:
            yield
        finally:
            for layer in self._packed:
                del layer.__dict__["_forward_impl"]
            if self._direct is not None:
                self._direct.packed = {}

    def close(self) -> None:
        self._packed, self._made_of = {}, []

    def _update(self) -> None:
        """Make the copies, anew where a weight has changed since."""
        versions = [(weight.data_ptr(), weight._version) for weight in self._layers.values()]
        if versions != self._made_of:
            reorder = torch.ops.mkldnn._reorder_linear_weight
            self._packed = {layer: reorder(weight.detach(), _MOST_ROWS) for layer, weight in self._layers.items()}
            self._made_of = versions


def _layers(model: ServedModel) -> dict[Any, Tensor]:
    """Linear layer -> its weight, of the large ones whose `_forward_impl` is Megatron's own."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    language_model = model.language_model
    found: dict[Any, Tensor] = {
        module: module.weight
        for module in language_model.modules()
        if type(module) in (ColumnParallelLinear, RowParallelLinear) and module.weight is not None
    }
    if language_model.share_embeddings_and_output_weights:
        found[language_model.output_layer] = language_model.shared_embedding_or_output_weight()
    return {
        layer: weight
        for layer, weight in found.items()
        if weight.dtype == torch.float32 and weight.numel() >= _FEWEST_WEIGHTS and "_forward_impl" not in layer.__dict__
    }


def _product(packed: Tensor) -> Any:
    """Stands in the place of `_forward_impl` of megatron/core/tensor_parallel/layers.py, without a gradient."""

    def product(input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        multiplied: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
        return multiplied

    return product
