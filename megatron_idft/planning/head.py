"""The last stage's end: final norm, output layer, loss."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_idft.planning.activations import Sizes, norm, stream
from megatron_idft.planning.shape import Training

_FP32 = 4
_PER_TOKEN = 64  # labels, masks, per-token statistics: some fp32 and int64 numbers


@dataclass(frozen=True)
class Head:
    """Bytes of one micro-batch on the last stage.

    Attributes:
        kept: final norm and its input.
        logits: logits, their copies and the loss at the worst moment.
        after: kept for the output layer's backward pass when the loss has written the gradient of the logits.
        tied: the gradient of a tied embedding, which waits for the other one to the end of the backward pass.
    """

    kept: int
    logits: int
    after: int
    tied: int


def head(training: Training) -> Head:
    """Which copies of the logits each loss makes.

    megatron: tensor_parallel/cross_entropy.py turns 16-bit logits into fp32, while the caller still holds them, and
    turns the gradient back; fp32 logits are overwritten. reference (loss/reference.py): the gradient overwrites the
    logits; two fp32 blocks. triton: the same without blocks. A gradient of logits wider than the activations is turned
    into their type before the output layer's backward pass (tensor_parallel/layers.py).
    """
    model, layout, implementation = training.model, training.layout, training.implementation
    size = Sizes.of(training)
    columns, hidden, e = model.vocab // layout.tensor, model.hidden, size.e
    wide = training.precision.logits or e
    logits = size.t * columns * wide
    per_token = size.t * _PER_TOKEN
    if implementation.loss == "megatron":
        at_worst = logits + (size.t * columns * _FP32 if wide < _FP32 else 0)
    elif implementation.loss == "reference":
        tokens = min(columns, model.true_vocab or columns)  # of the first rank; padding is not read
        rows = min(size.t, max(1, implementation.loss_block_bytes // (_FP32 * tokens)))
        at_worst = logits + 2 * rows * tokens * _FP32
    else:
        at_worst = logits
    narrowed = size.t * columns * e if wide > e else 0
    weight = 0 if implementation.fused_weight_gradient else columns * hidden * e
    return Head(
        kept=stream(training) + norm(training, size.t_sp, hidden, e),
        logits=at_worst + per_token,
        after=logits + narrowed + size.t * hidden * e + weight + per_token,
        tied=weight if model.tied and layout.pipeline == 1 else 0,
    )
