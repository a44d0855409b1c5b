"""How the two streams were mixed in the text that went into the output: overall, and along the response."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.scores.estimates import EstimateNumbers
from megatron_idft.hinted_decoding.report.outcome import Outcome

SHARE_BINS = 20  # between 0 and 1; tokens at exactly 0 and at exactly 1 have bins of their own
Quantity = Literal["hint_share", "entropy", "hinted_entropy", "phi", "at_0", "at_1"]
NAMES: tuple[Quantity, ...] = ("hint_share", "entropy", "hinted_entropy", "phi")
DECILES = 10
# First token of each bucket, counted from 0: buckets of one token, one token, then twice as many each time.
POSITIONS = np.array([0, *(2**power for power in range(21))])


class Means(TypedDict):
    """Over all tokens; null where there are none.

    Attributes:
        at_0: share of the tokens with a hint share of 0.
        at_1: share of the tokens with a hint share of 1.
    """

    hint_share: EstimateNumbers | None
    entropy: EstimateNumbers | None
    hinted_entropy: EstimateNumbers | None
    phi: EstimateNumbers | None
    at_0: EstimateNumbers | None
    at_1: EstimateNumbers | None


class MeansAlong(TypedDict):
    """By place in the response: counts, and means that are null where a place has no token."""

    of_response: list[int]
    tokens: list[int]
    records: list[int]
    hint_share: list[EstimateNumbers | None]
    entropy: list[EstimateNumbers | None]
    hinted_entropy: list[EstimateNumbers | None]
    phi: list[EstimateNumbers | None]


_From = TypedDict("_From", {"from": list[int]})  # a keyword of Python's


class MeansByPosition(_From, MeansAlong):
    """By bucket of positions; "from" is the first position of each bucket, counted from 0."""


class MixingNumbers(TypedDict):
    """Of the tokens from two streams."""

    turns: int
    records: int
    tokens: int
    tokens_of_response: int
    means: Means
    histogram: list[int]
    deciles: MeansAlong
    positions: MeansByPosition


class MixingSummary:
    """Of accepted candidates that had a hinted stream."""

    def __init__(self) -> None:
        self.turns = 0
        self._overall = MeansByPlace(1, get_args(Quantity))
        self._deciles, self._positions = MeansByPlace(DECILES, NAMES), MeansByPlace(len(POSITIONS), NAMES)
        self._histogram = np.zeros(SHARE_BINS + 2, dtype=np.int64)

    def add(self, outcome: Outcome) -> None:
        parts = [turn.tokens for turn in outcome.turns if turn.tokens is not None and turn.tokens.two_streams.any()]
        if not parts:
            return
        self.turns += len(parts)
        two = np.concatenate([part.two_streams for part in parts])
        share = np.concatenate([part.hint_share for part in parts])[two]
        values: dict[Quantity, NDArray[np.float64]] = {
            "hint_share": share,
            "entropy": np.concatenate([part.entropy for part in parts])[two],
            "hinted_entropy": np.concatenate([part.hinted_entropy for part in parts])[two],
            "phi": np.concatenate([part.phi for part in parts])[two],
            "at_0": (share == 0).astype(np.float64),
            "at_1": (share == 1).astype(np.float64),
        }
        self._overall.add(np.zeros(len(two), dtype=np.int64), two, values)
        lengths = [len(part.phi) for part in parts]
        self._deciles.add(np.concatenate([deciles(length) for length in lengths]), two, values)
        self._positions.add(np.concatenate([positions(length) for length in lengths]), two, values)
        bins = 1 + np.clip((share * SHARE_BINS).astype(np.int64), 0, SHARE_BINS - 1)
        bins = np.where(share == 0, 0, np.where(share == 1, SHARE_BINS + 1, bins))
        self._histogram += np.bincount(bins, minlength=SHARE_BINS + 2)

    def as_json(self) -> MixingNumbers:
        """Means over tokens from two streams: overall, by tenth of the response, and by position from its start."""
        overall = self._overall
        shown = int(np.flatnonzero(self._positions.of_response).max(initial=-1)) + 1
        return {
            "turns": self.turns,
            "records": int(overall.records[0]),
            "tokens": int(overall.tokens[0]),
            "tokens_of_response": int(overall.of_response[0]),
            "means": {
                "hint_share": overall.mean("hint_share", 0),
                "entropy": overall.mean("entropy", 0),
                "hinted_entropy": overall.mean("hinted_entropy", 0),
                "phi": overall.mean("phi", 0),
                "at_0": overall.mean("at_0", 0),
                "at_1": overall.mean("at_1", 0),
            },
            "histogram": self._histogram.tolist(),
            "deciles": self._deciles.along(DECILES),
            "positions": {"from": POSITIONS[:shown].tolist(), **self._positions.along(shown)},
        }


def deciles(length: int) -> NDArray[np.int64]:
    """The tenth of the response in which each token stands; int64 [length]."""
    return np.arange(length) * DECILES // length


def positions(length: int) -> NDArray[np.int64]:
    """The bucket of `POSITIONS` of each token; int64 [length]."""
    return np.searchsorted(POSITIONS, np.arange(length), side="right") - 1


class MeansByPlace:
    """Means along the response, of the tokens at each place that came from two streams; the others are only counted.

    The sums kept per place and quantity are those of the values, and of products of a record's sum and its tokens for
    the standard error.
    """

    def __init__(self, places: int, names: tuple[Quantity, ...]):
        self.names = names
        self.tokens = np.zeros(places)
        self.records = np.zeros(places, dtype=np.int64)
        self.of_response = np.zeros(places)
        self._tokens_squared = np.zeros(places)
        self._sums, self._mixed, self._squares = (np.zeros((len(names), places)) for _ in range(3))

    def add(
        self, places: NDArray[np.int64], two_streams: NDArray[np.bool_], values: Mapping[Quantity, NDArray[np.float64]]
    ) -> None:
        """Add one record of n tokens.

        Args:
            places: int64 [n].
            two_streams: bool [n], whether the token came from two streams.
            values: of those tokens, in their order, by name.
        """
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

    def along(self, places: int) -> MeansAlong:
        """The first `places` of them."""
        return {
            "of_response": self.of_response[:places].astype(np.int64).tolist(),
            "tokens": self.tokens[:places].astype(np.int64).tolist(),
            "records": self.records[:places].tolist(),
            "hint_share": [self.mean("hint_share", place) for place in range(places)],
            "entropy": [self.mean("entropy", place) for place in range(places)],
            "hinted_entropy": [self.mean("hinted_entropy", place) for place in range(places)],
            "phi": [self.mean("phi", place) for place in range(places)],
        }

    def mean(self, name: Quantity, place: int) -> EstimateNumbers | None:
        """At one place; None where it has no token."""
        index, tokens, records = self.names.index(name), self.tokens[place], int(self.records[place])
        if not tokens:
            return None
        mean = float(self._sums[index, place] / tokens)
        if records < 2:
            return {"value": mean, "se": None}
        # The sum over records of (sum - mean * tokens)^2: the delta method for a ratio.
        squares = self._squares[index, place] - 2 * mean * self._mixed[index, place]
        squares += mean**2 * self._tokens_squared[place]
        return {"value": mean, "se": math.sqrt(max(0.0, float(squares)) * records / (records - 1)) / float(tokens)}
