"""The candidates of one stage: verdicts, fates, and where their splitter stood."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from megatron_idft.corpus.report.numbers import estimate_json
from megatron_idft.corpus.scores.estimates import ClusterSums, EstimateNumbers
from megatron_idft.hinted_decoding.output.outcomes import CandidateRow
from megatron_idft.hinted_decoding.report.outcome import VERDICTS, Outcome
from megatron_idft.hinted_decoding.report.tallies import LengthNumbers, Lengths, NameCount, Names

SPLIT_BINS = 10  # tenths of a candidate in which the splitter can stand


class SplitterNumbers(TypedDict):
    """Where the splitter stood in the candidates that wrote it.

    Attributes:
        places: by tenth of the candidate.
    """

    never: int
    places: list[int]
    tokens_before: LengthNumbers
    tokens_behind: LengthNumbers


class StageNumbers(TypedDict):
    """Counts of turns and candidates; accuracy and shares with standard errors over records; names with counts.

    Attributes:
        more_room: candidates that the length limit had cut, decoded once more with more room.
        more_room_finished: those of them that ended by themselves then.
    """

    turns: int
    turns_right: int
    turns_accepted: int
    candidates: int
    right: int
    wrong: int
    unknown: int
    not_compared: int
    compared: int
    decided: int
    leak: int
    unfinished: int
    more_room: int
    more_room_finished: int
    accepted: int
    records: int
    accuracy: EstimateNumbers | None
    accuracy_of_decided: EstimateNumbers | None
    turns_right_share: EstimateNumbers | None
    turns_accepted_share: EstimateNumbers | None
    accepted_share: EstimateNumbers | None
    finish_reasons: list[NameCount]
    finish_reasons_of_accepted: list[NameCount]
    rejected_because: list[NameCount]
    verified_by: list[NameCount]
    leaks: list[NameCount]
    splitter: SplitterNumbers


class StageSums(ClusterSums):
    """Counts of one record at one stage. Turns are those with a try, or with a right or an accepted one."""

    fields = (
        "turns", "turns_right", "turns_accepted", "candidates", *VERDICTS, "not_compared", "compared", "decided",
        "leak", "unfinished", "more_room", "more_room_finished", "accepted",
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

    def _candidate(self, candidate: CandidateRow, counts: dict[str, float], accepted: bool) -> None:
        verdict = candidate.get("verdict")
        counts["candidates"] += 1
        counts[verdict or "not_compared"] += 1
        counts["compared"] += verdict is not None
        counts["decided"] += verdict in ("right", "wrong")
        counts["leak"] += bool(candidate.get("leak"))
        unfinished = candidate.get("finish_reason") != "eos"
        counts["unfinished"] += unfinished
        counts["more_room"] += bool(candidate.get("more_room"))
        counts["more_room_finished"] += bool(candidate.get("more_room")) and not unfinished
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

    def as_json(self) -> StageNumbers:
        sums = self._sums
        return {
            "turns": int(sums["turns"]),
            "turns_right": int(sums["turns_right"]),
            "turns_accepted": int(sums["turns_accepted"]),
            "candidates": int(sums["candidates"]),
            "right": int(sums["right"]),
            "wrong": int(sums["wrong"]),
            "unknown": int(sums["unknown"]),
            "not_compared": int(sums["not_compared"]),
            "compared": int(sums["compared"]),
            "decided": int(sums["decided"]),
            "leak": int(sums["leak"]),
            "unfinished": int(sums["unfinished"]),
            "more_room": int(sums["more_room"]),
            "more_room_finished": int(sums["more_room_finished"]),
            "accepted": int(sums["accepted"]),
            "records": sums.records,
            "accuracy": estimate_json(sums.ratio("right", "compared")),
            "accuracy_of_decided": estimate_json(sums.ratio("right", "decided")),
            "turns_right_share": estimate_json(sums.ratio("turns_right", "turns")),
            "turns_accepted_share": estimate_json(sums.ratio("turns_accepted", "turns")),
            "accepted_share": estimate_json(sums.ratio("accepted", "candidates")),
            "finish_reasons": self._finish.as_json(),
            "finish_reasons_of_accepted": self._finish_accepted.as_json(),
            "rejected_because": self._rejected.as_json(),
            "verified_by": self._verified_by.as_json(),
            "leaks": self._leaks.as_json(),
            "splitter": {
                "never": self._never_split,
                "places": self._split_places.tolist(),
                "tokens_before": self._before_split.as_json(),
                "tokens_behind": self._behind_split.as_json(),
            },
        }
