"""The last stage's end: final norm, output layer, loss."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_idft.planning.activations import Sizes, norm, stream
from megatron_idft.planning.shape import Training

_FP32 = 4
_PER_TOKEN = 64  # labels, masks, per-token statistics: some fp32 and int64 numbers
_CPU_ROWS = 4096  # of the weight, which a CPU multiplies in fp32 (loss/linear/products.py)


@dataclass(frozen=True)
class Head:
    """Bytes of one micro-batch on the last stage.

    Attributes:
        kept: final norm and its input.
        logits: logits, their copies and the loss at the worst moment; all of the fused head's forward pass.
        after: in the output layer's backward pass, when the loss has written the gradient of the logits.
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
    into their type before the output layer's backward pass (tensor_parallel/layers.py). The fused head makes none: see
    `_fused`.
    """
    if training.implementation.head == "fused":
        return _fused(training)
    model, layout, implementation = training.model, training.layout, training.implementation
    size = Sizes.of(training)
    columns, hidden, e = model.vocab // layout.tensor, model.hidden, size.e
    wide = training.precision.logits or e
    logits = size.t * columns * wide
    per_token = size.t * _PER_TOKEN
    if implementation.loss == "megatron":
        at_worst = logits + (size.t * columns * _FP32 if wide < _FP32 else 0)
    else:
        at_worst = logits + _loss_blocks(training, size.t)
    narrowed = size.t * columns * e if wide > e else 0
    weight = 0 if implementation.fused_weight_gradient else columns * hidden * e
    return Head(
        kept=stream(training) + norm(training, size.t_sp, hidden, e),
        logits=at_worst + per_token,
        after=logits + narrowed + size.t * hidden * e + weight + per_token,
        tied=weight if model.tied and layout.pipeline == 1 else 0,
    )


def _loss_blocks(training: Training, tokens: int) -> int:
    """Of the reference loss over so many tokens: two fp32 blocks of some."""
    if training.implementation.loss != "reference":
        return 0
    columns = training.model.vocab // training.layout.tensor
    columns = min(columns, training.model.true_vocab or columns)  # of the first rank; padding is not read
    rows = min(tokens, max(1, training.implementation.loss_block_bytes // (_FP32 * columns)))
    return 2 * rows * columns * _FP32


def _fused(training: Training) -> Head:
    """The head that multiplies and loses in one (loss/linear), where every token is trained: fewer need less.

    Its forward pass makes the gradients too: of the hidden states, with a second copy when untrained tokens get their
    zeros, and of the weight, in fp32 sums unless the buffer of gradients is in fp32 and gets them at once, for autograd
    then also in the weight's type. Of the logits there are fp32 blocks, two where one waits for the other
    ranks, and the gradient of a chunk.
    """
    layout, implementation = training.layout, training.implementation
    size = Sizes.of(training)
    columns, hidden, e = training.model.vocab // layout.tensor, training.model.hidden, size.e
    chunk, block = fused_tokens(size.t, columns, implementation.cpu, implementation.chunk_tokens)
    split = layout.tensor > 1
    blocks = 0 if e == _FP32 and not split else (1 + split) * block * columns * _FP32
    states, weight = size.t * hidden * e, columns * hidden
    summed, handed_over = (0, 0) if training.precision.gradient == _FP32 else (weight * _FP32, weight * e)
    scratch = _loss_blocks(training, block)
    if implementation.cpu and e < _FP32:
        product = (block + min(columns, 2 * _CPU_ROWS)) * hidden
        scratch = max(scratch, product * _FP32, (hidden + min(columns, _CPU_ROWS)) * chunk * _FP32)
    gathered = states if layout.sequence_parallel else 0
    per_token = size.t * _PER_TOKEN
    return Head(
        kept=stream(training) + norm(training, size.t_sp, hidden, e),
        logits=gathered + states + summed + max(chunk * columns * e + blocks + scratch, states) + per_token,
        after=size.t_sp * hidden * e + summed + handed_over + per_token,
        tied=weight * e if training.model.tied and layout.pipeline == 1 else 0,
    )


def fused_tokens(tokens: int, columns: int, cpu: bool, chunk_tokens: int = 0) -> tuple[int, int]:
    """The tokens of a chunk and of a block of the fused head, as loss/linear/tokens.py cuts them; tests compare.

    Args:
        tokens: of a micro-batch.
        columns: of the weight on a rank.
        cpu: whether it computes on one.
        chunk_tokens: that the user asks for; 0: none.
    """
    parts, least, most = (16, 128, 1024) if cpu else (8, 1024, 4096)
    chunk = chunk_tokens or min(max(-(-tokens // parts), least), most)
    if tokens > chunk:
        each = -(-tokens // -(-tokens // chunk))
        chunk = min(-(-each // 128) * 128, chunk)
    chunk = min(chunk, tokens)
    most = max(2**28 // (_FP32 * columns) // 128 * 128, 256)
    return chunk, min(chunk, most, -(-chunk // 256) * 64)
