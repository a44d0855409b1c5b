"""Decode attention over blocks on a CPU, where nothing may be copied: keys and values are read where they lie.

The batch of the attention kernel are blocks, not rows. Blocks that lie one after the other are one view of the pool,
and go through the kernel together with the queries of the rows that hold them; what a row's blocks give is then merged
by their log-sum-exp. A block that several rows share is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class _Run(NamedTuple):
    """Blocks [begin, end), each held by `owners` rows, with repetitions where there are fewer.

    rows: int64 [(end - begin) * owners].  mask: [end - begin, 1, 1, size], 0 or -inf; None where all are full.
    """

    begin: int
    end: int
    owners: int
    rows: Tensor
    mask: Tensor | None


class BlockRuns:
    """The blocks that one decode step reads.

    Args:
        tables: of each row, its blocks.
        lengths: int64 [rows], where the new token's key and value stand, the last position that is looked at.
        size: positions of a block.
        dtype: of the queries.
    """

    def __init__(
        self, tables: Sequence[NDArray[np.int32]], lengths: NDArray[np.int64], size: int, dtype: torch.dtype
    ) -> None:
        counts = lengths // size + 1
        blocks = np.concatenate([table[:count] for table, count in zip(tables, counts, strict=True)])
        rows = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(len(blocks)) - np.repeat(np.cumsum(counts) - counts, counts)  # of a block in its row
        seen = np.where(places == counts[rows] - 1, (lengths % size + 1)[rows], size)
        order = np.argsort(blocks, kind="stable")
        held, first, owners = np.unique(blocks[order], return_index=True, return_counts=True)
        width = 1 << np.ceil(np.log2(owners)).astype(np.int64)
        cuts = np.flatnonzero((np.diff(held) != 1) | (np.diff(width) != 0)) + 1
        entries = np.empty(len(blocks), dtype=np.int64)  # of (block, row), where in the kernels' results it stands
        self._runs: list[_Run] = []
        total = 0
        for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(held)], strict=True):
            n, many = end - begin, int(width[begin])
            number = np.minimum(np.arange(many), owners[begin:end, None] - 1)
            pairs = order[first[begin:end, None] + number]  # [n, many]
            entries[pairs] = total + np.arange(n * many).reshape(n, many)
            mask = _mask(seen[pairs[:, 0]], size, dtype)
            start = int(held[begin])
            self._runs.append(_Run(start, start + n, many, torch.from_numpy(rows[pairs].ravel()), mask))
            total += n * many
        # [rows, places], where each block's result stands; `total` for what there is not. The last place is nobody's.
        index = np.full((len(counts), int(counts.max()) + 1), total)
        index[rows, places] = entries
        place_of = np.full(total, index.shape[1] - 1)  # that of repetitions, too
        place_of[entries] = rows * index.shape[1] + places
        self._index, self._place_of = torch.from_numpy(index), torch.from_numpy(place_of)
        self._row_of = torch.from_numpy(place_of // index.shape[1])

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """query [rows, kv_heads, group, d], keys, values [blocks, size, kv_heads, d] -> [rows, heads * d]."""
        found = [self._attend_run(run, query, keys, values, scale) for run in self._runs]
        outs, log_sums = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*found, strict=True))
        nothing = log_sums.new_full((1, *log_sums.shape[1:]), -torch.inf)
        weights = torch.cat([log_sums, nothing])[self._index].softmax(1).flatten(0, 1)[self._place_of]
        outs = outs.mul_(weights.unsqueeze(-1)) if outs.dtype == weights.dtype else outs * weights.unsqueeze(-1)
        merged = outs.new_zeros(len(query), *outs.shape[1:]).index_add_(0, self._row_of, outs)
        return merged.transpose(1, 2).reshape(len(query), -1).to(query.dtype)

    def _attend_run(
        self, run: _Run, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Results [n * owners, group, kv_heads, d] and their log-sum-exps [n * owners, group, kv_heads]."""
        _, heads, group, d = query.shape
        n = run.end - run.begin
        asked = query[run.rows]
        if run.owners > 1:
            asked = asked.view(n, run.owners, heads, group, d).transpose(1, 2).reshape(n, heads, run.owners * group, d)
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            asked,
            keys[run.begin : run.end].transpose(1, 2),
            values[run.begin : run.end].transpose(1, 2),
            attn_mask=run.mask,
            scale=scale,
        )
        return out.transpose(1, 2).reshape(-1, group, heads, d), log_sum.transpose(1, 2).reshape(-1, group, heads)


def _mask(seen: NDArray[np.int64], size: int, dtype: torch.dtype) -> Tensor | None:
    """seen: int64 [n], how many leading positions of each block are looked at."""
    if (seen == size).all():
        return None
    beyond = torch.from_numpy(np.arange(size) >= seen[:, None])
    return torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf)[:, None, None, :]
