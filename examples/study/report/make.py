"""Report on a study: `python make.py FOLDER --size NAME` writes report.json, and from it study.md and study.svg."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from claims import (
    CLAIMS,
    SEEN_LATER,
    Claim,
    Prediction,
    Runs,
    beside_paper,
    beside_prediction,
    common_seeds,
    measured,
    predictions,
)
from curves import MEASURES, Curve, Key, curve, load, read
from estimates import Estimate, Values, paired_difference, place_of, value_at
from page import page
from picture import draw

PREDICTIONS = Path(__file__).resolve().parents[1] / "PREDICTIONS.md"
LEVELS = (0.1, 0.25, 0.5, 1.0)  # of the least distance that a seed of `idft` ends at


def report(folder: Path, size: str) -> dict[str, Any]:
    """Everything that page and picture show; NaN is null."""
    found, choice, base = load(folder), read(folder / "choice.json"), read(folder / "base" / "0.json")
    chosen: Runs = {key[0]: found[key] for key in choice["chosen"].items() if key in found}
    near = {key: found[key] for key in choice["fair"].items() if key in found}
    fair: Runs = chosen | {arm: seeds for (arm, _), seeds in near.items()}
    compared = chosen | {
        f"{arm} at {rate}": seeds for (arm, rate), seeds in near.items() if choice["chosen"][arm] != rate
    }
    expected = predictions(PREDICTIONS)
    untrained = curve(
        base, {"checkpoints": [], "training_seconds": 0, "training": {}, "phi_before": (math.nan, math.nan)}
    )
    result = {
        "size": size,
        "means_nothing": size == "smoke",
        "seeds": sorted({seed for seeds in found.values() for seed in seeds}),
        "problems": {measure: untrained.right[measure].shape[1] for measure in MEASURES},
        "base": point(untrained, 0),
        "choice": choice,
        "claims": [
            judged(claim, chosen if claim.at == "end" else fair, expected[claim.id], size == "smoke")
            for claim in CLAIMS
        ],
        "seen_later": [judged(claim, fair, None, size == "smoke") for claim in SEEN_LATER],
        "arms": [arm_at(key, seeds, choice["chosen"].get(key[0]) == key[1]) for key, seeds in sorted(found.items())],
        "equal_kl": equal_kl(compared),
        "where": {
            text: numbers
            for path in sorted((folder / "where").glob("*.json"), key=lambda path: (path.stem != "base", path.stem))
            for text, numbers in read(path).items()
        },
    }
    return without_nan(result)


def judged(claim: Claim, chosen: Runs, expected: Prediction | None, means_nothing: bool) -> dict[str, Any]:
    """The claim, what was expected, what was found, and the verdicts, of which a smoke run has none."""
    found = measured(claim, chosen)
    missing = found if isinstance(found, str) else None
    known = found if isinstance(found, Estimate) else Estimate(math.nan, math.nan, math.nan)
    difference = f"{claim.arm} − {claim.other}"
    if claim.minus:
        difference = f"({difference}) − ({' − '.join(claim.minus)})"
    seeds = 0 if missing else len(common_seeds(claim, chosen))
    untold = means_nothing or seeds < 2  # the interval of one seed knows nothing of others
    return claim._asdict() | {
        "difference": difference,
        "expected": expected and expected.expected,
        "why": expected and expected.why,
        "missing": missing,
        "seeds": seeds,
        "found": known,
        "beside_paper": "cannot tell" if untold else beside_paper(claim, known),
        "beside_prediction": expected and ("cannot tell" if untold else beside_prediction(expected.expected, known)),
    }


def share(right: Values) -> float:
    """NaN of no problems: the base model may have none of retention right."""
    return float(right.mean()) if right.size else math.nan


def point(one: Curve, index: int) -> dict[str, float]:
    numbers = {measure: share(one.right[measure][index]) for measure in MEASURES}
    numbers |= {
        "step": one.steps[index],
        "kl": float(one.kl["chat"][index]),
        "kl_target": float(one.kl["target"][index]),
    }
    numbers |= {"ended": float(one.ended[index, 0]), "ended_retention": float(one.ended[index, 1])}
    return numbers | {"tokens": float(one.tokens[index])}


def arm_at(key: Key, seeds: dict[int, Curve], chosen: bool) -> dict[str, Any]:
    """An arm at one learning rate: its points, means over seeds, and the interval of its last target accuracy."""
    curves = list(seeds.values())
    points = [[point(one, i) for one in curves] for i in range(len(curves[0].steps))]
    last = np.stack([one.right["target"][-1] for one in curves])
    return {
        "arm": key[0],
        "rate": key[1],
        "chosen": chosen,
        "seeds": sorted(seeds),
        "points": [{name: float(np.mean([one[name] for one in at])) for name in at[0]} for at in points],
        "target": paired_difference(last, np.zeros_like(last)),
        "phi": {
            "before": np.mean([one.phi["corpus"][0] for one in curves], 0).tolist(),
            "during": np.mean([[during(one, "mean"), during(one, "std")] for one in curves], 0).tolist(),
            "after": np.mean([one.phi["corpus"][-1] for one in curves], 0).tolist(),
        },
        "seconds": np.mean([one.seconds for one in curves], 0).tolist(),
    }


def during(one: Curve, name: str) -> float:
    """`mean` or `std` of phi over the last quarter of the training; NaN of a trainer that does not measure it."""
    values = [value for _, value in one.training.get(f"ddt/phi {name}", [])]
    return float(np.mean(values[-max(1, len(values) // 4) :])) if values else math.nan


def equal_kl(chosen: Runs) -> dict[str, Any]:
    """[target, retention] of each chosen arm where it is as far from the base model, means over seeds."""
    farthest = min((one.kl["chat"][-1] for one in chosen.get("idft", {}).values()), default=0.0)
    levels = [level * farthest for level in LEVELS] if farthest > 0 else []
    found: dict[str, list[list[float] | None]] = {}
    for name, seeds in chosen.items():
        found[name] = []
        for level in levels:
            places = [(one, place_of(one.kl["chat"], level)) for one in seeds.values()]
            known = [(one, place) for one, place in places if place is not None]
            means = [
                float(np.mean([share(value_at(one.right[measure], place)) for one, place in known]))
                for measure in ("target", "retention")
                if known
            ]
            found[name].append(means if len(known) == len(places) else None)
    return {"levels": levels, "arms": found}


def without_nan(value: Any) -> Any:
    """As JSON has it: null for NaN, lists for tuples."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", required=True)
    args = parser.parse_args()
    made = report(args.folder, args.size)
    (args.folder / "report.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    (args.folder / "study.md").write_text(page(made), encoding="utf-8")
    draw(made, args.folder / "study.svg")
    for claim in made["claims"]:
        print(f"{claim['id']:4} {claim['beside_paper']:12} {claim['text']}")
    print(f"{(args.folder / 'study.md').resolve()}, study.svg and report.json beside it")


if __name__ == "__main__":
    main()
