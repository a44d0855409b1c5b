"""The report on a realigned corpus: one self-contained HTML page, and a JSON with the same numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from megatron_idft.corpus.display import bounded
from megatron_idft.corpus.report.html import render
from megatron_idft.corpus.report.numbers import save_report
from megatron_idft.corpus.scores.record_table import hash64
from megatron_idft.corpus.scores.summary import (
    FURTHER_SOURCES,
    MAX_SOURCES,
    MIN_TOKENS_TO_RANK,
    PHI_EDGES,
    RECORD_EDGES,
    Extremes,
)
from megatron_idft.hinted_decoding.output.outcomes import OutcomeRow, describe_methods
from megatron_idft.hinted_decoding.report import figures
from megatron_idft.hinted_decoding.report.numbers import DIFFERENCE_EDGES, CorpusNumbers, judge_null
from megatron_idft.hinted_decoding.report.outcome import ORIGINAL, STAGES, Outcome, Turn, read_outcome

VERSION = 2  # of the JSON
EXAMPLES = 4  # of each kind
MAX_CHARACTERS = 6000  # of an original text that are shown
HEAD_TOKENS, TAIL_TOKENS = 500, 200  # of a new text that are shown


def write_report(
    rows: Iterable[OutcomeRow], settings: Mapping[str, Any], output: Path, title: str
) -> tuple[Path, Path]:
    """Write report.html and report.json into the folder `output`; returns their paths.

    rows: of OUTCOME_SCHEMA (outcomes.py), read once as a stream; what is kept of them does not grow with their number.
    settings: of the job; all are shown, and "rollouts" tells whether the rollouts are the model's own samples.

    Raises InputError for a row that `realign` cannot have written, UserError where matplotlib is not installed.
    """
    data = summarize(rows, settings, title)
    return save_report(output, render_page(data), data)


def render_page(data: dict[str, Any]) -> str:
    """The page of what `summarize` returned. Needs matplotlib."""
    return render(
        "megatron_idft.hinted_decoding.report",
        "realign_report.html",
        data=data,
        describe_methods=describe_methods,
        figures=figures,
        flat_settings=flat_settings,
        rank_names=rank_names,
        turn_fates=turn_fates,
    )


def turn_fates(turns: Mapping[str, int]) -> dict[str, str]:
    """What became of turns, with its name on the page: each stage, and of the others those that came."""
    others = {"none": "without a stage", "dropped": "in dropped records", "error": "in failed records"}
    return {fate: fate for fate in (*STAGES, ORIGINAL)} | {fate: others[fate] for fate in others if turns[fate]}


def rank_names(lists: Iterable[list[dict[str, Any]]]) -> list[tuple[str, list[int]]]:
    """Every name of these counts with its count in each list; the most frequent name first."""
    columns = [Counter({entry["name"]: entry["count"] for entry in names}) for names in lists]
    total = sum(columns, Counter[str]())
    ranked = sorted(total, key=lambda name: (-total[name], name))
    return [(name, [column[name] for column in columns]) for name in ranked]


def flat_settings(settings: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (a.b.c, value)."""
    if isinstance(settings, dict) and settings:
        items = settings.items()
        return [row for key, value in items for row in flat_settings(value, f"{prefix}.{key}" if prefix else key)]
    if isinstance(settings, list):
        settings = ", ".join(map(str, settings)) or "none"
    return [(prefix, "none" if settings is None or settings == {} else settings)] if prefix else []


def summarize(rows: Iterable[OutcomeRow], settings: Mapping[str, Any], title: str) -> dict[str, Any]:
    """All numbers of the page, as plain types without NaN; `json.dumps` takes it as it is.

    {"version", "title", "settings", "null", "corpus": part, "sources": [part with "source"], "examples", "phi_edges",
    "record_edges", "difference_edges"}. A part is what `CorpusNumbers.as_json` returns; an estimate is {"value", "se"},
    with null for an error where there are too few records. Histograms have one bin more than edges at either end: open.
    """
    corpus, sources, examples = CorpusNumbers(), dict[str | None, CorpusNumbers](), Examples()
    for row in rows:
        outcome = read_outcome(row)
        source = row.get("source")
        if source not in sources and len(sources) >= MAX_SOURCES:
            source = FURTHER_SOURCES
        if source not in sources:
            sources[source] = CorpusNumbers()
        corpus.add(outcome)
        sources[source].add(outcome)
        examples.add(outcome)
    ordered = sorted(sources.items(), key=lambda item: (-item[1].records, str(item[0])))
    return {
        "version": VERSION,
        "title": title,
        "settings": _plain(settings),
        "null": judge_null(settings, corpus.rollouts()),
        "phi_edges": PHI_EDGES.tolist(),
        "record_edges": [round(float(edge), 2) for edge in RECORD_EDGES],
        "difference_edges": [round(float(edge), 2) for edge in DIFFERENCE_EDGES],
        "corpus": corpus.as_json(),
        "sources": [{"source": name} | part.as_json() for name, part in ordered],
        "examples": examples.as_json(),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


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
            Extremes[tuple[float, ...], dict[str, Any]](keep * EXAMPLES) for keep in (2, 2, 3)
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
        """largest, smallest, drawn: no turn twice."""
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
        "original": _ends(text),
        "excerpts": _excerpts(turn),
        "text": bounded(accepted.get("text") or ""),
    }


def _ends(text: str) -> Ends:
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
