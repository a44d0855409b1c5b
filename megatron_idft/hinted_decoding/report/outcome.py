"""One row of a realigned corpus as the numbers that the report adds up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_idft.errors import InputError

STAGES = ("rollout", "hinted", "retry")
ORIGINAL = "original"
STATUSES = ("kept", "dropped", "error")
VERDICTS = ("right", "wrong", "unknown")

# Field of the sums -> column of a candidate; the original's columns have a prefix.
SUMS = {
    "tokens": "num_tokens",
    "phi": "phi_sum",
    "phi_squared": "phi_squared_sum",
    "log_prob": "log_prob_sum",
    "entropy": "entropy_sum",
    "below_1": "phi_below_1",
    "below_3": "phi_below_3",
    "below_5": "phi_below_5",
}
_TOKEN_LISTS = ("token_ids", "tokens", "hint_share", "phi", "entropy", "hinted_entropy")
_REQUIRED = ("id", "file", "line", "status")

Row = dict[str, Any]
Sums = dict[str, float]


@dataclass
class TokenNumbers:
    """Of the accepted candidate, float64 [n] each. two_streams: bool [n], where there was a hinted stream."""

    hint_share: NDArray[np.float64]
    phi: NDArray[np.float64]
    entropy: NDArray[np.float64]
    hinted_entropy: NDArray[np.float64]

    @property
    def two_streams(self) -> NDArray[np.bool_]:
        return np.isfinite(self.hinted_entropy)


@dataclass
class Turn:
    """row: as read. original, new: sums over the tokens of the response before and after; None where not known.

    new and tokens are only there where the record was kept and this turn was rewritten.
    """

    row: Row
    stage: str | None
    original: Sums | None
    accepted: Row | None
    new: Sums | None
    tokens: TokenNumbers | None

    @property
    def candidates(self) -> list[Row]:
        return list(_items(self.row.get("candidates")))


@dataclass
class Outcome:
    row: Row
    turns: list[Turn]
    not_finite: int  # responses with a score that is no number

    @property
    def kept(self) -> bool:
        return bool(self.row["status"] == "kept")


def read_outcome(row: Row) -> Outcome:
    """A row of OUTCOME_SCHEMA. Raises InputError for one that `realign` cannot have written."""
    for key in _REQUIRED:
        if row.get(key) is None:
            raise InputError(f"record {row.get('id')!r}: no {key}; is this a row that `realign` wrote?")
    if row["status"] not in STATUSES:
        raise _fault(row, f"status {row['status']!r}, which should be one of {', '.join(STATUSES)}")
    turns = [_turn(row, turn) for turn in _items(row.get("turns"))]
    not_finite = sum(
        broken(candidate) for turn in turns for candidate in (*turn.candidates, _original(turn.row)) if candidate
    )
    return Outcome(row, turns, not_finite)


def sums_of(candidate: Mapping[str, Any]) -> Sums | None:
    """By field; None for a response without tokens, or with a number that is missing or not finite."""
    if not candidate.get("num_tokens") or any(not _finite(candidate.get(column)) for column in SUMS.values()):
        return None
    return {field: float(candidate[column]) for field, column in SUMS.items()}


def broken(candidate: Mapping[str, Any]) -> bool:
    """Whether the response has tokens, but not their scores."""
    return bool(candidate.get("num_tokens")) and sums_of(candidate) is None


def added(parts: Iterable[Sums]) -> Sums:
    """The sums of several responses of one record."""
    whole: Sums = {}
    for part in parts:
        for field, value in part.items():
            whole[field] = whole.get(field, 0.0) + value
    return whole


def _turn(row: Row, turn: Row) -> Turn:
    stage = turn.get("stage")
    if stage is not None and stage not in (*STAGES, ORIGINAL):
        raise _fault(row, f"a turn with stage {stage!r}, which should be one of {', '.join((*STAGES, ORIGINAL))}")
    candidates = list(_items(turn.get("candidates")))
    for candidate in candidates:
        if candidate["stage"] not in STAGES:
            raise _fault(row, f"a candidate of stage {candidate['stage']!r}, should be one of {', '.join(STAGES)}")
        if candidate.get("verdict") not in (*VERDICTS, None):
            raise _fault(row, f"verdict {candidate['verdict']!r}, which should be one of {', '.join(VERDICTS)}")
    original = sums_of(_original(turn))
    if row["status"] != "kept" or stage not in STAGES:
        return Turn(turn, stage, original, None, None, None)
    accepted = next((c for c in candidates if c.get("accepted") and c["stage"] == stage), None)
    if accepted is None:
        raise _fault(row, f"kept with a turn of stage {stage!r}, but no candidate of that stage was accepted")
    return Turn(turn, stage, original, accepted, sums_of(accepted), _tokens(row, turn, accepted))


def _tokens(row: Row, turn: Row, accepted: Row) -> TokenNumbers | None:
    lists = {key: turn[key] for key in _TOKEN_LISTS if turn.get(key) is not None and len(turn[key])}
    for key, values in lists.items():
        if len(values) != accepted["num_tokens"]:
            raise _fault(row, f"{len(values)} entries in {key}, but {accepted['num_tokens']} accepted tokens")
    if any(key not in lists for key in ("hint_share", "phi", "entropy", "hinted_entropy")):
        return None
    arrays = {
        key: np.asarray(lists[key], dtype=np.float64) for key in ("hint_share", "phi", "entropy", "hinted_entropy")
    }
    finite = all(np.isfinite(arrays[key]).all() for key in ("hint_share", "phi", "entropy"))
    return TokenNumbers(**arrays) if finite else None


def _original(turn: Row) -> Row:
    return {column: turn.get(f"original_{column}") for column in SUMS.values()}


def _items(values: Any) -> Iterable[Row]:
    return () if values is None else values


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _fault(row: Row, what: str) -> InputError:
    return InputError(f"{row['file']}:{row['line']}, record {row['id']!r}: {what}; is this a row that `realign` wrote?")
