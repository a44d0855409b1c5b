"""One row of a realigned corpus as the numbers that the report adds up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_idft.errors import InputError
from megatron_idft.hinted_decoding.output.outcomes import (
    CandidateRow,
    OutcomeRow,
    ResponseSums,
    Stage,
    TurnRow,
    TurnStage,
)

STAGES: tuple[Stage, ...] = get_args(Stage)
ORIGINAL = "original"
STATUSES = ("kept", "dropped", "error")
VERDICTS = ("right", "wrong", "unknown")

_Column = Literal[
    "num_tokens", "phi_sum", "phi_squared_sum", "log_prob_sum", "entropy_sum", "phi_below_1", "phi_below_3",
    "phi_below_5",
]  # fmt: skip
_TokenList = Literal["token_ids", "tokens", "hint_share", "phi", "entropy", "hinted_entropy"]

# Field of the sums -> column of a response.
SUMS: dict[str, _Column] = {
    "tokens": "num_tokens",
    "phi": "phi_sum",
    "phi_squared": "phi_squared_sum",
    "log_prob": "log_prob_sum",
    "entropy": "entropy_sum",
    "below_1": "phi_below_1",
    "below_3": "phi_below_3",
    "below_5": "phi_below_5",
}
_TOKEN_LISTS: tuple[_TokenList, ...] = get_args(_TokenList)
_REQUIRED = ("id", "file", "line", "status")

Sums = dict[str, float]


@dataclass
class TokenNumbers:
    """Of the tokens of an accepted candidate, float64 [n] each."""

    hint_share: NDArray[np.float64]
    phi: NDArray[np.float64]
    entropy: NDArray[np.float64]
    hinted_entropy: NDArray[np.float64]

    @property
    def two_streams(self) -> NDArray[np.bool_]:
        """[n], whether there was a hinted stream."""
        return np.isfinite(self.hinted_entropy)


@dataclass
class Turn:
    """A turn as the report adds it up.

    Attributes:
        row: as read.
        original: sums over the tokens of the original response; None where they are not known.
        accepted, new, tokens: of the new response, if the record was kept and this turn rewritten.
    """

    row: TurnRow
    stage: TurnStage | None
    original: Sums | None
    accepted: CandidateRow | None
    new: Sums | None
    tokens: TokenNumbers | None

    @property
    def candidates(self) -> list[CandidateRow]:
        return candidates_of(self.row)


@dataclass
class Outcome:
    row: OutcomeRow
    turns: list[Turn]
    not_finite: int  # responses with a score that is no number

    @property
    def kept(self) -> bool:
        return bool(self.row["status"] == "kept")


def read_outcome(row: OutcomeRow) -> Outcome:
    """Check a row and take its numbers.

    Raises:
        InputError: `realign` cannot have written the row.
    """
    for key in _REQUIRED:
        if row.get(key) is None:
            raise InputError(f"record {row.get('id')!r}: no {key}; is this a row that `realign` wrote?")
    if row["status"] not in STATUSES:
        raise _fault(row, f"status {row['status']!r}, which should be one of {', '.join(STATUSES)}")
    turns = [_turn(row, turn) for turn in _listed(row.get("turns"))]
    responses = (response for turn in turns for response in (*turn.candidates, _original(turn.row)))
    not_finite = sum(map(broken, responses))
    return Outcome(row, turns, not_finite)


def sums_of(response: ResponseSums) -> Sums | None:
    """By field; None for a response without tokens, or with a number that is missing or not finite."""
    if not response.get("num_tokens") or any(not _finite(response.get(column)) for column in SUMS.values()):
        return None
    return {field: float(response[column]) for field, column in SUMS.items()}


def broken(response: ResponseSums) -> bool:
    """Whether the response has tokens, but not their scores."""
    return bool(response.get("num_tokens")) and sums_of(response) is None


def candidates_of(turn: TurnRow) -> list[CandidateRow]:
    return list(_listed(turn.get("candidates")))


def added(parts: Iterable[Sums]) -> Sums:
    """The sums of several responses of one record."""
    whole: Sums = {}
    for part in parts:
        for field, value in part.items():
            whole[field] = whole.get(field, 0.0) + value
    return whole


def _turn(row: OutcomeRow, turn: TurnRow) -> Turn:
    stage = turn.get("stage")
    if stage is not None and stage not in (*STAGES, ORIGINAL):
        raise _fault(row, f"a turn with stage {stage!r}, which should be one of {', '.join((*STAGES, ORIGINAL))}")
    candidates = candidates_of(turn)
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


def _tokens(row: OutcomeRow, turn: TurnRow, accepted: CandidateRow) -> TokenNumbers | None:
    lists = {key: turn[key] for key in _TOKEN_LISTS if turn.get(key) is not None and len(turn[key])}
    for key, values in lists.items():
        if len(values) != accepted["num_tokens"]:
            raise _fault(row, f"{len(values)} entries in {key}, but {accepted['num_tokens']} accepted tokens")
    if not {"hint_share", "phi", "entropy", "hinted_entropy"} <= lists.keys():
        return None
    columns = (turn["hint_share"], turn["phi"], turn["entropy"], turn["hinted_entropy"])
    share, phi, entropy, hinted = (np.asarray(values, dtype=np.float64) for values in columns)
    finite = all(np.isfinite(values).all() for values in (share, phi, entropy))
    return TokenNumbers(share, phi, entropy, hinted) if finite else None


def _original(turn: TurnRow) -> ResponseSums:
    """The original's sums; a row that an earlier version wrote may lack them."""
    return {
        "num_tokens": turn.get("original_num_tokens", 0),
        "log_prob_sum": turn.get("original_log_prob_sum", math.nan),
        "entropy_sum": turn.get("original_entropy_sum", math.nan),
        "phi_sum": turn.get("original_phi_sum", math.nan),
        "phi_squared_sum": turn.get("original_phi_squared_sum", math.nan),
        "phi_below_1": turn.get("original_phi_below_1", 0),
        "phi_below_3": turn.get("original_phi_below_3", 0),
        "phi_below_5": turn.get("original_phi_below_5", 0),
    }


def _listed[T](values: Iterable[T] | None) -> Iterable[T]:
    return () if values is None else values


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _fault(row: OutcomeRow, what: str) -> InputError:
    return InputError(f"{row['file']}:{row['line']}, record {row['id']!r}: {what}; is this a row that `realign` wrote?")
