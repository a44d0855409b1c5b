"""Keys and values of prompts: what an earlier row computed is found or copied, the rest goes through the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_idft.inference.attention import Prefill
from megatron_idft.inference.blocks import NOBODYS, Row
from megatron_idft.inference.cache import KeyValueCache
from megatron_idft.inference.served import ServedModel

_TOKENS = 16384  # padded tokens of prompts in one forward pass; at least one prompt
_TOKENS_ON_CPU = 1024  # nothing is won by more there, and prompts of like lengths go together


class Prefiller:
    """Computes what the rows that were opened last need before their first step: all but their last token."""

    def __init__(self, model: ServedModel, cache: KeyValueCache, max_positions: int) -> None:
        self.model, self.cache, self.max_positions = model, cache, max_positions
        self._most_tokens = _TOKENS_ON_CPU if model.device.type == "cpu" else _TOKENS

    def __call__(self, rows: Sequence[Row]) -> None:
        """rows: in the order in which they were opened."""
        for row in rows:
            if row.copy is not None and row.copy.computed:
                self.cache.copy(row.copy)
        todo = [row for row in rows if row.found < row.length]
        # Rows that found blocks that others of `rows` compute come after these: such a row has found more than the one
        # it waits for. In one batch both may stand, as each layer writes before it reads.
        alone = [row for row in todo if row.found == 0]
        after = [row for row in todo if row.found > 0]
        for batch in batches([row.length for row in alone], self._most_tokens):
            self._compute([alone[i] for i in batch])
        after.sort(key=lambda row: (row.awaited, row.found if row.awaited else 0, row.found - row.length))
        for rest in _in_order(after, self._most_tokens):
            self._compute(rest)
        for row in rows:
            if row.copy is not None and not row.copy.computed:
                self.cache.copy(row.copy)

    def _compute(self, rows: Sequence[Row]) -> None:
        """One forward pass over what these rows have not found."""
        count = max(row.length - row.found for row in rows)
        tokens = np.zeros((len(rows), count), dtype=np.int64)
        slots = np.full((len(rows), count), NOBODYS, dtype=np.int64)  # its first position
        for number, row in enumerate(rows):
            n = row.length - row.found
            tokens[number, :n] = row.tokens(row.found, row.length)
            slots[number, :n] = self.cache.slots(row, row.found, row.length)
        found = np.array([row.found for row in rows])
        positions = self._tensor(np.minimum(found[:, None] + np.arange(count), self.max_positions - 1))
        plan = Prefill(self._tensor(slots.ravel()))
        if found.any():
            plan = Prefill(plan.slots, self._seen(rows), positions)
        with self.cache.prefilling(plan):
            self.model.hidden_states(self._tensor(tokens), positions)

    def _seen(self, rows: Sequence[Row]) -> Tensor:
        seen = np.full((len(rows), max(row.length for row in rows)), NOBODYS, dtype=np.int64)
        for number, row in enumerate(rows):
            seen[number, : row.length] = self.cache.slots(row, 0, row.length)
        return self._tensor(seen)

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self.model.device, non_blocking=True)


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of lengths that go together, up to so many padded tokens, the longest first: running out of memory shows
    at once."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not found or (len(found[-1]) + 1) * lengths[found[-1][0]] > tokens:
            found.append([])
        found[-1].append(index)
    return found


def _in_order(rows: Sequence[Row], tokens: int) -> list[list[Row]]:
    """Rows that go together without a change of their order, up to so many padded tokens of whole prompts."""
    found: list[list[Row]] = []
    longest = 0
    for row in rows:
        longest = max(longest, row.length)
        if not found or (len(found[-1]) + 1) * longest > tokens:
            found.append([])
            longest = row.length
        found[-1].append(row)
    return found
