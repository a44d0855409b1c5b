"""All numbers of the page, out of the rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from megatron_idft.corpus.scores.summary import FURTHER_SOURCES, MAX_SOURCES, PHI_EDGES, RECORD_EDGES
from megatron_idft.hinted_decoding.output.outcomes import OutcomeRow
from megatron_idft.hinted_decoding.report.examples import Example, Examples
from megatron_idft.hinted_decoding.report.failed_turns import FailedTurn, FailedTurns
from megatron_idft.hinted_decoding.report.numbers import DIFFERENCE_EDGES, CorpusNumbers, Null, Part, judge_null
from megatron_idft.hinted_decoding.report.outcome import read_outcome

VERSION = 2  # of the JSON


class SourcePart(Part):
    """The numbers of one source."""

    source: str | None


class Report(TypedDict):
    """The content of report.json: plain types without NaN, which `json.dumps` takes as they are.

    Estimates are null where there is nothing to estimate from. Histograms have one bin more than edges at either end:
    open.

    Attributes:
        prompt_trial: the prompts that a trial chose among, and those that it chose; null where there was none.
        examples: by kind, see `Examples`.
    """

    version: int
    title: str
    settings: dict[str, Any]
    null: Null
    phi_edges: list[float]
    record_edges: list[float]
    difference_edges: list[float]
    corpus: Part
    sources: list[SourcePart]
    prompt_trial: dict[str, Any] | None
    examples: dict[str, list[Example]]
    failed_turns: list[FailedTurn]


def summarize(
    rows: Iterable[OutcomeRow], settings: Mapping[str, Any], title: str, trial: Mapping[str, Any] | None = None
) -> Report:
    """Add up the rows, read once as a stream; the memory that it takes does not grow with their number.

    Raises:
        InputError: a row is none that `realign` can have written.
    """
    corpus, sources, examples = CorpusNumbers(), dict[str | None, CorpusNumbers](), Examples()
    failed = FailedTurns()
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
        failed.add(outcome)
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
        "sources": [{"source": name, **part.as_json()} for name, part in ordered],
        "prompt_trial": None if trial is None else {key: _plain(trial[key]) for key in ("order", "rule", "prompts")},
        "examples": examples.as_json(),
        "failed_turns": failed.as_json(),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
