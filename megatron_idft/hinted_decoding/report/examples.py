"""Turns to look at: those whose phi rose most and least, and some that a hash of the record's id draws."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from megatron_idft.corpus.display import bounded
from megatron_idft.corpus.scores.record_table import hash64
from megatron_idft.corpus.scores.summary import MIN_TOKENS_TO_RANK, Extremes
from megatron_idft.hinted_decoding.report.outcome import Outcome, Turn

EXAMPLES = 4  # of each kind
MAX_CHARACTERS = 6000  # of an original text that are shown
HEAD_TOKENS, TAIL_TOKENS = 500, 200  # of a new text that are shown


class Examples:
    """Equal rows give equal examples, in whatever order they come."""

    def __init__(self) -> None:
        # More than shown, for no turn is shown twice.
        self._largest, self._smallest = Extremes(2 * EXAMPLES), Extremes(2 * EXAMPLES)
        self._drawn = Extremes(3 * EXAMPLES)

    def add(self, outcome: Outcome) -> None:
        for turn in outcome.turns:
            if turn.original is None or turn.new is None:
                continue
            before, after = (side["phi"] / side["tokens"] for side in (turn.original, turn.new))
            short = min(turn.original["tokens"], turn.new["tokens"]) < MIN_TOKENS_TO_RANK
            draw = hash64(f"{outcome.row['id']}\0{turn.row.get('message')}")
            texts = f"{turn.row.get('original_text')}\0{(turn.accepted or {}).get('text')}"
            identity, make = str(hash64(texts)), partial(_shown, outcome.row, turn, identity=draw)
            self._largest.offer((short, before - after, draw), identity, make)
            self._smallest.offer((short, after - before, draw), identity, make)
            self._drawn.offer((draw,), identity, make)

    def as_json(self) -> dict[str, list[dict[str, Any]]]:
        """largest, smallest, drawn: no turn twice."""
        ranked, shown, data = self._largest.values(), set(), {}
        data["largest"] = ranked[: min(EXAMPLES, (len(ranked) + 1) // 2)]
        for kind, entries in (("largest", None), ("smallest", self._smallest), ("drawn", self._drawn)):
            if entries is not None:
                data[kind] = [entry for entry in entries.values() if entry["draw"] not in shown][:EXAMPLES]
            shown |= {entry["draw"] for entry in data[kind]}
        return data


def _shown(row: dict[str, Any], turn: Turn, identity: int) -> dict[str, Any]:
    assert turn.original is not None and turn.new is not None and turn.accepted is not None
    example = {key: row[key] for key in ("id", "file", "line")} | {"source": row.get("source")}
    # As text: a reader of JSON may hold whole numbers in 53 bits.
    example |= {"draw": f"{identity:016x}", "message": turn.row.get("message"), "stage": turn.stage}
    for name, side in (("before", turn.original), ("after", turn.new)):
        example |= {f"phi_{name}": side["phi"] / side["tokens"], f"tokens_{name}": int(side["tokens"])}
    example["gain"] = example["phi_after"] - example["phi_before"]
    example |= {key: turn.accepted.get(key) for key in ("seed", "beta", "verdict", "finish_reason", "split_at")}
    example["extracted"] = None if turn.accepted.get("extracted") is None else bounded(turn.accepted["extracted"])
    text = turn.row.get("original_text") or ""
    kept = MAX_CHARACTERS // 2
    whole = len(text) <= MAX_CHARACTERS
    example["original"] = {
        "head": text if whole else text[:kept],
        "tail": "" if whole else text[-kept:],
        "left_out": 0 if whole else len(text) - 2 * kept,
    }
    return example | {"excerpts": _excerpts(turn), "text": bounded(turn.accepted.get("text") or "")}


def _excerpts(turn: Turn) -> list[dict[str, Any]]:
    """The first and the last tokens: [text, lambda, phi, entropy, hinted entropy; null where one stream ran]."""
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
                    round(float(numbers.mix_weight[i]), 4),
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
