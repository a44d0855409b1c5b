"""The numbers of a realigned corpus, or of one of its sources, in memory that does not grow with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.lint.thresholds import STANDARD_ERRORS, can_tell
from megatron_idft.corpus.report.numbers import Histogram, TokenEstimates, token_estimates
from megatron_idft.corpus.scores.estimates import ClusterSums, Estimate
from megatron_idft.corpus.scores.summary import PHI_EDGES, RECORD_EDGES
from megatron_idft.hinted_decoding.output.outcomes import Stage, count_methods, describe_reason
from megatron_idft.hinted_decoding.report.hint_numbers import HintNumbers, HintSummary
from megatron_idft.hinted_decoding.report.mixing_numbers import MixingNumbers, MixingSummary
from megatron_idft.hinted_decoding.report.outcome import (
    ORIGINAL,
    STAGES,
    STATUSES,
    Outcome,
    Sums,
    added,
    sums_of,
)
from megatron_idft.hinted_decoding.report.paired_numbers import PairedNumbers, PairedSums
from megatron_idft.hinted_decoding.report.stage_numbers import StageNumbers, StageSummary
from megatron_idft.hinted_decoding.report.tallies import LengthNumbers, Lengths, NameCount, Names

DIFFERENCE_EDGES = 0.0 - RECORD_EDGES[::-1]  # of a turn's mean phi, after less before: -1.5 … 3

# Whose phi is reported. original: all responses of the input. original_changed, new: the turns that were rewritten,
# before and after. output: the responses of the kept records, rewritten or not. rollouts: all of them, right or wrong.
Text = Literal["original", "original_changed", "new", "output", "rollouts"]
TEXTS: tuple[Text, ...] = get_args(Text)
HINTED: tuple[Stage, ...] = ("hinted", "second_hint")  # stages with a hint of their own
BY_STAGE = tuple(f"new_{stage}" for stage in STAGES)

OK, FAILED, NOT_CHECKED = "ok", "failed", "not checked"


class Part(TypedDict):
    """The numbers of the whole corpus or of one source. Keys of `phi` are TEXTS and BY_STAGE."""

    records: dict[str, int]
    reasons: dict[str, list[NameCount]]
    turns: dict[str, int]
    turn_reasons: list[NameCount]
    failures: dict[Stage, list[NameCount]]
    kept_turns: dict[str, int]
    stages: dict[Stage, StageNumbers]
    hints: dict[Stage, HintNumbers]
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
        self._hints = {stage: HintSummary() for stage in HINTED}
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
        for stage, hints in self._hints.items():
            hints.add(outcome, stage)
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
            "hints": {stage: hints.as_json() for stage, hints in self._hints.items()},
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
