"""The learning rate of each arm, by its last checkpoint's answers to the selection problems of the first seed.

    python choose.py RESULTS --seed 1 --arms sft idft … --edges           # ARM RATE SEED: runs that the grid lacks
    python choose.py RESULTS --seed 1 --arms sft idft … --out FILE.json   # ARM RATE: what the other seeds run

The best is the rate with most right answers, of equals the smallest. Where it lies at an edge of what was run, --edges
names the next rate there. A follower, LOSS-CORPUS, takes the rate of LOSS. On every corpus that has both, `sft` also
runs at the rate at which its KL from the base model is nearest that of `idft` at its own: the fair rival, which moves
as little. --edges names a smaller rate of `sft` while all that were run move it further.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from megatron_idft.files import write_atomically

NEXT_RATE = {"1": "3", "3": "1"}  # 1e-5, 3e-5, 1e-4, …: the digit that follows


class Run(NamedTuple):
    """What a run says for the choice."""

    rate: str
    right: int
    kl: float


def runs(folder: Path, arm: str, seed: int, base: dict[str, Any]) -> list[Run]:
    """Those of an arm, by rising rate."""
    found = []
    for path in folder.glob(f"{arm}@*@{seed}.json"):
        last = json.loads(path.read_text(encoding="utf-8"))["checkpoints"][-1]
        right = sum(row["right"] for row in last["answers"] if row["split"] == "selection" and row["kind"] == "greedy")
        found.append(Run(path.stem.split("@")[1], right, kl(last, base)))
    return sorted(found, key=lambda run: float(run.rate))


def kl(checkpoint: dict[str, Any], base: dict[str, Any], split: str = "chat") -> float:
    """KL(base, model) per token of the base model's samples of a split."""
    pairs = [
        (one["log_prob"] - other["log_prob"], one["tokens"])
        for one, other in zip(base["base_samples"], checkpoint["base_samples"], strict=True)
        if one["split"] == split
    ]
    return sum(ratio for ratio, _ in pairs) / sum(tokens for _, tokens in pairs)


def best(found: list[Run]) -> Run:
    return max(found, key=lambda run: (run.right, -float(run.rate)))


def beyond(rate: str, larger: bool) -> str:
    """The neighbour of a rate in 1e-5, 3e-5, 1e-4, …"""
    digit, exponent = rate.split("e")
    power = int(exponent) + (1 if larger and digit == "3" else -1 if not larger and digit == "1" else 0)
    return f"{NEXT_RATE[digit]}e{power}"


def at_edges(found: list[Run]) -> str | None:
    """The rate to run next, where the best is the smallest or the largest; None: it lies inside."""
    chosen = best(found)
    if chosen is found[-1]:
        return beyond(chosen.rate, larger=True)
    return beyond(chosen.rate, larger=False) if chosen is found[0] else None


def rivals(found: dict[str, list[Run]]) -> dict[str, str]:
    """Of each corpus the arm of sft -> that of idft."""
    pairs = {arm: arm.replace("sft", "idft", 1) for arm in found if arm.split("-")[0] == "sft"}
    return {arm: other for arm, other in pairs.items() if other in found}


def wanted(found: dict[str, list[Run]]) -> set[tuple[str, str]]:
    """Arm and rate of the runs that the grid lacks."""
    beside = {(arm, rate) for arm, known in found.items() if (rate := at_edges(known))}
    for arm, other in rivals(found).items():
        if found[arm][0].kl > best(found[other]).kl:
            beside.add((arm, beyond(found[arm][0].rate, larger=False)))
    return beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--followers", nargs="*", default=[])
    parser.add_argument("--edges", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    base = json.loads((args.results.parent / "base" / "0.json").read_text(encoding="utf-8"))
    found = {arm: known for arm in args.arms if (known := runs(args.results, arm, args.seed, base))}
    if args.edges:
        for arm, rate in sorted(wanted(found)):
            print(arm, rate, args.seed)
        return
    chosen = {arm: best(known).rate for arm, known in found.items()}
    chosen |= {arm: chosen[arm.split("-")[0]] for arm in args.followers if arm.split("-")[0] in chosen}
    lines = [f"{arm} {rate}" for arm, rate in chosen.items()]
    fair = {
        arm: min(found[arm], key=lambda run: abs(run.kl - best(found[other]).kl)).rate
        for arm, other in rivals(found).items()
    }
    lines += [f"{arm} {rate}" for arm, rate in fair.items() if rate != chosen[arm]]
    tried = {arm: [run._asdict() for run in known] for arm, known in found.items()}
    write_atomically(args.out, json.dumps({"chosen": chosen, "fair": fair, "tried": tried}, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
