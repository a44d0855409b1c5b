"""Write the corpora: `python generate.py FOLDER [--seed 1]`. Splits are disjoint by problem; one seed, one result."""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from problems import Problem, foreign_solution, own_solution, problems, record

HELD_OUT = 300  # problems of each operation that no corpus shows
BASE_SUBTRACTIONS = 900  # enough to know the form, too few to master it
BASE_FOREIGN = 0.25  # the share of the base corpus that the other author wrote
FOREIGN = 2400


def corpora(seed: int) -> dict[str, list[dict[str, Any]]]:
    """File name without suffix -> records."""
    chance = random.Random(seed)

    def shuffled[T](items: list[T]) -> list[T]:
        return chance.sample(items, len(items))

    def own(chosen: list[Problem]) -> list[dict[str, Any]]:
        return [record(problem, own_solution(problem), "own") for problem in chosen]

    def foreign(chosen: list[Problem], phrases: int = 6) -> list[dict[str, Any]]:
        return [record(problem, foreign_solution(problem, chance, phrases), "foreign") for problem in chosen]

    def both(chosen: list[Problem]) -> list[dict[str, Any]]:
        cut = round(BASE_FOREIGN * len(chosen))
        return own(chosen[cut:]) + foreign(chosen[:cut], phrases=3)

    additions, subtractions = shuffled(problems("+")), shuffled(problems("-"))
    unseen = subtractions[HELD_OUT:]
    return {
        "base-train": shuffled(both(additions[HELD_OUT:]) + both(unseen[:BASE_SUBTRACTIONS])),
        "foreign-train": foreign(unseen[BASE_SUBTRACTIONS:][:FOREIGN]),
        "addition-own": own(additions[:HELD_OUT]),
        "subtraction-own": own(subtractions[:HELD_OUT]),
        "subtraction-foreign": foreign(subtractions[:HELD_OUT]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, records in corpora(args.seed).items():
        with open(args.folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        print(f"{name}.jsonl: {len(records)} records, the first one {records[0]['messages'][1]['content']!r}")


if __name__ == "__main__":
    main()
