"""The numbers of a realigned corpus, or of one of its sources, in memory that does not grow with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, Required, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.display import bounded
from megatron_idft.corpus.lint.thresholds import STANDARD_ERRORS, can_tell
from megatron_idft.corpus.report.numbers import Histogram, TokenEstimates, estimate_json, token_estimates
from megatron_idft.corpus.scores.estimates import ClusterSums, Estimate, EstimateNumbers
from megatron_idft.corpus.scores.summary import PHI_EDGES, RECORD_EDGES
from megatron_idft.hinted_decoding.output.outcomes import CandidateRow, Stage, count_methods, describe_reason
from megatron_idft.hinted_decoding.report.mixing_numbers import MixingNumbers, MixingSummary
from megatron_idft.hinted_decoding.report.outcome import (
    ORIGINAL,
    STAGES,
    STATUSES,
    SUMS,
    VERDICTS,
    Outcome,
    Sums,
    added,
    sums_of,
)

DIFFERENCE_EDGES = 0.0 - RECORD_EDGES[::-1]  # of a turn's mean phi, after less before: -1.5 … 3

# Whose phi is reported. original: all responses of the input. original_changed, new: the turns that were rewritten,
# before and after. output: the responses of the kept records, rewritten or not. rollouts: all of them, right or wrong.
Text = Literal["original", "original_changed", "new", "output", "rollouts"]
TEXTS: tuple[Text, ...] = get_args(Text)
BY_STAGE = tuple(f"new_{stage}" for stage in STAGES)

SPLIT_BINS = 10  # tenths of a candidate in which the splitter can stand
MAX_NAMES = 200
FURTHER_NAMES = "(further)"
OK, FAILED, NOT_CHECKED = "ok", "failed", "not checked"


class NameCount(TypedDict):
    name: str
    count: int


class LengthNumbers(TypedDict, total=False):
    """Lengths in tokens; only `count` where there are none. pN: the N-th percentile."""

    count: Required[int]
    mean: float
    p0: int
    p10: int
    p50: int
    p90: int
    p99: int
    p100: int
    histogram: list[int]


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
    """Counts of turns and candidates; accuracy and shares with standard errors over records; names with counts."""

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


class PairedNumbers(TypedDict):
    """After less before, of the turns that were rewritten."""

    records: int
    turns: int
    phi_mean: EstimateNumbers | None
    log_prob_mean: EstimateNumbers | None
    entropy_mean: EstimateNumbers | None
    phi_below_1: EstimateNumbers | None
    phi_below_3: EstimateNumbers | None
    phi_below_5: EstimateNumbers | None
    phi_std: EstimateNumbers | None
    turns_risen: EstimateNumbers | None
    length_ratio: EstimateNumbers | None


class Part(TypedDict):
    """The numbers of the whole corpus or of one source. Keys of `phi` are TEXTS and BY_STAGE."""

    records: dict[str, int]
    reasons: dict[str, list[NameCount]]
    turns: dict[str, int]
    turn_reasons: list[NameCount]
    failures: dict[Stage, list[NameCount]]
    kept_turns: dict[str, int]
    stages: dict[Stage, StageNumbers]
    phi: dict[str, TokenEstimates]
    paired: PairedNumbers
    turn_histograms: dict[Text, list[int]]
    difference_histogram: list[int]
    token_histograms: dict[Stage, Histogram]
    lengths: dict[Text, LengthNumbers]
    mixing: MixingNumbers
    responses_not_finite: int


class Null(TypedDict):
    """Whether the rollouts are the model's own samples, why, and whether their mean phi is 0 within its error."""

    own_samples: bool
    why: str
    check: str


