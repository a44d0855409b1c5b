"""Rewritten turns side by side, before and after, as the page shows them."""

from __future__ import annotations

from functools import partial
from typing import Any, TypedDict

import numpy as np

from megatron_idft.corpus.scores.display import bounded
from megatron_idft.corpus.scores.record_table import hash64
from megatron_idft.corpus.scores.summary import MIN_TOKENS_TO_RANK, Extremes
from megatron_idft.hinted_decoding.output.outcomes import OutcomeRow
from megatron_idft.hinted_decoding.report.outcome import Outcome, Turn

EXAMPLES = 4  # of each kind
MAX_CHARACTERS = 6000  # of an original text that are shown
HEAD_TOKENS, TAIL_TOKENS = 500, 200  # of a new text that are shown


class Ends(TypedDict):
    """A text, or its two ends and the number of characters between them."""

    head: str
    tail: str
    left_out: int


class Excerpt(TypedDict):
    """Tokens from `start` on: [text, hint share, phi, entropy, hinted entropy; null where one stream ran]."""

    start: int
    tokens: list[list[Any]]


class Example(TypedDict):
    """A rewritten turn, before and after."""

    id: str
    file: str
    line: int
    source: str | None
    draw: str
    message: int | None
    stage: str | None
    phi_before: float
    phi_after: float
    gain: float
    tokens_before: int
    tokens_after: int
    seed: int | None
    slope: float | None
    verdict: str | None
    finish_reason: str | None
    split_at: int | None
    extracted: str | None
    original: Ends
    excerpts: list[Excerpt]
    text: str


class Examples:
    """Equal rows give equal examples, in whatever order they come."""

    def __init__(self) -> None:
        # More than shown, for no turn is shown twice.
        self._largest, self._smallest, self._drawn = (
            Extremes[tuple[float, ...], Example](keep * EXAMPLES) for keep in (2, 2, 3)
        )

    def add(self, outcome: Outcome) -> None:
        for turn in outcome.turns:
            if turn.original is None or turn.new is None:
                continue
            before, after = (side["phi"] / side["tokens"] for side in (turn.original, turn.new))
            short = min(turn.original["tokens"], turn.new["tokens"]) < MIN_TOKENS_TO_RANK
            draw = hash64(f"{outcome.row['id']}\0{turn.row.get('message')}")
            texts = f"{turn.row.get('original_text')}\0{turn.accepted['text'] if turn.accepted else None}"
            identity, make = str(hash64(texts)), partial(_shown, outcome.row, turn, identity=draw)
            self._largest.offer((short, before - after, draw), identity, make)
            self._smallest.offer((short, after - before, draw), identity, make)
            self._drawn.offer((draw,), identity, make)

    def as_json(self) -> dict[str, list[Example]]:
        """By kind: "largest" and "smallest" gain, and "drawn" by chance. No turn occurs twice."""
        ranked, shown, data = self._largest.values(), set(), {}
        data["largest"] = ranked[: min(EXAMPLES, (len(ranked) + 1) // 2)]
        for kind, entries in (("largest", None), ("smallest", self._smallest), ("drawn", self._drawn)):
            if entries is not None:
                data[kind] = [entry for entry in entries.values() if entry["draw"] not in shown][:EXAMPLES]
            shown |= {entry["draw"] for entry in data[kind]}
        return data


def _shown(row: OutcomeRow, turn: Turn, identity: int) -> Example:
    assert turn.original is not None and turn.new is not None and turn.accepted is not None
    accepted, text = turn.accepted, turn.row.get("original_text") or ""
    before, after = (side["phi"] / side["tokens"] for side in (turn.original, turn.new))
    extracted = accepted.get("extracted")
    return {
        "id": row["id"],
        "file": row["file"],
        "line": row["line"],
        "source": row.get("source"),
        "draw": f"{identity:016x}",  # as text: a reader of JSON may hold whole numbers in 53 bits
        "message": turn.row.get("message"),
        "stage": turn.stage,
        "phi_before": before,
        "phi_after": after,
        "gain": after - before,
        "tokens_before": int(turn.original["tokens"]),
        "tokens_after": int(turn.new["tokens"]),
        "seed": accepted.get("seed"),
        "slope": accepted.get("slope"),
        "verdict": accepted.get("verdict"),
        "finish_reason": accepted.get("finish_reason"),
        "split_at": accepted.get("split_at"),
        "extracted": None if extracted is None else bounded(extracted),
        "original": ends_of(text),
        "excerpts": _excerpts(turn),
        "text": bounded(accepted.get("text") or ""),
    }


def ends_of(text: str) -> Ends:
    """The text, or its two ends where it is too long to be shown."""
    if len(text) <= MAX_CHARACTERS:
        return {"head": text, "tail": "", "left_out": 0}
    kept = MAX_CHARACTERS // 2
    return {"head": text[:kept], "tail": text[-kept:], "left_out": len(text) - 2 * kept}


def _excerpts(turn: Turn) -> list[Excerpt]:
    """The first and the last tokens."""
    if turn.tokens is None:
        return []
    numbers, count = turn.tokens, len(turn.tokens.phi)
    texts = turn.row.get("tokens")
    if texts is None or not len(texts):
        texts = [f"⟨{token}⟩" for token in _ids(turn, count)]
    spans = [(0, count)]
    if count > HEAD_TOKENS + TAIL_TOKENS:
        spans = [(0, HEAD_TOKENS), (count - TAIL_TOKENS, count)]
    return [
        {
            "start": start,
            "tokens": [
                [
                    bounded(texts[i] or ""),
                    round(float(numbers.hint_share[i]), 4),
                    round(float(numbers.phi[i]), 4),
                    round(float(numbers.entropy[i]), 4),
                    round(float(numbers.hinted_entropy[i]), 4) if np.isfinite(numbers.hinted_entropy[i]) else None,
                ]
                for i in range(start, stop)
            ],
        }
        for start, stop in spans
    ]


def _ids(turn: Turn, count: int) -> Any:
    ids = turn.row.get("token_ids")
    return range(count) if ids is None or not len(ids) else ids
