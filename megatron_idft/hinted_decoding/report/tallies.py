"""Names and lengths, counted."""

from __future__ import annotations

from collections import Counter
from typing import Required, TypedDict

import numpy as np

from megatron_idft.corpus.scores.display import bounded

MAX_NAMES = 200
FURTHER_NAMES = "(further)"


class NameCount(TypedDict):
    name: str
    count: int


class LengthNumbers(TypedDict, total=False):
    """Lengths in tokens; only `count` where there are none. pN: the N-th percentile."""

    count: Required[int]
    mean: float
    p0: int
    p10: int
    p50: int
    p90: int
    p99: int
    p100: int
    histogram: list[int]


class Names:
    """How often each name came: reasons, finish reasons, phrases. From the 201st on, new names count as one."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, name: str | None) -> None:
        name = bounded(name) if name else "(none given)"
        if name not in self._counts and len(self._counts) >= MAX_NAMES:
            name = FURTHER_NAMES
        self._counts[name] += 1

    def as_json(self) -> list[NameCount]:
        """The most frequent first."""
        return [
            {"name": name, "count": count}
            for name, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        ]


class Lengths:
    """Lengths in tokens. There are no more different ones than the context is long, so percentiles are exact."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        self._counts[length] += 1

    def as_json(self) -> LengthNumbers:
        """Percentiles are the next length from below, never one that did not occur.

        Bin b of the histogram counts the lengths from 2^(b/2) to below 2^((b+1)/2); lengths of 0 are in bin 0.
        """
        if not self._counts:
            return {"count": 0}
        lengths = np.array(sorted(self._counts))
        counts = np.array([self._counts[int(length)] for length in lengths])
        total, reached = int(counts.sum()), np.cumsum(counts)
        ranks = [max(1, -(-percent * total // 100)) for percent in (0, 10, 50, 90, 99, 100)]
        at = lengths[np.searchsorted(reached, ranks)].tolist()
        bins = np.floor(2 * np.log2(np.maximum(1, lengths)) + 1e-9).astype(np.int64)
        return {
            "count": total,
            "mean": float(lengths @ counts / total),
            "p0": at[0],
            "p10": at[1],
            "p50": at[2],
            "p90": at[3],
            "p99": at[4],
            "p100": at[5],
            "histogram": np.bincount(bins, weights=counts).astype(np.int64).tolist(),
        }
