"""What the paper claims, as differences that the study measures; what we expected of each stands in PREDICTIONS.md."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from curves import Curve
from estimates import Estimate, Place, at_equal, bootstrap, paired_difference, place_of, value_at

Runs = Mapping[str, Mapping[int, Curve]]  # arm -> seed -> curve, at its chosen learning rate
At = Literal["end", "equal KL", "equal accuracy"]
REACHED = 0.9  # of the distance or accuracy that every compared run reaches at least
NEAR = 0.03  # a difference of less than this counts as none, where the paper claims that there is none
Range = tuple[float, float]


class Claim(NamedTuple):
    """A difference between two arms.

    Attributes:
        text: what the paper, or the work on a rival, says.
        paper: the sign of the difference by it; 0: none.
        measure: of curves.MEASURES, or `kl`.
        arm, other: what is subtracted from what.
        at: each at the end of its training; both where they are as far from the base model (KL of chat samples); or
            both where they have learned as much, for `kl` and `retention`. In the latter two `sft` is the fair rival,
            with the learning rate at which it ends as near to the base model as `idft` on the same corpus.
        minus: another pair whose difference is subtracted.
    """

    id: str
    text: str
    paper: int
    measure: str
    arm: str
    other: str
    at: At = "end"
    minus: tuple[str, str] | None = None

    @property
    def arms(self) -> list[str]:
        return [self.arm, self.other, *(self.minus or ())]


CLAIMS = (
    Claim("P1", "IDFT learns the task better than SFT", 1, "target", "idft", "sft"),
    Claim("P2", "IDFT generalises better than SFT: harder problems", 1, "harder", "idft", "sft"),
    Claim("P3", "IDFT forgets less than SFT", 1, "retention", "idft", "sft"),
    Claim("P4", "the same at equal KL from the base: the fair rival", 1, "target", "idft", "sft", "equal KL"),
    Claim("P5", "and at equal accuracy IDFT is nearer to the base", -1, "kl", "idft", "sft", "equal accuracy"),
    Claim("P6", "IDFT is better than DFT", 1, "target", "idft", "dft"),
    Claim("P7", "PriFT's fixed weights are better than DFT's", 1, "target", "prift", "dft"),
    Claim("P8", "ASFT's anchor keeps more than DFT", 1, "retention", "asft", "dft"),
    Claim("P9", "a realigned corpus teaches more than the original", 1, "target", "sft-realigned", "sft"),
    Claim("P10", "and it keeps more", 1, "retention", "sft-realigned", "sft"),
    Claim("P11", "both together are best: beside IDFT alone", 1, "target", "idft-realigned", "idft"),
    Claim("P12", "on a realigned corpus IDFT and SFT are equal", 0, "target", "idft-realigned", "sft-realigned"),
    Claim("P13", "phi near 0 predicts little forgetting: KL of the realigned", -1, "kl", "sft-realigned", "sft"),
    Claim("P14", "and of the model's own answers", -1, "kl", "sft-own", "sft"),
    Claim("P15", "IDFT suffers less from wrong steps", 1, "target", "idft-noisy", "sft-noisy", minus=("idft", "sft")),
    Claim("P16", "own verified answers teach as much as IDFT and keep more", 1, "retention", "sft-own", "idft"),
    Claim("P17", "IDFT with a floor learns what IDFT leaves out", 1, "target", "idft_floor", "idft"),
    Claim("P18", "and is better than SFT at equal KL", 1, "target", "idft_floor", "sft", "equal KL"),
    Claim("P19", "IDFT that always learns to end is better", 1, "target", "idft_ends", "idft"),
    Claim("P20", "EAFT keeps more than SFT", 1, "retention", "entropy", "sft"),
    Claim("P21", "IDFT surpasses DPO", 1, "target", "idft", "dpo"),
    Claim("P22", "and SimPO", 1, "target", "idft", "simpo"),
    Claim("P23", "answer-conditioned self-distillation keeps more", 1, "retention", "sft-distilled", "sft"),
    Claim("P24", "weights of the base model are better for IDFT", 1, "target", "idft_reference", "idft"),
    Claim("P25", "mixed streams are better than the hinted one alone", 1, "target", "sft-realigned", "sft-distilled"),
    Claim("P26", "IDFT on a realigned corpus beats the fair rival", 1, "target", "idft-realigned", "sft", "equal KL"),
    Claim("P27", "and SFT on the same", 0, "target", "idft-realigned", "sft-realigned", "equal KL"),
    Claim("P28", "and IDFT on the original", 1, "target", "idft-realigned", "idft", "equal KL"),
    Claim("P29", "SFT on a realigned corpus beats the fair rival", 1, "target", "sft-realigned", "sft", "equal KL"),
    Claim("P30", "self-distillation beats it too", 1, "target", "sft-distilled", "sft", "equal KL"),
)  # fmt: skip


# Looked for once the results were known, and predicted by nobody. `paper` is what on-policy data is said to do.
SEEN_LATER = (
    Claim("L1", "own verified answers teach more than IDFT", 1, "target", "sft-own", "idft", "equal KL"),
    Claim("L2", "and than SFT at the fair rate", 1, "target", "sft-own", "sft", "equal KL"),
    Claim("L3", "and than IDFT with a floor", 1, "target", "sft-own", "idft_floor", "equal KL"),
    Claim("L4", "and than IDFT on the realigned corpus", 1, "target", "sft-own", "idft-realigned", "equal KL"),
)


class Prediction(NamedTuple):
    """What was expected of a claim, in the unit of its measure, and why."""

    expected: Range
    why: str


def predictions(path: Path) -> dict[str, Prediction]:
    """The rows `| P1 | … | low to high | why |` of PREDICTIONS.md."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not re.fullmatch(r"P\d+", cells[0]):
            continue
        numbers = re.fullmatch(r"([+-]?\d*\.?\d+) to ([+-]?\d*\.?\d+)", cells[-2].replace("−", "-"))
        if numbers is None:
            raise SystemExit(f"{path}, {cells[0]}: {cells[-2]!r} is no `LOW to HIGH`")
        found[cells[0]] = Prediction((float(numbers[1]), float(numbers[2])), cells[-1])
    return found


