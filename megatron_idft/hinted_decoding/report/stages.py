"""What each stage tried and what became of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_idft.corpus.report.numbers import estimate_json
from megatron_idft.corpus.scores.estimates import ClusterSums
from megatron_idft.hinted_decoding.report.counts import Lengths, Names
from megatron_idft.hinted_decoding.report.outcome import VERDICTS, Outcome, Row

SPLIT_BINS = 10


class StageSums(ClusterSums):
    """turns: with at least one try at this stage; turns_right: with at least one right. compared: with a verdict."""

    fields = (
        "turns", "turns_right", "turns_accepted", "candidates", *VERDICTS, "not_compared", "compared", "decided",
        "leak", "unfinished", "accepted",
    )  # fmt: skip


class StageSummary:
    """The candidates of one stage; accepted are those whose record was kept."""

    def __init__(self) -> None:
        self._sums = StageSums()
        self._finish, self._finish_accepted, self._rejected = Names(), Names(), Names()
        self._verified_by, self._leaks = Names(), Names()
        self._never_split = 0
        self._split_places = np.zeros(SPLIT_BINS, dtype=np.int64)
        self._before_split, self._behind_split = Lengths(), Lengths()

    def add(self, outcome: Outcome, stage: str) -> None:
        counts = dict.fromkeys(StageSums.fields, 0.0)
        for turn in outcome.turns:
            tried = [candidate for candidate in turn.candidates if candidate["stage"] == stage]
            for candidate in tried:
                self._candidate(candidate, counts, candidate is turn.accepted)
            counts["turns"] += bool(tried)
            counts["turns_right"] += any(candidate.get("verdict") == "right" for candidate in tried)
            counts["turns_accepted"] += turn.accepted is not None and turn.stage == stage
        if counts["turns"]:
            self._sums.add(counts)

    def _candidate(self, candidate: Row, counts: dict[str, float], accepted: bool) -> None:
        verdict = candidate.get("verdict")
        counts["candidates"] += 1
        counts[verdict or "not_compared"] += 1
        counts["compared"] += verdict is not None
        counts["decided"] += verdict in ("right", "wrong")
        counts["leak"] += bool(candidate.get("leak"))
        counts["unfinished"] += candidate.get("finish_reason") != "eos"
        counts["accepted"] += accepted
        self._finish.add(candidate.get("finish_reason"))
        if accepted:
            self._finish_accepted.add(candidate.get("finish_reason"))
        if candidate.get("rejected_because"):
            self._rejected.add(candidate["rejected_because"])
        if candidate.get("verified_by"):
            self._verified_by.add(candidate["verified_by"])
        if candidate.get("leak"):
            self._leaks.add(candidate["leak"])
        self._split(candidate.get("split_at"), candidate.get("num_tokens") or 0)

    def _split(self, split_at: int | None, tokens: int) -> None:
        if split_at is None or not tokens:
            self._never_split += 1
            return
        self._split_places[min(SPLIT_BINS - 1, split_at * SPLIT_BINS // tokens)] += 1
        self._before_split.add(split_at)
        self._behind_split.add(tokens - split_at)

    def as_json(self) -> dict[str, Any]:
        """Counts; accuracy and shares with standard errors over records; names with counts; where the splitter fell."""
        data: dict[str, Any] = {field: int(self._sums[field]) for field in StageSums.fields}
        data["records"] = self._sums.records
        data["accuracy"] = estimate_json(self._sums.ratio("right", "compared"))
        data["accuracy_of_decided"] = estimate_json(self._sums.ratio("right", "decided"))
        data["turns_right_share"] = estimate_json(self._sums.ratio("turns_right", "turns"))
        data["turns_accepted_share"] = estimate_json(self._sums.ratio("turns_accepted", "turns"))
        data["accepted_share"] = estimate_json(self._sums.ratio("accepted", "candidates"))
        data["finish_reasons"] = self._finish.as_json()
        data["finish_reasons_of_accepted"] = self._finish_accepted.as_json()
        data["rejected_because"] = self._rejected.as_json()
        data["verified_by"], data["leaks"] = self._verified_by.as_json(), self._leaks.as_json()
        data["splitter"] = {
            "never": self._never_split,
            "places": self._split_places.tolist(),
            "tokens_before": self._before_split.as_json(),
            "tokens_behind": self._behind_split.as_json(),
        }
        return data
