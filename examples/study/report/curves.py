"""The runs of a study as arrays: each a curve from the base model along its checkpoints, the same problems on all."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from estimates import Values

MEASURES = ("target", "target at temperature 1", "harder", "retention")
Key = tuple[str, str]  # arm and learning rate


class Curve(NamedTuple):
    """One run, the base model at its first point.

    Attributes:
        steps: [points].
        kl: [points], KL(base, model) per token of the base model's samples: `chat` to general prompts, `target` to the
            problems of the target.
        right: of each measure [points, problems], the share of its answers to each problem that are right; NaN where it
            was not asked: before the last point only target and retention are, greedily.
        ended: [points, 2], the share of greedy answers that end, to target problems and to those of retention.
        tokens: [points], the mean length of the answers to target problems.
        phi: of each text [points, 2], mean and standard deviation: `corpus`, what was trained on (NaN for the base),
            and `chat`, the base model's samples.
        seconds: training and evaluation.
    """

    steps: list[int]
    kl: dict[str, Values]
    right: dict[str, Values]
    ended: Values
    tokens: Values
    phi: dict[str, Values]
    seconds: tuple[float, float]
    training: dict[str, list[list[float]]]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def load(folder: Path) -> dict[Key, dict[int, Curve]]:
    """(arm, learning rate) -> seed -> curve; `folder` is that of the study."""
    base = read(folder / "base" / "0.json")
    found: dict[Key, dict[int, Curve]] = defaultdict(dict)
    for path in sorted((folder / "results").glob("*@*@*.json")):
        arm, rate, seed = path.stem.split("@")
        found[arm, rate][int(seed)] = curve(base, read(path))
    return dict(found)


def curve(base: dict[str, Any], run: dict[str, Any]) -> Curve:
    points = [base, *run["checkpoints"]]
    return Curve(
        [point["step"] for point in points],
        {
            name: np.array([kl(base, point, split) for point in points])
            for name, split in (("chat", "chat"), ("target", "test"))
        },
        {measure: np.stack([right(point, measure, base) for point in points]) for measure in MEASURES},
        np.array(
            [
                [np.mean([row["ended"] for row in rows]) for rows in (greedy(point, "test"), retained(point, base))]
                for point in points
            ]
        ),
        np.array([np.mean([row["tokens"] for row in greedy(point, "test")]) for point in points]),
        {
            "corpus": np.array([run["phi_before"], *(phi(point.get("corpus", [])) for point in points[1:])]),
            "chat": np.array(
                [phi([row for row in point["base_samples"] if row["split"] == "chat"]) for point in points]
            ),
        },
        (run["training_seconds"], sum(point["seconds"] for point in points[1:])),
        run["training"],
    )


def greedy(point: dict[str, Any], split: str) -> list[dict[str, Any]]:
    return [row for row in point["answers"] if row["split"] == split and row["kind"] == "greedy"]


def retained(point: dict[str, Any], base: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers to the problems of other tasks that the base model has right."""
    known = {row["problem"] for row in base["answers"] if row["split"].startswith("retention") and row["right"]}
    return [row for row in point["answers"] if row["problem"] in known]


def right(point: dict[str, Any], measure: str, base: dict[str, Any]) -> Values:
    """[problems], in the order of the files; NaN where the point was not measured, as samples between checkpoints."""
    if measure == "target at temperature 1":
        rows = [row for row in point["answers"] if row["split"] == "test" and row["kind"] != "greedy"]
    elif measure == "retention":
        rows = retained(point, base)
    else:
        rows = greedy(point, {"target": "test"}.get(measure, measure))
    by_problem: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_problem[row["problem"]].append(row["right"])
    if not by_problem:
        return np.full_like(right(base, measure, base), np.nan) if point is not base else np.zeros(0)
    return np.array([np.mean(values) for values in by_problem.values()], dtype=np.float64)


def kl(base: dict[str, Any], point: dict[str, Any], split: str) -> float:
    """KL(base, model) per token: the mean of log p_base - log p over what the base model has drawn."""
    pairs = [
        (one["log_prob"] - other["log_prob"], one["tokens"])
        for one, other in zip(base["base_samples"], point["base_samples"], strict=True)
        if one["split"] == split
    ]
    tokens = sum(count for _, count in pairs)
    return sum(ratio for ratio, _ in pairs) / tokens if tokens else float("nan")


def phi(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean and standard deviation per token."""
    tokens = sum(row["tokens"] for row in rows)
    if not tokens:
        return float("nan"), float("nan")
    mean = sum(row["phi"] for row in rows) / tokens
    return mean, max(0.0, sum(row["phi_squared"] for row in rows) / tokens - mean**2) ** 0.5
