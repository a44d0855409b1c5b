"""Reference backend: plain torch on any device, in blocks of rows, never with a full fp32 copy of the logits."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from megatron_idft.loss.autograd import TokenResults, weigh_tokens
from megatron_idft.loss.shard import VocabShard
from megatron_idft.objectives import Objective
from megatron_idft.statistics import (
    LOWEST,
    MAX,
    STATE_SIZE,
    SUM_EXP,
    SUM_EXP_SHIFTED,
    TARGET_LOGIT,
    Reference,
    extra_state_columns,
    merge_shard_states,
    neutral_shard_state,
)


def shard_state(
    logits: Tensor, labels: Tensor, shard: VocabShard, vocab_size: int, extra_statistics: frozenset[str]
) -> Tensor:
    """See `autograd.Backend`. Memory beyond the logits: two fp32 blocks of a few rows and some numbers per token."""
    target = torch.where(labels >= vocab_size, -1, labels) - shard.start
    columns = extra_state_columns(extra_statistics)
    return _shard_state(logits[..., : shard.valid_columns], target, columns, shard.start)


def token_results(
    states: Tensor,
    labels: Tensor,
    objective: Objective,
    vocab_size: int,
    cross_entropy_values: bool,
    reference: Reference | None = None,
) -> TokenResults:
    """See `autograd.Backend`."""
    merged = merge_shard_states(states, extra_state_columns(objective.extra_statistics))
    return weigh_tokens(merged, labels, objective, vocab_size, cross_entropy_values, reference)


def write_gradient(
    logits: Tensor,
    gradient: Tensor,
    labels: Tensor,
    upstream: Tensor,
    results: TokenResults,
    shard: VocabShard,
    vocab_size: int,
) -> None:
    """See `autograd.Backend`. Memory: one fp32 block of a few rows."""
    labels = torch.where(labels >= vocab_size, -1, labels)
    valid = slice(0, shard.valid_columns)
    scale, value = results.weight * upstream, results.weight * upstream * results.log_prob.expm1()
    if results.row_coefficient is not None:
        value = value + (results.row_coefficient - results.weight) * upstream * results.log_prob.exp()
        scale = results.row_coefficient * upstream
    gradient[..., valid.stop :].zero_()
    _write_softmax(logits[..., valid], gradient[..., valid], scale / results.sum_exp, results.max, labels)
    _write_target(gradient[..., valid], value, labels - shard.start)


def store_columns(gradient: Tensor, columns: Tensor, values: Tensor) -> None:
    """See `autograd.Backend`. One column after the other: a masked one must not race with another for its place."""
    for index in range(columns.shape[-1]):
        _write_target(gradient, values[..., index], columns[..., index])


def _shard_state(columns: Tensor, target: Tensor, extra_columns: Mapping[str, int], start: int) -> Tensor:
    """[..., S] fp32 state of this shard's valid columns; `target` [...] is out of range where the label is not here."""
    state = neutral_shard_state(target.shape, columns.device, STATE_SIZE + len(extra_columns))
    if columns.shape[-1] == 0:
        return state
    row_max = torch.empty(*target.shape, 1, dtype=torch.float32, device=columns.device)
    scratch, scratch_exp = _scratch(columns), _scratch(columns)
    for index in _row_blocks(columns):
        block = _as_fp32(columns[index], scratch)
        block_max = torch.amax(block, -1, keepdim=True).clamp_(min=LOWEST)
        row_max[index] = block_max
        shifted = torch.sub(block, block_max, out=scratch(block))
        exp = torch.exp(shifted, out=scratch_exp(block))
        state[(*index, ..., SUM_EXP)] = exp.sum(-1)
        if "sum_squared_prob" in extra_columns:
            state[(*index, ..., extra_columns["sum_squared_prob"])] = exp.square().sum(-1)
        if "argmax" in extra_columns:
            state[(*index, ..., extra_columns["argmax"])] = (shifted.argmax(-1) + start).float()
        # exp(-inf) * -inf is NaN and counts as 0 here; a NaN logit shows in SUM_EXP all the same.
        state[(*index, ..., SUM_EXP_SHIFTED)] = exp.mul_(shifted).nansum(-1)
    state[..., MAX] = row_max[..., 0]
    is_here, target = _locate(target, columns.shape[-1])
    # A target logit of -inf would make log_prob -inf and then weight * log_prob = 0 * inf.
    target_logit = columns.gather(-1, target.unsqueeze(-1))[..., 0].float().clamp_(min=LOWEST)
    state[..., TARGET_LOGIT] = torch.where(is_here, target_logit, LOWEST)
    return state


