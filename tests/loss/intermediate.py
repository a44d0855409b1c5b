"""Logits as a model's output layer makes them: an intermediate result in memory of its own, any strides."""

from typing import Any

import torch
from torch import Tensor


class _OutputLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        # With the same offset too: how memory is aligned decides how many elements a kernel loads at once, and so the
        # order of its sums.
        span = sum((size - 1) * stride for size, stride in zip(logits.shape, logits.stride(), strict=True))
        storage = logits.new_empty(logits.storage_offset() + max(span, 0) + 1).untyped_storage()
        return logits.new_empty(0).set_(storage, logits.storage_offset(), logits.shape, logits.stride()).copy_(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def as_intermediate(logits: Tensor) -> Tensor:
    """A copy with the same strides, neither leaf nor view, whose gradient reaches `logits`."""
    return _OutputLayer.apply(logits)


def bits(value: Tensor) -> Tensor:
    """The bits of any tensor as integers: -0.0 is not 0.0, and a NaN equals itself."""
    return value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])
