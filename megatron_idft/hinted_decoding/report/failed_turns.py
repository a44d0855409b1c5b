"""Turns that no stage rewrote, with all that was tried, as the page shows them."""

from __future__ import annotations

from functools import partial
from typing import TypedDict

from megatron_idft.corpus.scores.display import bounded
from megatron_idft.corpus.scores.record_table import hash64
from megatron_idft.corpus.scores.summary import Extremes
from megatron_idft.hinted_decoding.output.outcomes import CandidateRow, FailureRow, HintRow
from megatron_idft.hinted_decoding.report.examples import Ends, ends_of
from megatron_idft.hinted_decoding.report.outcome import Outcome, Turn

FAILED_TURNS = 6
_TRIED = 6  # candidates of one turn that are shown


class ShownHint(TypedDict):
    """A hint; no analysis where there was none, or texts were left out."""

    stage: str
    marker: str | None
    failure: str | None
    analysis: Ends | None


class ShownCandidate(TypedDict):
    """A candidate; no text where texts were left out."""

    stage: str
    rejected_because: str | None
    verdict: str | None
    finish_reason: str
    extracted: str | None
    text: Ends | None


class FailedTurn(TypedDict):
    """A turn that was dropped, or stayed as it was."""

    id: str
    file: str
    line: int
    source: str | None
    message: int | None
    failures: list[FailureRow]
    original: Ends
    hints: list[ShownHint]
    candidates: list[ShownCandidate]


class FailedTurns:
    """Drawn by the records' ids: equal rows give equal examples, in whatever order they come."""

    def __init__(self) -> None:
        self._drawn = Extremes[tuple[float, ...], FailedTurn](FAILED_TURNS)

    def add(self, outcome: Outcome) -> None:
        for turn in outcome.turns:
            if turn.row.get("failures"):
                draw = hash64(f"{outcome.row['id']}\0{turn.row.get('message')}")
                self._drawn.offer((draw,), str(draw), partial(_shown, outcome, turn))

    def as_json(self) -> list[FailedTurn]:
        return self._drawn.values()


def _shown(outcome: Outcome, turn: Turn) -> FailedTurn:
    row = outcome.row
    failures = [FailureRow(stage=one["stage"], reason=bounded(one["reason"])) for one in turn.row["failures"]]
    return {
        "id": row["id"],
        "file": row["file"],
        "line": row["line"],
        "source": row.get("source"),
        "message": turn.row.get("message"),
        "failures": failures,
        "original": ends_of(turn.row.get("original_text") or ""),
        "hints": [_hint(hint) for hint in turn.row.get("hints") or ()],
        "candidates": [_candidate(candidate) for candidate in turn.candidates[:_TRIED]],
    }


def _hint(hint: HintRow) -> ShownHint:
    analysis, failure = hint.get("analysis_text"), hint.get("failure")
    return {
        "stage": hint["stage"],
        "marker": hint.get("marker"),
        "failure": None if failure is None else bounded(failure),
        "analysis": None if analysis is None else ends_of(analysis),
    }


def _candidate(candidate: CandidateRow) -> ShownCandidate:
    text, extracted = candidate.get("text"), candidate.get("extracted")
    return {
        "stage": candidate["stage"],
        "rejected_because": candidate.get("rejected_because"),
        "verdict": candidate.get("verdict"),
        "finish_reason": candidate["finish_reason"],
        "extracted": None if extracted is None else bounded(extracted),
        "text": None if text is None else ends_of(text),
    }
