"""Means along the response: of the tokens at each place, with standard errors over records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DECILES = 10
# First token of each bucket, counted from 0: the first and the second alone, then doubling.
POSITIONS = np.array([0, *(2**power for power in range(21))])


def deciles(length: int) -> NDArray[np.int64]:
    """The tenth of the response in which each token stands; int64 [length]."""
    return np.arange(length) * DECILES // length


def positions(length: int) -> NDArray[np.int64]:
    """The bucket of `POSITIONS` of each token; int64 [length]."""
    return np.searchsorted(POSITIONS, np.arange(length), side="right") - 1


class MeansAlong:
    """By place, what the tokens from two streams were; tokens of one stream are only counted.

    Kept per place and quantity: the sum and what its error needs, products of a record's sum and its tokens.
    """

    def __init__(self, places: int, names: tuple[str, ...]):
        self.names = names
        self.tokens = np.zeros(places)
        self.records = np.zeros(places, dtype=np.int64)
        self.of_response = np.zeros(places)
        self._tokens_squared = np.zeros(places)
        self._sums, self._mixed, self._squares = (np.zeros((len(names), places)) for _ in range(3))

    def add(
        self, places: NDArray[np.int64], two_streams: NDArray[np.bool_], values: Mapping[str, NDArray[np.float64]]
    ) -> None:
        """One record: places of its tokens and which came from two streams, [n] each; values of the latter, by name."""
        count = len(self.tokens)
        inside = places[two_streams]
        tokens = np.bincount(inside, minlength=count).astype(np.float64)
        self.of_response += np.bincount(places, minlength=count)
        self.tokens += tokens
        self.records += tokens > 0
        self._tokens_squared += tokens**2
        for index, name in enumerate(self.names):
            sums = np.bincount(inside, weights=values[name], minlength=count)
            self._sums[index] += sums
            self._mixed[index] += sums * tokens
            self._squares[index] += sums**2

    def as_json(self) -> dict[str, Any]:
        """of_response, tokens, records: counts by place. By name: {"value", "se"} by place, null without tokens."""
        data: dict[str, Any] = {
            "of_response": self.of_response.astype(np.int64).tolist(),
            "tokens": self.tokens.astype(np.int64).tolist(),
            "records": self.records.tolist(),
        }
        for index, name in enumerate(self.names):
            data[name] = [self._mean(index, place) for place in range(len(self.tokens))]
        return data

    def _mean(self, index: int, place: int) -> dict[str, float | None] | None:
        tokens, records = self.tokens[place], int(self.records[place])
        if not tokens:
            return None
        mean = float(self._sums[index, place] / tokens)
        if records < 2:
            return {"value": mean, "se": None}
        # The sum over records of (sum - mean * tokens)^2: the delta method for a ratio.
        squares = self._squares[index, place] - 2 * mean * self._mixed[index, place]
        squares += mean**2 * self._tokens_squared[place]
        return {"value": mean, "se": math.sqrt(max(0.0, float(squares)) * records / (records - 1)) / float(tokens)}
