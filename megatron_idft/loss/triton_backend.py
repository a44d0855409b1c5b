"""Triton backend: each logit is read once in forward, once in backward, and overwritten in place.

HBM bytes per element of bf16 or fp16 logits: 2 in forward, 4 in backward, 2 more for the rows of ignored tokens, which
are only zeroed. No [T, V/tp] tensor is allocated, nothing synchronises with the host, there are no atomics and nothing
is tuned at run time (a tuner would run the in-place kernel several times on the same logits), so that a CUDA graph can
capture every call after the first, which compiles.

Kernels in triton_kernels.py. TRITON_INTERPRET=1 runs them on the CPU, for tests.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megatron_idft.loss import triton_kernels as kernels
from megatron_idft.loss.autograd import TokenResults, weigh_tokens
from megatron_idft.loss.interpreter import patch_language_once_per_launch, read_loop_bounds_by_item
from megatron_idft.loss.shard import VocabShard
from megatron_idft.objectives import KernelFormula, Objective
from megatron_idft.statistics import (
    LOWEST,
    STATE_SIZE,
    MergedState,
    Reference,
    extra_state_columns,
    neutral_shard_state,
)

INTERPRETED = bool(kernels.INTERPRETED)
if INTERPRETED:
    patch_language_once_per_launch()
if INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    read_loop_bounds_by_item()

_LARGEST_EXACT_INDEX = 2**24  # in the fp32 column of the state that holds an argmax
# Of the formulas that are not asked for.
_PARAMETERS: dict[str, Any] = dict.fromkeys(
    (
        *("beta", "gamma_min", "gamma_max", "gamma_lambda", "q"),
        *("coefficient", "log_cap", "ratio_min", "ratio_max", "tilt"),
    ),
    1.0,
)
_MERGE_TOKENS = 128  # per program: 64 programs for 8192 tokens, whose few bytes half of the device reads at once


class Launch(NamedTuple):
    warps: int
    lane_bytes: int  # that each lane reads per block
    stages: int  # 1: straight into registers, not staged through shared memory


def launch_parameters(row_bytes: int) -> Launch:
    """For rows of this many bytes, whatever the device.

    Bytes per lane: 64 of them in flight in each of the 30 to 40 warps that a multiprocessor holds at 48 to 64 registers
    per lane (sm_90; tools/benchmarks/loss.py counts them) are several times what its share of the memory's bandwidth
    times latency asks for, and blocks stay at 2 KiB per warp, so that few lanes idle in the last one. Warps: rows
    shorter than a block of four would leave some without work; rows of more than 128 KiB are few in a given memory, and
    eight warps fill the device with them.
    """
    for limit, warps in ((2**11, 1), (2**12, 2), (2**17, 4)):
        if row_bytes <= limit:
            return Launch(warps, lane_bytes=64, stages=1)
    return Launch(warps=8, lane_bytes=64, stages=1)


def shard_state(
    logits: Tensor, labels: Tensor, shard: VocabShard, vocab_size: int, extra_statistics: frozenset[str]
) -> Tensor:
    """See `autograd.Backend`. One launch; ignored rows are not read."""
    extra_columns = extra_state_columns(extra_statistics)
    size = STATE_SIZE + len(extra_columns)
    if shard.valid_columns == 0:
        return neutral_shard_state(labels.shape, logits.device, size)
    if "argmax" in extra_columns and vocab_size > _LARGEST_EXACT_INDEX:
        raise ValueError(f"argmax is served for vocabularies of up to {_LARGEST_EXACT_INDEX} tokens, got {vocab_size}")
    state = torch.empty(*labels.shape, size, dtype=torch.float32, device=logits.device)
    launch = launch_parameters(shard.valid_columns * logits.element_size())
    vector = _vector(logits)
    vectors, lanes = launch.lane_bytes // logits.element_size() // vector, 32 * launch.warps
    if kernels.INTERPRETED:  # each operation costs the same there, however wide: the same block in two tiles
        vectors, lanes = 2, lanes * vectors // 2
    with torch.cuda.device_of(logits):
        for grid in _grids((logits, labels), (state,)):
            part, part_labels = grid.strided
            kernels.shard_state_kernel[(grid.tokens,)](
                logits=part,
                labels=part_labels,
                state=grid.dense[0],
                inner_size=grid.inner_size,
                **grid.strides_of("logits", 0, vector),
                column_stride=logits.stride(-1),
                **grid.strides_of("labels", 1),
                start=shard.start,
                valid_columns=shard.valid_columns,
                row_vectors=logits.shape[-1] // vector,
                vocab_size=vocab_size,
                STATE_SIZE=size,
                SUM_SQUARES=extra_columns.get("sum_squared_prob", 0),
                ARGMAX=extra_columns.get("argmax", 0),
                CONTIGUOUS=logits.stride(-1) == 1,
                VECTORS=vectors,
                LANES=lanes,
                VECTOR=vector,
                STAGES=launch.stages,
                **_options(launch.warps),
            )
    return state


def token_results(
    states: Tensor,
    labels: Tensor,
    objective: Objective,
    vocab_size: int,
    cross_entropy_values: bool,
    reference: Reference | None = None,
) -> TokenResults:
    """See `autograd.Backend`. One launch and one sum for built-in objectives; others see the merged statistics."""
    formula = objective.token_weight if isinstance(objective.token_weight, KernelFormula) else None
    parameters = _PARAMETERS | dict(formula.parameters if formula is not None else {})
    extra_columns = extra_state_columns(objective.extra_statistics)
    loss, weight, log_prob, entropy, maximum, sum_exp = (
        torch.empty(labels.shape, dtype=torch.float32, device=labels.device) for _ in range(6)
    )
    extras = torch.empty(len(extra_columns), *labels.shape, dtype=torch.float32, device=labels.device)
    tokens = labels.numel()
    programs = -(-tokens // _MERGE_TOKENS)
    invalid_labels = torch.empty(programs, dtype=torch.int32, device=labels.device)
    # 4 bytes a token: turned where they lie otherwise than the results. What no formula reads is not looked at.
    reference_log_prob, reference_entropy = (
        log_prob if value is None else value.contiguous() for value in (reference or (None, None))[:2]
    )
    if len(_merged_dimensions((labels,), labels.dim())) > 2:
        labels = labels.contiguous()
    with torch.cuda.device_of(labels):
        for grid in _grids((labels,), (loss,)):
            kernels.token_results_kernel[(programs,)](
                states=states,
                labels=labels,
                loss=loss,
                weight=weight,
                log_prob=log_prob,
                entropy=entropy,
                maximum=maximum,
                sum_exp=sum_exp,
                extras=extras,
                reference_log_prob=reference_log_prob,
                reference_entropy=reference_entropy,
                invalid_labels=invalid_labels,
                num_tokens=tokens,
                num_shards=states.shape[0],
                shard_stride=states.stride(0),
                inner_size=grid.inner_size,
                **grid.strides_of("labels", 0),
                vocab_size=vocab_size,
                log_vocab_size=math.log(max(vocab_size, 2)),
                **parameters,
                weight_floor=LOWEST if objective.negative_weights else objective.weight_floor,
                STATE_SIZE=states.shape[-1],
                SUM_SQUARES=extra_columns.get("sum_squared_prob", 0),
                ARGMAX=extra_columns.get("argmax", 0),
                WEIGHT="" if formula is None else formula.name,
                LAMBDA_ON_DEVICE=isinstance(parameters["gamma_lambda"], Tensor),
                EXEMPT=objective.exempt_token_ids,
                CROSS_ENTROPY_VALUES=cross_entropy_values,
                TOKENS=_MERGE_TOKENS,
                **_options(_MERGE_TOKENS // 32),
            )
    if formula is None:
        merged = MergedState(log_prob, entropy, maximum, sum_exp)
        merged = merged._replace(**{name: extras[column - STATE_SIZE] for name, column in extra_columns.items()})
        return weigh_tokens(merged, labels, objective, vocab_size, cross_entropy_values, reference)
    return TokenResults(loss, weight, log_prob, entropy, maximum, sum_exp, invalid_labels.sum())


def write_gradient(
    logits: Tensor,
    gradient: Tensor,
    labels: Tensor,
    upstream: Tensor,
    results: TokenResults,
    shard: VocabShard,
    vocab_size: int,
) -> None:
    """See `autograd.Backend`. One launch; ignored rows and rows of weight 0 are written without being read."""
    launch = launch_parameters(logits.shape[-1] * logits.element_size())
    vector = min(_vector(logits), _vector(gradient))
    row_coefficient = results.weight if results.row_coefficient is None else results.row_coefficient
    # What torch computed, such as the weights of a user's function, lies in memory as the labels do.
    per_token = tuple(
        value.contiguous()
        for value in (results.weight, row_coefficient, results.log_prob, results.max, results.sum_exp)
    )
    with torch.cuda.device_of(logits):
        for grid in _grids((logits, gradient, labels, upstream), per_token):
            part, part_gradient, part_labels, part_upstream = grid.strided
            weight, row_coefficient, log_prob, maximum, sum_exp = grid.dense
            kernels.gradient_kernel[(grid.tokens,)](
                logits=part,
                gradient=part_gradient,
                labels=part_labels,
                upstream=part_upstream,
                weight=weight,
                row_coefficient=row_coefficient,
                log_prob=log_prob,
                maximum=maximum,
                sum_exp=sum_exp,
                num_tokens=grid.tokens,
                inner_size=grid.inner_size,
                **grid.strides_of("logits", 0, vector),
                logits_column_stride=logits.stride(-1),
                **grid.strides_of("gradient", 1, vector),
                gradient_column_stride=gradient.stride(-1),
                **grid.strides_of("labels", 2),
                **grid.strides_of("upstream", 3),
                start=shard.start,
                valid_columns=shard.valid_columns,
                row_vectors=logits.shape[-1] // vector,
                vocab_size=vocab_size,
                ROW_COEFFICIENT=results.row_coefficient is not None,
                CONTIGUOUS=logits.stride(-1) == 1 and gradient.stride(-1) == 1,
                BLOCK=32 * launch.warps * launch.lane_bytes // logits.element_size(),
                VECTOR=vector,
                **_options(launch.warps),
            )
    torch.autograd.graph.increment_version(gradient)


def store_columns(gradient: Tensor, columns: Tensor, values: Tensor) -> None:
    """See `autograd.Backend`. One launch."""
    columns, values = columns.contiguous(), values.contiguous()
    k = columns.shape[-1]
    with torch.cuda.device_of(gradient):
        for grid in _grids((gradient, values[..., 0]), (columns, values)):
            part, _ = grid.strided
            part_columns, part_values = grid.dense
            kernels.store_columns_kernel[(grid.tokens,)](
                gradient=part,
                columns=part_columns,
                values=part_values,
                inner_size=grid.inner_size,
                **grid.strides_of("gradient", 0),
                column_stride=gradient.stride(-1),
                K=k,
                LANES=triton.next_power_of_2(k),
                **_options(1),
            )
    torch.autograd.graph.increment_version(gradient)


def _vector(tensor: Tensor) -> int:
    """Elements, a power of two and at most 16 bytes of them, that can be loaded at once wherever a row begins."""
    if tensor.stride(-1) != 1 or tensor.data_ptr() % 16:
        return 1
    return math.gcd(16 // tensor.element_size(), tensor.shape[-1], *tensor.stride()[:-1])


def _options(warps: int) -> dict[str, Any]:
    # Triton's own default for fusing multiplications and additions is about to change.
    return {"num_warps": warps, "enable_fp_fusion": True}


class _Grid(NamedTuple):
    """Tokens [outer, inner] that one launch serves.

    Attributes:
        tokens: how many.
        inner_size: how many of them follow each other by the inner stride.
        strides: (outer, inner) for each of `strided`, in elements.
        strided: tensors whose leading dimensions are the tokens.
        dense: tensors [...] in which the tokens follow each other.
    """

    tokens: int
    inner_size: int
    strides: list[tuple[int, int]]
    strided: tuple[Tensor, ...]
    dense: tuple[Tensor, ...]

    def strides_of(self, name: str, index: int, unit: int = 1) -> dict[str, int]:
        """The kernel's arguments for the strides of `strided[index]`, in units of so many elements."""
        outer, inner = self.strides[index]
        return {f"{name}_outer_stride": outer // unit, f"{name}_inner_stride": inner // unit}


def _grids(strided: tuple[Tensor, ...], dense: tuple[Tensor, ...]) -> Iterator[_Grid]:
    """Grids that cover all tokens; more than one only for views whose tokens take more than two strides."""
    *_, tokens_like = strided
    shape = tokens_like.shape
    if 0 in shape:
        return
    dimensions = _merged_dimensions(strided, len(shape))
    if len(dimensions) > 2:
        for index in range(shape[0]):
            yield from _grids(tuple(tensor[index] for tensor in strided), tuple(tensor[index] for tensor in dense))
        return
    flat = [(1, [0] * len(strided))] * (2 - len(dimensions))
    (_, outer_strides), (inner_size, inner_strides) = dimensions + flat
    strides = list(zip(outer_strides, inner_strides, strict=True))
    yield _Grid(math.prod(shape), inner_size, strides, strided, dense)


def _merged_dimensions(tensors: tuple[Tensor, ...], count: int) -> list[tuple[int, list[int]]]:
    """The first `count` dimensions, neighbours merged where every tensor allows it: (size, strides of the tensors)."""
    merged: list[tuple[int, list[int]]] = []
    for dim in range(count):
        size, strides = tensors[0].shape[dim], [tensor.stride(dim) for tensor in tensors]
        if size == 1:
            continue
        if merged and merged[-1][1] == [stride * size for stride in strides]:
            size *= merged.pop()[0]
        merged.append((size, strides))
    return merged