class CorpusNumbers:
    """Sums and histograms; their size does not depend on the number of records."""

    def __init__(self) -> None:
        self._statuses: Counter[str] = Counter()
        self._reasons = {status: Names() for status in ("dropped", "error")}
        self._turns: Counter[str] = Counter()  # of kept records by stage; dropped: of dropped records
        self._turn_reasons = Names()
        self._failures = {stage: Names() for stage in STAGES}  # of the turns that no stage rewrote
        self._methods: Counter[str] = Counter()  # of the turns of kept records
        self._stages = {stage: StageSummary() for stage in STAGES}
        self._phi: dict[str, ClusterSums] = {text: ClusterSums() for text in (*TEXTS, *BY_STAGE)}
        self._turn_phi = {text: _zeros(RECORD_EDGES) for text in TEXTS}
        self._differences = _zeros(DIFFERENCE_EDGES)
        self._token_phi = {stage: _zeros(PHI_EDGES) for stage in STAGES}
        self._lengths = {text: Lengths() for text in TEXTS}
        self._paired = PairedSums()
        self._mixing = MixingSummary()
        self._not_finite = 0

    def add(self, outcome: Outcome) -> None:
        status = outcome.row["status"]
        self._statuses[status] += 1
        self._not_finite += outcome.not_finite
        if outcome.kept:
            self._methods.update(count_methods(turn.row for turn in outcome.turns))
        if status in self._reasons:
            self._reasons[status].add(describe_reason(outcome.row))
        for turn in outcome.turns:
            self._turns[(turn.stage or "none") if outcome.kept else status] += 1
            if turn.row.get("reason"):
                self._turn_reasons.add(turn.row["reason"])
            for failure in turn.row.get("failures") or ():
                if failure["stage"] in self._failures:
                    self._failures[failure["stage"]].add(failure["reason"])
        for stage, summary in self._stages.items():
            summary.add(outcome, stage)
        for text, responses in _responses(outcome).items():
            self._add_text(text, responses)
        for stage in STAGES:
            self._add_phi(f"new_{stage}", [turn.new for turn in outcome.turns if turn.stage == stage])
        self._add_pairs(outcome)
        self._mixing.add(outcome)
        for turn in outcome.turns:
            if turn.tokens is not None and turn.accepted is not None:
                bins = np.searchsorted(PHI_EDGES, turn.tokens.phi, side="right")
                self._token_phi[turn.accepted["stage"]] += np.bincount(bins, minlength=len(PHI_EDGES) + 1)

    def _add_text(self, text: Text, responses: list[Sums | None]) -> None:
        for sums in self._add_phi(text, responses):
            self._turn_phi[text][_bin(RECORD_EDGES, sums["phi"] / sums["tokens"])] += 1
            self._lengths[text].add(int(sums["tokens"]))

    def _add_phi(self, name: str, responses: list[Sums | None]) -> list[Sums]:
        """Those of the responses that are scored."""
        scored = [sums for sums in responses if sums is not None]
        if scored:
            self._phi[name].add(added(scored))
        return scored

    def _add_pairs(self, outcome: Outcome) -> None:
        pairs = changed_turns(outcome)
        gains = [after["phi"] / after["tokens"] - before["phi"] / before["tokens"] for before, after in pairs]
        if not pairs:
            return
        for gain in gains:
            self._differences[_bin(DIFFERENCE_EDGES, gain)] += 1
        before, after = added(pair[0] for pair in pairs), added(pair[1] for pair in pairs)
        self._paired.add_pair(len(pairs), sum(gain > 0 for gain in gains), before, after)

    @property
    def records(self) -> int:
        return sum(self._statuses.values())

    def rollouts(self) -> ClusterSums:
        return self._phi["rollouts"]

    def as_json(self) -> Part:
        """Plain types without NaN."""
        turns = {stage: self._turns[stage] for stage in (*STAGES, ORIGINAL, "none", "dropped", "error")}
        return {
            "records": {"total": self.records} | {status: self._statuses[status] for status in STATUSES},
            "reasons": {status: names.as_json() for status, names in self._reasons.items()},
            "turns": {"total": sum(turns.values())} | turns,
            "turn_reasons": self._turn_reasons.as_json(),
            "failures": {stage: names.as_json() for stage, names in self._failures.items()},
            "kept_turns": dict(self._methods),
            "stages": {stage: summary.as_json() for stage, summary in self._stages.items()},
            "phi": {text: token_estimates(sums) for text, sums in self._phi.items()},
            "paired": self._paired.as_json(),
            "turn_histograms": {text: counts.tolist() for text, counts in self._turn_phi.items()},
            "difference_histogram": self._differences.tolist(),
            "token_histograms": {
                stage: {"tokens": int(counts.sum()), "counts": counts.tolist()}
                for stage, counts in self._token_phi.items()
            },
            "lengths": {text: lengths.as_json() for text, lengths in self._lengths.items()},
            "mixing": self._mixing.as_json(),
            "responses_not_finite": self._not_finite,
        }


