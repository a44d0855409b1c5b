"""How the two streams were mixed in the text that went into the output: overall, and along the response."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_idft.hinted_decoding.report.outcome import Outcome

SHARE_BINS = 20  # between 0 and 1; tokens at exactly 0 and at exactly 1 have bins of their own
NAMES = ("hint_share", "entropy", "hinted_entropy", "phi")
_OVERALL = (*NAMES, "at_0", "at_1")
DECILES = 10
# First token of each bucket, counted from 0: the first and the second alone, then doubling.
POSITIONS = np.array([0, *(2**power for power in range(21))])


class MixingSummary:
    """Of accepted candidates that had a hinted stream."""

    def __init__(self) -> None:
        self.turns = 0
        self._overall = MeansByPlace(1, _OVERALL)
        self._deciles, self._positions = MeansByPlace(DECILES, NAMES), MeansByPlace(len(POSITIONS), NAMES)
        self._histogram = np.zeros(SHARE_BINS + 2, dtype=np.int64)

    def add(self, outcome: Outcome) -> None:
        parts = [turn.tokens for turn in outcome.turns if turn.tokens is not None and turn.tokens.two_streams.any()]
        if not parts:
            return
        self.turns += len(parts)
        two = np.concatenate([part.two_streams for part in parts])
        values = {name: np.concatenate([getattr(part, name) for part in parts])[two] for name in NAMES}
        share = values["hint_share"]
        values |= {"at_0": (share == 0).astype(np.float64), "at_1": (share == 1).astype(np.float64)}
        self._overall.add(np.zeros(len(two), dtype=np.int64), two, values)
        lengths = [len(part.phi) for part in parts]
        self._deciles.add(np.concatenate([deciles(length) for length in lengths]), two, values)
        self._positions.add(np.concatenate([positions(length) for length in lengths]), two, values)
        bins = 1 + np.clip((share * SHARE_BINS).astype(np.int64), 0, SHARE_BINS - 1)
        bins = np.where(share == 0, 0, np.where(share == 1, SHARE_BINS + 1, bins))
        self._histogram += np.bincount(bins, minlength=SHARE_BINS + 2)

    def as_json(self) -> dict[str, Any]:
        """Means over tokens from two streams: overall, by tenth of the response, and by position from its start."""
        overall = self._overall.as_json()
        data = {name: overall[name][0] for name in _OVERALL}
        shown = int(np.flatnonzero(self._positions.of_response).max(initial=-1)) + 1
        by_position = {name: values[:shown] for name, values in self._positions.as_json().items()}
        return {
            "turns": self.turns,
            "records": overall["records"][0],
            "tokens": overall["tokens"][0],
            "tokens_of_response": overall["of_response"][0],
            "means": data,
            "histogram": self._histogram.tolist(),
            "deciles": self._deciles.as_json(),
            "positions": {"from": POSITIONS[:shown].tolist()} | by_position,
        }


def deciles(length: int) -> NDArray[np.int64]:
    """The tenth of the response in which each token stands; int64 [length]."""
    return np.arange(length) * DECILES // length


def positions(length: int) -> NDArray[np.int64]:
    """The bucket of `POSITIONS` of each token; int64 [length]."""
    return np.searchsorted(POSITIONS, np.arange(length), side="right") - 1


class MeansByPlace:
    """Means along the response, of the tokens at each place that came from two streams; the others are only counted.

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
