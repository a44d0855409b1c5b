"""How the two streams were mixed in the text that went into the output."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_idft.hinted_decoding.report.outcome import Outcome
from megatron_idft.hinted_decoding.report.positions import DECILES, POSITIONS, MeansAlong, deciles, positions

LAMBDA_BINS = 20  # between 0 and 1; tokens at exactly 0 and at exactly 1 have bins of their own
NAMES = ("mix_weight", "entropy", "hinted_entropy", "phi")
_OVERALL = (*NAMES, "at_0", "at_1")


class MixingSummary:
    """Of accepted candidates that had a hinted stream."""

    def __init__(self) -> None:
        self.turns = 0
        self._overall = MeansAlong(1, _OVERALL)
        self._deciles, self._positions = MeansAlong(DECILES, NAMES), MeansAlong(len(POSITIONS), NAMES)
        self._histogram = np.zeros(LAMBDA_BINS + 2, dtype=np.int64)

    def add(self, outcome: Outcome) -> None:
        parts = [turn.tokens for turn in outcome.turns if turn.tokens is not None and turn.tokens.two_streams.any()]
        if not parts:
            return
        self.turns += len(parts)
        two = np.concatenate([part.two_streams for part in parts])
        values = {name: np.concatenate([getattr(part, name) for part in parts])[two] for name in NAMES}
        weight = values["mix_weight"]
        values |= {"at_0": (weight == 0).astype(np.float64), "at_1": (weight == 1).astype(np.float64)}
        self._overall.add(np.zeros(len(two), dtype=np.int64), two, values)
        lengths = [len(part.phi) for part in parts]
        self._deciles.add(np.concatenate([deciles(length) for length in lengths]), two, values)
        self._positions.add(np.concatenate([positions(length) for length in lengths]), two, values)
        bins = 1 + np.clip((weight * LAMBDA_BINS).astype(np.int64), 0, LAMBDA_BINS - 1)
        bins = np.where(weight == 0, 0, np.where(weight == 1, LAMBDA_BINS + 1, bins))
        self._histogram += np.bincount(bins, minlength=LAMBDA_BINS + 2)

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