def changed_turns(outcome: Outcome) -> list[tuple[Sums, Sums]]:
    """Before and after of each rewritten turn whose two sides were both scored."""
    return [(turn.original, turn.new) for turn in outcome.turns if turn.original is not None and turn.new is not None]


def _responses(outcome: Outcome) -> dict[Text, list[Sums | None]]:
    """The sums of each response, by the text that it belongs to; None where it is not scored."""
    turns = outcome.turns
    rewritten = [turn for turn in turns if turn.new is not None]
    kept = [turn.original if turn.stage == ORIGINAL else turn.new for turn in turns] if outcome.kept else []
    rollouts = [sums_of(c) for turn in turns for c in turn.candidates if c["stage"] == "rollout"]
    return {
        "original": [turn.original for turn in turns],
        "original_changed": [turn.original for turn in rewritten],
        "new": [turn.new for turn in rewritten],
        "output": kept,
        "rollouts": rollouts,
    }


def _zeros(edges: NDArray[np.floating]) -> NDArray[np.int64]:
    return np.zeros(len(edges) + 1, dtype=np.int64)


def _bin(edges: NDArray[np.floating], value: float) -> int:
    return int(np.searchsorted(edges, value, side="right"))


class StageSums(ClusterSums):
    """Counts of one record at one stage. Turns are those with a try, or with a right or an accepted one."""

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

    def _candidate(self, candidate: CandidateRow, counts: dict[str, float], accepted: bool) -> None:
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


class PairedSums(ClusterSums):
    """Turns that changed, those of them whose mean phi rose, and the sums of both sides."""

    fields = ("turns", "rose", *(f"before_{field}" for field in SUMS), *(f"after_{field}" for field in SUMS))

    def add_pair(self, turns: int, rose: int, before: Sums, after: Sums) -> None:
        """The changed turns of one record."""
        contribution = {"turns": float(turns), "rose": float(rose)}
        contribution |= {f"before_{field}": value for field, value in before.items()}
        contribution |= {f"after_{field}": value for field, value in after.items()}
        self.add(contribution)

    def difference(self, field: str) -> Estimate | None:
        """Mean per token after, less that before."""
        if not self["before_tokens"] or not self["after_tokens"]:
            return None
        value = 0.0
        slope: dict[str, float] = {}
        for side, sign in (("after", 1), ("before", -1)):
            tokens = self[f"{side}_tokens"]
            mean = self[f"{side}_{field}"] / tokens
            value += sign * mean
            slope |= {f"{side}_{field}": sign / tokens, f"{side}_tokens": -sign * mean / tokens}
        return self.estimate(value, slope)

    def spread_difference(self) -> Estimate | None:
        """Standard deviation of phi over tokens after, less that before."""
        if not self["before_tokens"] or not self["after_tokens"]:
            return None
        value = 0.0
        slope: dict[str, float] = {}
        for side, sign in (("after", 1), ("before", -1)):
            tokens = self[f"{side}_tokens"]
            mean = self[f"{side}_phi"] / tokens
            variance = max(0.0, self[f"{side}_phi_squared"] / tokens - mean**2)
            std = math.sqrt(variance)
            value += sign * std
            if std > 1e-12:
                scale = sign / (2 * std * tokens)
                slope |= {f"{side}_phi_squared": scale, f"{side}_phi": -2 * mean * scale}
                slope[f"{side}_tokens"] = (mean**2 - variance) * scale
        return self.estimate(value, slope)

    def as_json(self) -> PairedNumbers:
        return {
            "records": self.records,
            "turns": int(self["turns"]),
            "phi_mean": estimate_json(self.difference("phi")),
            "log_prob_mean": estimate_json(self.difference("log_prob")),
            "entropy_mean": estimate_json(self.difference("entropy")),
            "phi_below_1": estimate_json(self.difference("below_1")),
            "phi_below_3": estimate_json(self.difference("below_3")),
            "phi_below_5": estimate_json(self.difference("below_5")),
            "phi_std": estimate_json(self.spread_difference()),
            "turns_risen": estimate_json(self.ratio("rose", "turns")),
            "length_ratio": estimate_json(self.ratio("after_tokens", "before_tokens")),
        }