def _write_softmax(columns: Tensor, grad: Tensor, softmax_scale: Tensor, maximum: Tensor, labels: Tensor) -> None:
    """grad = softmax_scale exp(columns - maximum), rounded once by the store; exactly 0 where the label is ignored.

    `grad` may be `columns` itself: a block is read before it is written.
    """
    if columns.shape[-1] == 0:
        return
    # NaN times 0 is NaN, but NaN bits and 0 bits are 0: a select at the speed of a multiplication.
    keep_bits = torch.where(labels >= 0, -1, 0).to(torch.int32).unsqueeze(-1)
    softmax_scale, maximum = softmax_scale.unsqueeze(-1), maximum.unsqueeze(-1)
    scratch = _scratch(columns)
    for index in _row_blocks(columns):
        block = _as_fp32(columns[index], scratch)
        in_place = grad.dtype == torch.float32
        out = grad[index] if in_place else scratch(block)  # not fp32 logits, which the caller may keep
        torch.sub(block, maximum[index], out=out).exp_().mul_(softmax_scale[index])
        out.view(torch.int32).bitwise_and_(keep_bits[index])
        if not in_place:
            grad[index].copy_(out)


def _write_target(grad: Tensor, value: Tensor, target: Tensor) -> None:
    """Overwrite the target column with `value` [...] fp32, rounded once, where the target is in this shard.

    scale * expm1(log_prob) = scale (p_y - 1) keeps its relative precision for p_y near 1.
    """
    if grad.shape[-1] == 0:
        return
    is_here, target = _locate(target, grad.shape[-1])
    # Not scatter_: on CPU it converts the whole of a bf16 or fp16 tensor to fp32 and back.
    ones = [1] * target.dim()
    tokens = [torch.arange(n, device=grad.device).view(-1, *ones[dim + 1 :]) for dim, n in enumerate(target.shape)]
    cells = (*tokens, target)
    grad[cells] = torch.where(is_here, value.to(grad.dtype), grad[cells])


def _locate(target: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Whether each target column lies in this shard [...], and a column [...] that is safe to index either way."""
    return (target >= 0) & (target < num_columns), target.clamp(0, num_columns - 1)


def _as_fp32(block: Tensor, scratch: Callable[[Tensor], Tensor]) -> Tensor:
    return block if block.dtype == torch.float32 else scratch(block).copy_(block)


def _scratch(columns: Tensor) -> Callable[[Tensor], Tensor]:
    """block -> contiguous fp32 memory of its shape, the same for every block of `columns`."""
    rows = min(_max_rows(columns), math.prod(columns.shape[:-1]))
    buffer = torch.empty(rows * columns.shape[-1], dtype=torch.float32, device=columns.device)
    return lambda block: buffer[: block.numel()].view(block.shape)


def _max_rows(columns: Tensor) -> int:
    # CPU: a block stays in the last-level cache between its passes. Smaller ones are as fast on an idle machine only:
    # the threads meet after every pass, which takes long on cores shared with others. GPU: 64 MiB dwarf a launch.
    block_bytes = max(2**23, 2**20 * torch.get_num_threads()) if columns.device.type == "cpu" else 2**26
    return max(1, block_bytes // (4 * columns.shape[-1]))


def _row_blocks(columns: Tensor) -> Iterator[tuple[int | slice, ...]]:
    """Indices into the leading dimensions that cut [..., V] into boxes of at most `_max_rows` rows.

    Boxes instead of a flat view: [b, s, V] seen as a transposed [s, b, V] has no flat view without a copy.
    """
    return _boxes(columns.shape[:-1], _max_rows(columns))


def _boxes(shape: torch.Size, max_rows: int) -> Iterator[tuple[int | slice, ...]]:
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