def common_seeds(claim: Claim, runs: Runs) -> list[int]:
    """The seeds that all arms of a claim have."""
    return sorted(set.intersection(*(set(runs[name]) for name in claim.arms)))


def measured(claim: Claim, runs: Runs) -> Estimate | str:
    """The difference over the seeds that all its arms have; or why there is none."""
    names = claim.arms
    missing = [name for name in names if name not in runs]
    if missing:
        return f"not run: {', '.join(missing)}"
    seeds = common_seeds(claim, runs)
    if not seeds:
        return "no seed has both"
    if claim.measure != "kl" and not runs[claim.arm][seeds[0]].right[claim.measure].size:
        return f"no problem of {claim.measure}"
    pairs = [[runs[name][seed] for seed in seeds] for name in names]
    if claim.at == "equal accuracy":
        return nearer_at_equal_accuracy(pairs[0], pairs[1])
    if claim.measure == "kl":
        return kl_at_the_end(pairs[0], pairs[1])
    if claim.at == "equal KL":
        return better_at_equal_kl(claim.measure, pairs[0], pairs[1])
    ends = [np.stack([curve.right[claim.measure][-1] for curve in curves]) for curves in pairs]
    difference = ends[0] - ends[1]
    return paired_difference(difference, ends[2] - ends[3] if claim.minus else np.zeros_like(difference))


def kl_at_the_end(a: list[Curve], b: list[Curve]) -> Estimate:
    """Only seeds are drawn: the samples that it is measured on are the same for all."""
    difference = np.array([[x.kl["chat"][-1] - y.kl["chat"][-1]] for x, y in zip(a, b, strict=True)])
    return paired_difference(difference, np.zeros_like(difference))


def level_of(curves: list[Curve], values: Callable[[Curve], np.ndarray]) -> float:
    """What every run reaches, with a margin, between the base model's value and the least of the largest ones."""
    begin = values(curves[0])[0]
    return float(begin + REACHED * (min(values(curve).max() for curve in curves) - begin))


def better_at_equal_kl(measure: str, a: list[Curve], b: list[Curve], level: float | None = None) -> Estimate | str:
    level = level_of([*a, *b], lambda curve: curve.kl["chat"]) if level is None else level
    found = [
        at_equal([curve.kl["chat"] for curve in curves], [curve.right[measure] for curve in curves], level)
        for curves in (a, b)
    ]
    if found[0] is None or found[1] is None:
        return f"not every run goes as far as KL {level:.3f}"
    return paired_difference(found[0], found[1])


def nearer_at_equal_accuracy(a: list[Curve], b: list[Curve]) -> Estimate | str:
    """KL of a less that of b where each first reaches the same accuracy, which is drawn anew with the problems."""
    level = level_of([*a, *b], lambda curve: curve.right["target"].mean(-1))
    if level <= a[0].right["target"][0].mean():
        return "a run learns nothing"

    def difference(seeds: np.ndarray, problems: np.ndarray) -> float:
        found = []
        for seed in seeds:
            kls = []
            for curve in (a[seed], b[seed]):
                place = place_of(curve.right["target"][:, problems].mean(-1), level)
                kls.append(at(curve, place))
            found.append(kls[0] - kls[1])
        return float(np.nanmean(found)) if not np.isnan(found).all() else float("nan")

    return bootstrap(difference, len(a), a[0].right["target"].shape[1])


def at(curve: Curve, place: Place | None) -> float:
    return float("nan") if place is None else float(value_at(curve.kl["chat"], place))


def beside_paper(claim: Claim, found: Estimate) -> str:
    """agrees, differs or cannot tell: whether the interval lies on the paper's side of 0."""
    if np.isnan(found.low):
        return "cannot tell"
    if claim.paper == 0:
        if max(abs(found.low), abs(found.high)) <= NEAR:
            return "agrees"
        return "differs" if found.low > 0 or found.high < 0 else "cannot tell"
    low, high = (found.low, found.high) if claim.paper > 0 else (-found.high, -found.low)
    return "agrees" if low > 0 else "differs" if high < 0 else "cannot tell"


def beside_prediction(expected: Range, found: Estimate) -> str:
    """differs: interval and range have nothing in common. agrees: the value lies in the range, and the interval is at
    most twice as wide as it."""
    if np.isnan(found.low):
        return "cannot tell"
    if found.high < expected[0] or found.low > expected[1]:
        return "differs"
    inside = expected[0] <= found.value <= expected[1]
    return "agrees" if inside and found.high - found.low <= 2 * (expected[1] - expected[0]) else "cannot tell"
