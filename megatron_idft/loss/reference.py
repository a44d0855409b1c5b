"""Reference backend: plain torch on any device, in blocks of rows, never with a full fp32 copy of the logits."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_idft.loss.shard import VocabShard
from megatron_idft.objectives import Objective
from megatron_idft.statistics import (
    LOWEST,
    MAX,
    SUM_EXP,
    SUM_EXP_SHIFTED,
    TARGET_LOGIT,
    TokenStatistics,
    merge_shard_states,
    neutral_shard_state,
)

Index = tuple[int | slice, ...]


def token_loss(
    logits: Tensor, labels: Tensor, objective: Objective, shard: VocabShard, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, weight, log_prob and entropy, each [...] fp32; only the loss carries gradient.

    Args:
        logits: [..., V/tp] bf16, fp16 or fp32, any strides.
        labels: [...] int64, below vocab_size; negative = ignored.

    Memory beyond the logits: two fp32 blocks of some rows and a few numbers per token; in backward, the gradient.
    Collectives: one all-gather in forward (`VocabShard.gather_states`), none in backward.
    """
    return _TokenLoss.apply(logits, labels, objective, shard, vocab_size)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, objective: Objective, shard: VocabShard, vocab_size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        columns = logits[..., : shard.valid_columns]
        flat_labels = labels.reshape(-1)
        merged = merge_shard_states(shard.gather_states(_shard_state(columns, flat_labels - shard.start)))

        trained = flat_labels >= 0
        log_prob = torch.where(trained, merged.log_prob, 0.0).view(labels.shape)
        entropy = torch.where(trained, merged.entropy, 0.0).view(labels.shape)
        weight = objective.weight(TokenStatistics(log_prob, entropy, labels, vocab_size))
        loss = 0.0 - weight * log_prob  # a plain negation would print ignored positions as -0.0

        ctx.shard = shard
        ctx.save_for_backward(logits, flat_labels, weight, merged.max, merged.sum_exp)
        ctx.mark_non_differentiable(weight, log_prob, entropy)
        return loss, weight, log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, flat_labels, weight, maximum, sum_exp = ctx.saved_tensors
        scale = torch.where(flat_labels >= 0, (weight * grad_loss).reshape(-1), 0.0)
        grad = torch.empty_like(logits)
        grad[..., ctx.shard.valid_columns :].zero_()
        _write_gradient(
            logits[..., : ctx.shard.valid_columns],
            grad[..., : ctx.shard.valid_columns],
            flat_labels,
            flat_labels - ctx.shard.start,
            scale,
            maximum,
            sum_exp,
        )
        return grad, None, None, None, None


def _shard_state(columns: Tensor, target: Tensor) -> Tensor:
    """[T, 4] fp32 state of this shard; `target` [T] is the label's column, out of range where it is not here."""
    num_columns = columns.shape[-1]
    state = neutral_shard_state(target.numel(), columns.device)
    if num_columns == 0:
        return state
    is_local, target = _locate(target, num_columns)
    for index, rows in _row_blocks(columns):
        shifted = _load_fp32(columns[index])
        state[rows, TARGET_LOGIT] = torch.where(is_local[rows], shifted.gather(1, target[rows])[:, 0], LOWEST)
        row_max = shifted.amax(1, keepdim=True).clamp_(min=LOWEST)
        # exp(-inf) * -inf would be NaN; LOWEST instead of -inf makes that product 0.
        shifted.sub_(row_max).clamp_(min=LOWEST)
        exp = shifted.exp()
        state[rows, MAX] = row_max[:, 0]
        state[rows, SUM_EXP] = exp.sum(1)
        state[rows, SUM_EXP_SHIFTED] = exp.mul_(shifted).sum(1)
    # A target logit of -inf would otherwise make log_prob -inf and then weight * log_prob = 0 * inf.
    state[:, TARGET_LOGIT].clamp_(min=LOWEST)
    return state


def _write_gradient(
    columns: Tensor,
    grad: Tensor,
    labels: Tensor,
    target: Tensor,
    scale: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
) -> None:
    """grad = scale (softmax - onehot) in fp32, rounded once by the store; exactly 0 where the label is ignored."""
    num_columns = columns.shape[-1]
    if num_columns == 0:
        return
    is_local, target = _locate(target, num_columns)
    at_target = torch.where(is_local, -scale, 0.0).unsqueeze(1)
    ignored = (labels < 0).unsqueeze(1)
    maximum, softmax_scale = maximum.unsqueeze(1), (scale / sum_exp).unsqueeze(1)
    for index, rows in _row_blocks(columns):
        block = _load_fp32(columns[index]).sub_(maximum[rows]).exp_().mul_(softmax_scale[rows])
        block.scatter_add_(1, target[rows], at_target[rows]).masked_fill_(ignored[rows], 0.0)
        grad[index].copy_(block.view(grad[index].shape))


def _locate(target: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Whether each target column lies in this shard [T], and a column [T, 1] that is safe to index either way."""
    return (target >= 0) & (target < num_columns), target.clamp(0, num_columns - 1).unsqueeze(1)


def _load_fp32(block: Tensor) -> Tensor:
    """A fresh contiguous fp32 [rows, columns] copy of a block with any strides."""
    fp32 = torch.empty(block.shape, dtype=torch.float32, device=block.device)
    return fp32.copy_(block).view(-1, block.shape[-1])


def _row_blocks(columns: Tensor) -> Iterator[tuple[Index, slice]]:
    """Cut [..., V] into boxes of rows: the box's index into the leading dimensions, and its rows in the flat order."""
    # CPU: two fp32 blocks of one core's share fit its L2 cache. GPU: 64 MiB per pass keep the launches negligible.
    block_bytes = 2**19 * torch.get_num_threads() if columns.device.type == "cpu" else 2**26
    max_rows = max(1, block_bytes // (4 * columns.shape[-1]))
    start = 0
    for index in _boxes(columns.shape[:-1], max_rows):
        stop = start + math.prod(columns[index].shape[:-1])
        yield index, slice(start, stop)
        start = stop


def _boxes(shape: torch.Size, max_rows: int) -> Iterator[Index]:
    """Indices of boxes of at most `max_rows` rows that tile `shape` in row-major order."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    if inner > max_rows:
        for i in range(shape[0]):
            for rest in _boxes(shape[1:], max_rows):
                yield (i, *rest)
    elif inner > 0:
        step = max_rows // inner
        for i in range(0, shape[0], step):
            yield (slice(i, i + step),)
