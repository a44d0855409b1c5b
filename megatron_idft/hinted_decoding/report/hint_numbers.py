"""The hints of one stage: how many were given, and who closed their analyses."""

from __future__ import annotations

from collections import Counter
from typing import TypedDict

from megatron_idft.hinted_decoding.output.outcomes import NO_MARKER
from megatron_idft.hinted_decoding.report.outcome import Outcome


class HintNumbers(TypedDict):
    """Counts of turns.

    Attributes:
        given: turns with a hinted prompt; the others have none, for the reasons among the failures.
        analyses: with an analysis, by the model or from a file.
        marker_of_model, marker_appended: who wrote the marker of it; neither: nobody did, and there was no hint.
    """

    turns: int
    given: int
    analyses: int
    marker_of_model: int
    marker_appended: int


class HintSummary:
    """The hints of one stage."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, outcome: Outcome, stage: str) -> None:
        for turn in outcome.turns:
            for hint in turn.row.get("hints") or ():
                if hint["stage"] != stage:
                    continue
                marker, failure = hint.get("marker"), hint.get("failure")
                self._counts["turns"] += 1
                self._counts["given"] += hint.get("num_prompt_tokens") is not None
                asked = hint.get("analysis_tokens") is not None or marker is not None
                self._counts["analyses"] += asked or failure == NO_MARKER
                self._counts[f"marker_{marker}"] += marker is not None

    def as_json(self) -> HintNumbers:
        counts = self._counts
        return {
            "turns": counts["turns"],
            "given": counts["given"],
            "analyses": counts["analyses"],
            "marker_of_model": counts["marker_model"],
            "marker_appended": counts["marker_appended"],
        }