class Names:
    """How often each name came: reasons, finish reasons, phrases. From the 201st on, new names count as one."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, name: str | None) -> None:
        name = bounded(name) if name else "(none given)"
        if name not in self._counts and len(self._counts) >= MAX_NAMES:
            name = FURTHER_NAMES
        self._counts[name] += 1

    def as_json(self) -> list[NameCount]:
        """The most frequent first."""
        return [
            {"name": name, "count": count}
            for name, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        ]


class Lengths:
    """Lengths in tokens. There are no more different ones than the context is long, so percentiles are exact."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        self._counts[length] += 1

    def as_json(self) -> LengthNumbers:
        """Percentiles are the next length from below, never one that did not occur.

        Bin b of the histogram counts the lengths from 2^(b/2) to below 2^((b+1)/2); lengths of 0 are in bin 0.
        """
        if not self._counts:
            return {"count": 0}
        lengths = np.array(sorted(self._counts))
        counts = np.array([self._counts[int(length)] for length in lengths])
        total, reached = int(counts.sum()), np.cumsum(counts)
        ranks = [max(1, -(-percent * total // 100)) for percent in (0, 10, 50, 90, 99, 100)]
        at = lengths[np.searchsorted(reached, ranks)].tolist()
        bins = np.floor(2 * np.log2(np.maximum(1, lengths)) + 1e-9).astype(np.int64)
        return {
            "count": total,
            "mean": float(lengths @ counts / total),
            "p0": at[0],
            "p10": at[1],
            "p50": at[2],
            "p90": at[3],
            "p99": at[4],
            "p100": at[5],
            "histogram": np.bincount(bins, weights=counts).astype(np.int64).tolist(),
        }


def judge_null(settings: Mapping[str, Any], rollouts: ClusterSums) -> Null:
    sampling = settings.get("rollouts")
    if not isinstance(sampling, Mapping):
        return _theory("there were no rollouts")
    for key, plain in (("temperature", 1), ("top_p", 1), ("top_k", 0)):
        if key not in sampling:
            return _theory(f"the settings do not say with which {key} the rollouts were sampled")
        value = sampling[key]
        # No top-k is written as 0 or as nothing.
        if value != plain and not (key == "top_k" and value is None):
            return _theory(f"the rollouts were sampled with {key} {value}, so they are not draws from the model itself")
    mean = rollouts.ratio("phi")
    if mean is None:
        return _theory("no rollout was scored")
    check = NOT_CHECKED
    if can_tell(rollouts.records, mean):
        check = FAILED if Estimate(abs(mean.value), mean.se).exceeds(0, STANDARD_ERRORS) else OK
    return {
        "own_samples": True,
        "why": "all rollouts, right or wrong, at temperature 1 with nothing cut",
        "check": check,
    }


def _theory(why: str) -> Null:
    return {"own_samples": False, "why": why, "check": NOT_CHECKED}
