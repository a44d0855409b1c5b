"""Numbers of a report as plain types, and the two files of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from megatron_idft.corpus.scores.display import ShownRecord, ShownToken
from megatron_idft.corpus.scores.estimates import ClusterSums, Estimate, EstimateNumbers
from megatron_idft.corpus.scores.record_table import PairedDifferences
from megatron_idft.corpus.scores.summary import CurveNumbers, RecurringToken
from megatron_idft.files import write_atomically


class TokenEstimates(TypedDict):
    """Means and spread over tokens; null where there are no tokens."""

    records: int
    tokens: int
    phi_mean: EstimateNumbers | None
    phi_below_1: EstimateNumbers | None
    phi_below_3: EstimateNumbers | None
    phi_below_5: EstimateNumbers | None
    log_prob_mean: EstimateNumbers | None
    entropy_mean: EstimateNumbers | None
    phi_std: EstimateNumbers | None


class Histogram(TypedDict):
    """Counts of tokens by bin; the first and the last bin are open."""

    tokens: int
    counts: list[int]


class SourceNumbers(TypedDict):
    """One source of a corpus."""

    source: str | None
    summary: TokenEstimates
    histogram: Histogram


class PartNumbers(TypedDict):
    """The numbers of any text: a corpus, or own samples."""

    name: str
    model: str
    findings: list[dict[str, Any]]
    summary: TokenEstimates
    first_against_rest: EstimateNumbers | None
    end_of_turn_phi: EstimateNumbers | None
    lengths: dict[str, float]
    shares: dict[str, float]
    records_not_finite: int
    histogram: Histogram
    record_histogram: list[int]
    cumulative: CurveNumbers


class CorpusNumbers(PartNumbers):
    """A corpus, with the records and tokens that the page shows."""

    sources: list[SourceNumbers]
    least: list[ShownRecord]
    most: list[ShownRecord]
    worst_tokens: list[ShownToken]
    recurring_tokens: list[RecurringToken]


class NullNumbers(PartNumbers):
    """A model's own samples at a temperature."""

    temperature: float


class Pair(PairedDifferences):
    """A corpus under two models."""

    name: str
    before: str
    after: str


class ReportNumbers(TypedDict):
    """A report's JSON; the page shows nothing else."""

    version: int
    title: str
    phi_edges: list[float]
    record_edges: list[float]
    corpora: list[CorpusNumbers]
    nulls: list[NullNumbers]
    paired: list[Pair]


def token_estimates(sums: ClusterSums) -> TokenEstimates:
    """The estimates that follow from the sums of some records."""
    return {
        "records": sums.records,
        "tokens": int(sums["tokens"]),
        "phi_mean": estimate_json(sums.ratio("phi")),
        "phi_below_1": estimate_json(sums.ratio("below_1")),
        "phi_below_3": estimate_json(sums.ratio("below_3")),
        "phi_below_5": estimate_json(sums.ratio("below_5")),
        "log_prob_mean": estimate_json(sums.ratio("log_prob")),
        "entropy_mean": estimate_json(sums.ratio("entropy")),
        "phi_std": estimate_json(sums.std()),
    }


def estimate_json(estimate: Estimate | None) -> EstimateNumbers | None:
    """{"value", "se"}; null where there is none."""
    return None if estimate is None else estimate.as_json()


def save_report(folder: Path, html: str, data: Mapping[str, object]) -> tuple[Path, Path]:
    """Write report.html and report.json; each appears complete or not at all. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, indent=1)
    page, numbers = folder / "report.html", folder / "report.json"
    write_atomically(page, html)
    write_atomically(numbers, text + "\n")
    return page, numbers
