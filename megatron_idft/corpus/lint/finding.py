"""The result of a check of the linter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_idft.corpus.scores.estimates import Estimate

OK, LOOK, PROBLEM, NOT_CHECKED = "ok", "look", "problem", "not checked"


@dataclass(frozen=True)
class Finding:
    """One verdict, `OK` to `NOT_CHECKED`. `result` says in a sentence what was found; `value` are its numbers."""

    check: str
    verdict: str
    result: str
    value: dict[str, Any]
    threshold: str
    source_of_threshold: str
    what_it_means: str
    what_it_does_not_prove: str
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def said(estimate: Estimate | None) -> str:
    """An estimate in words: '-0.123 ± 0.004'."""
    if estimate is None:
        return "unknown"
    return f"{estimate.value:+.3f}" + ("" if estimate.se is None else f" ± {estimate.se:.3f}")
