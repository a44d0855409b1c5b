"""The report on a realigned corpus: one self-contained HTML page, and a JSON with the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_idft.corpus.report.numbers import save_report
from megatron_idft.corpus.scores.summary import FURTHER_SOURCES, MAX_SOURCES, PHI_EDGES, RECORD_EDGES
from megatron_idft.hinted_decoding.report.corpus_numbers import DIFFERENCE_EDGES, Part
from megatron_idft.hinted_decoding.report.examples import Examples
from megatron_idft.hinted_decoding.report.outcome import read_outcome
from megatron_idft.hinted_decoding.report.own_samples import judge_null

VERSION = 1  # of the JSON


def write_report(
    rows: Iterable[dict[str, Any]], settings: Mapping[str, Any], output: Path, title: str
) -> tuple[Path, Path]:
    """Write report.html and report.json into the folder `output`; returns their paths.

    rows: of OUTCOME_SCHEMA (outcomes.py), read once as a stream; what is kept of them does not grow with their number.
    settings: of the job; all are shown, and "rollouts" tells whether the rollouts are the model's own samples.

    Raises InputError for a row that `realign` cannot have written, UserError where matplotlib is not installed.
    """
    from megatron_idft.hinted_decoding.report.page import render_page

    data = summarize(rows, settings, title)
    return save_report(output, render_page(data), data)


def summarize(rows: Iterable[dict[str, Any]], settings: Mapping[str, Any], title: str) -> dict[str, Any]:
    """All numbers of the page, as plain types without NaN; `json.dumps` takes it as it is.

    {"version", "title", "settings", "null", "corpus": part, "sources": [part with "source"], "examples", "phi_edges",
    "record_edges", "difference_edges"}. A part is what `Part.as_json` returns; an estimate is {"value", "se"}, with
    null for an error where there are too few records. Histograms have one bin more than edges at either end: open.
    """
    corpus, sources, examples = Part(), dict[str | None, Part](), Examples()
    for row in rows:
        outcome = read_outcome(row)
        source = row.get("source")
        if source not in sources and len(sources) >= MAX_SOURCES:
            source = FURTHER_SOURCES
        if source not in sources:
            sources[source] = Part()
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
