"""Attention of one token a row over keys and values in blocks, in Triton: for GPUs without flash-attn.

A program takes one row, one key-value head and a part of the row's blocks; the heads of its group are the rows of its
matrix products. A second kernel merges the parts by their log-sum-exps. Sums are fp32. Which blocks a row has stands in
a table on the device, and grids depend on shapes only, so that a CUDA graph can capture both. TRITON_INTERPRET=1 runs
them on the CPU, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_PARTS = 32  # of a row's blocks, at most
_BLOCKS_OF_A_PART = 4  # at least
_LEAST_ROWS = 16  # of a matrix product in Triton


@triton.jit
def _attend_kernel(
    query,
    keys,
    values,
    tables,
    lengths,
    partial,
    log_sums,
    scale,
    table_stride,
    block_stride,
    position_stride,
    head_stride,
    blocks_of_a_part,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,  # positions of a block
    D: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP, rounded up
    WIDTH: tl.constexpr,  # D, rounded up
    PRECISION: tl.constexpr,
):
    """partial [rows, kv_heads, parts, group, d], log_sums [rows, kv_heads, parts, group]."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (row.to(tl.int64) * tl.num_programs(1) + head) * tl.num_programs(2) + part
    length = tl.load(lengths + row).to(tl.int32)  # the last position that is looked at
    heads, columns, places = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, SIZE)
    inside = (heads < GROUP)[:, None] & (columns < D)[None, :]
    begin = (row.to(tl.int64) * tl.num_programs(1) + head) * GROUP * D
    offsets = heads[:, None] * D + columns[None, :]
    asked = tl.load(query + begin + offsets, mask=inside, other=0.0)
    if _INTERPRETED:
        asked = asked.to(tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    first = part * blocks_of_a_part
    last = tl.minimum(first + blocks_of_a_part, length // SIZE + 1)
    for number in range(first, last):
        block = tl.load(tables + row.to(tl.int64) * table_stride + number).to(tl.int64)
        where = block * block_stride + head * head_stride + places[:, None] * position_stride + columns[None, :]
        seen = number * SIZE + places <= length
        read = seen[:, None] & (columns < D)[None, :]
        key, value = tl.load(keys + where, mask=read, other=0.0), tl.load(values + where, mask=read, other=0.0)
        if _INTERPRETED:  # its products take bf16 for integers
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(asked, tl.trans(key), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp(scores - larger[:, None])
        before = tl.exp(maximum - larger)
        total = total * before + tl.sum(weights, 1)
        result = result * before[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        maximum = larger
    safe = tl.where(total > 0, total, 1.0)
    tl.store(partial + place * GROUP * D + offsets, result / safe[:, None], mask=inside)
    log_sum = tl.where(total > 0, maximum + tl.log(safe), float("-inf"))
    tl.store(log_sums + place * GROUP + heads, log_sum, mask=heads < GROUP)


@triton.jit
def _merge_kernel(
    partial,
    log_sums,
    out,
    parts,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out [rows, kv_heads * group, d]; one program a row and head."""
    place, member = tl.program_id(0).to(tl.int64), tl.program_id(1)
    numbers, columns = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    at = (place * parts + numbers) * GROUP + member
    weight = tl.load(log_sums + at, mask=numbers < parts, other=float("-inf"))
    weight = tl.exp(weight - tl.max(weight, 0))
    read = (numbers < parts)[:, None] & (columns < D)[None, :]
    each = tl.load(partial + at[:, None] * D + columns[None, :], mask=read, other=0.0)
    merged = tl.sum(each * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (place * GROUP + member) * D + columns, merged.to(out.dtype.element_ty), mask=columns < D)


def paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """What each row's token sees of positions 0 … lengths.

    Args:
        query: [rows, heads, d].
        keys, values: [blocks, size, kv_heads, d], alike in strides, dense in d; size a power of two.
        tables: int32 [rows, places], the rows' blocks in their order.
        lengths: int64 [rows].
        scale: of the products.

    Returns:
        [rows, heads, d] in the query's dtype. No synchronisation with the host, no collective.
    """
    rows, heads, d = query.shape
    _, size, kv_heads, _ = keys.shape
    group, width = heads // kv_heads, triton.next_power_of_2(d)
    places = tables.shape[1]
    parts = max(1, min(_PARTS, places // _BLOCKS_OF_A_PART))
    partial = torch.empty(rows, kv_heads, parts, group, d, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(rows, kv_heads, parts, group, dtype=torch.float32, device=query.device)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    _attend_kernel[rows, kv_heads, parts](
        query.contiguous(),
        keys,
        values,
        tables,
        lengths,
        partial,
        log_sums,
        scale,
        tables.stride(0),
        *keys.stride()[:3],
        triton.cdiv(places, parts),
        GROUP=group,
        SIZE=size,
        D=d,
        ROWS=max(_LEAST_ROWS, triton.next_power_of_2(group)),
        WIDTH=width,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=4,
    )
    _merge_kernel[rows * kv_heads, group](
        partial, log_sums, out, parts, GROUP=group, D=d, PARTS=triton.next_power_of_2(parts), WIDTH=width
    )
    return out
