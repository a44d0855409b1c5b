"""Numbers of a report as plain types, and the two files of a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_idft.corpus.scores.estimates import ClusterSums, Estimate, EstimateNumbers
from megatron_idft.files import write_atomically

_MEANS = {
    "phi_mean": "phi",
    "phi_below_1": "below_1",
    "phi_below_3": "below_3",
    "phi_below_5": "below_5",
    "log_prob_mean": "log_prob",
    "entropy_mean": "entropy",
}


def token_estimates(sums: ClusterSums) -> dict[str, Any]:
    """records, tokens, and means and spread over tokens, each as {"value", "se"}; null where there are no tokens."""
    data: dict[str, Any] = {"records": sums.records, "tokens": int(sums["tokens"])}
    data |= {key: estimate_json(sums.ratio(field)) for key, field in _MEANS.items()}
    data["phi_std"] = estimate_json(sums.std())
    return data


def estimate_json(estimate: Estimate | None) -> EstimateNumbers | None:
    """{"value", "se"}; null where there is none."""
    return None if estimate is None else estimate.as_json()


def save_report(folder: Path, html: str, data: dict[str, Any]) -> tuple[Path, Path]:
    """Write report.html and report.json; each appears complete or not at all. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, indent=1)
    page, numbers = folder / "report.html", folder / "report.json"
    write_atomically(page, html)
    write_atomically(numbers, text + "\n")
    return page, numbers
