"""The report on scored corpora: one self-contained HTML page, and a JSON with the same numbers.

    builder = ReportBuilder("My corpora")
    builder.add_null("base", 1.0, own_rows)
    builder.add_corpus("train.jsonl", "base", rows)
    builder.build().save(Path("report"))

The rows come from `scored_folder.read_scored`; each corpus is read once, as a stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from megatron_idft.corpus.lint.finding import Finding
from megatron_idft.corpus.lint.linter import ROW_TESTS, lint, lint_null
from megatron_idft.corpus.report import figures
from megatron_idft.corpus.report.html import render
from megatron_idft.corpus.report.numbers import (
    CorpusNumbers,
    PartNumbers,
    ReportNumbers,
    SourceNumbers,
    estimate_json,
    save_report,
    token_estimates,
)
from megatron_idft.corpus.scores.record_table import paired_differences
from megatron_idft.corpus.scores.rows import ScoredRow
from megatron_idft.corpus.scores.summary import PHI_EDGES, RECORD_EDGES, CorpusSummary, SourceSummary
from megatron_idft.errors import InputError

VERSION = 1  # of the JSON
KEEP_RECORDS = 8
_LENGTH_PERCENTILES = (0, 10, 50, 90, 99, 100)


class Report:
    """The numbers of a report, and the page that shows them."""

    def __init__(self, data: ReportNumbers):
        self._data = data

    def to_json(self) -> ReportNumbers:
        """All numbers of the page, as plain types without NaN; `json.dumps` takes it as it is."""
        return self._data

    def to_html(self) -> str:
        """One page without scripts that loads nothing. Needs matplotlib."""
        return render("megatron_idft.corpus.report", "corpus_report.html", data=self._data, figures=figures)

    def findings(self) -> list[dict[str, Any]]:
        """The linter's findings on all corpora and own samples, in the order of the page."""
        return [finding for part in (*self._data["corpora"], *self._data["nulls"]) for finding in part["findings"]]

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write report.html and report.json; each appears complete or not at all. Returns their paths."""
        return save_report(folder, self.to_html(), self._data)


class ReportBuilder:
    """Collects corpora and own samples, in the order in which the page shows them.

    Args:
        title: of the page.
        keep: how many least and how many most in-distribution records each corpus shows.
    """

    def __init__(self, title: str, *, keep: int = KEEP_RECORDS):
        if keep < 0:
            raise InputError(f"keep is {keep}; it should be 0 or more records")
        self.title, self.keep = title, keep
        self._corpora: list[CorpusSummary] = []
        self._nulls: dict[tuple[str, float], CorpusSummary] = {}

    def add_corpus(self, name: str, model: str, rows: Iterable[ScoredRow]) -> None:
        """Read a scored corpus to its end. The same name under two models gives paired differences by record id.

        Raises:
            InputError: `score` did not write these rows, or this pair of name and model is there already.
        """
        if any((corpus.name, corpus.model) == (name, model) for corpus in self._corpora):
            raise InputError(f"corpus {name!r} scored by {model!r} was added twice; give one of them another name")
        self._corpora.append(_read(CorpusSummary(name, model, keep=self.keep, tests=ROW_TESTS), rows))

    def add_null(self, model: str, temperature: float, rows: Iterable[ScoredRow]) -> None:
        """Read responses that `model` sampled itself, scored like a corpus. Corpora are judged against temperature 1.

        Raises:
            InputError: as in `add_corpus`, or the temperature is not above 0.
        """
        if not temperature > 0:
            raise InputError(f"own samples at temperature {temperature:g}: it should be above 0")
        if (model, temperature) in self._nulls:
            raise InputError(f"own samples of {model!r} at temperature {temperature:g} were added twice")
        self._nulls[model, temperature] = _read(CorpusSummary(f"own samples, T = {temperature:g}", model), rows)

    def build(self) -> Report:
        """The report on what was added so far.

        Raises:
            InputError: nothing was added.
        """
        if not self._corpora and not self._nulls:
            raise InputError("nothing to report on: add a scored corpus or own samples first")
        return Report(
            {
                "version": VERSION,
                "title": self.title,
                "phi_edges": PHI_EDGES.tolist(),
                "record_edges": [round(float(edge), 2) for edge in RECORD_EDGES],
                "corpora": [self._corpus(corpus) for corpus in self._corpora],
                "nulls": [
                    {**_numbers(null, lint_null(null, temperature)), "temperature": temperature}
                    for (_, temperature), null in self._nulls.items()
                ],
                "paired": [
                    {"name": a.name, "before": a.model, "after": b.model, **paired_differences(a.table, b.table)}
                    for a, b in combinations(self._corpora, 2)
                    if a.name == b.name
                ],
            }
        )

    def _corpus(self, corpus: CorpusSummary) -> CorpusNumbers:
        sources = sorted(corpus.sources.items(), key=lambda item: (-item[1].sums["tokens"], str(item[0])))
        return {
            **_numbers(corpus, lint(corpus, self._nulls.get((corpus.model, 1.0)))),
            "sources": [_source(name, source) for name, source in sources],
            "least": corpus.least(),
            "most": corpus.most(),
            "worst_tokens": corpus.worst_tokens(),
            "recurring_tokens": corpus.recurring_tokens(),
        }


def _read(summary: CorpusSummary, rows: Iterable[ScoredRow]) -> CorpusSummary:
    for row in rows:
        summary.add(row)
    return summary


def _numbers(summary: CorpusSummary, findings: list[Finding]) -> PartNumbers:
    total, lengths = summary.total(), summary.table.lengths()
    shares = {name: tally.count / summary.records for name, tally in summary.tallies.items() if summary.records}
    listed = total["listed_tokens"]
    return {
        "name": summary.name,
        "model": summary.model,
        "findings": [finding.as_json() for finding in findings],
        "summary": token_estimates(total),
        "first_against_rest": estimate_json(total.first_against_rest()),
        "end_of_turn_phi": estimate_json(total.ratio("end_phi", "end_tokens")),
        "lengths": {
            f"p{p}": float(value)
            for p, value in zip(_LENGTH_PERCENTILES, np.percentile(lengths, _LENGTH_PERCENTILES), strict=True)
        }
        if len(lengths)
        else {},
        "shares": shares,
        "records_not_finite": summary.not_finite.count,
        "histogram": {"tokens": int(listed), "counts": summary.histogram().tolist()},
        "record_histogram": summary.record_histogram.tolist(),
        "cumulative": summary.curves.as_json(),
    }


def _source(name: str | None, source: SourceSummary) -> SourceNumbers:
    counts = source.histogram.tolist()
    return {
        "source": name,
        "summary": token_estimates(source.sums),
        "histogram": {"tokens": sum(counts), "counts": counts},
    }
