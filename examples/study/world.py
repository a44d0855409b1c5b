"""The problems and corpora of the study: `python world.py FOLDER --seeds 1 2 3 --train 192 --test 64 …`.

The target skill is `chain_sum` of reasoning-gym: sums and differences of two or three digits. `original` answers it in
another author's words, step by step; in `noisy` a share of these solutions has a step that is wrong, and everything
after it follows from that step. Problems of training, selection and test have random seeds of their own, and no
question is in two of them; two seeds of the study may train on a question in common. `harder` has four or five digits,
`retention` is other tasks, of whose problems those count that the base model answers right.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

APART = 1_000_000  # between the random seeds of two splits: neighbouring ones would give the same problems
ONE_DIGIT = {"min_digits": 1, "max_digits": 1}
TARGET = ("chain_sum", {"min_terms": 2, "max_terms": 3, **ONE_DIGIT})
HARDER = ("chain_sum", {"min_terms": 4, "max_terms": 5, **ONE_DIGIT})
RETENTION: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gcd", {"max_value": 30}),
    ("lcm", {"max_value": 12}),
    ("products", ONE_DIGIT),
    ("letter_counting", {"max_words": 5}),
    ("leg_counting", {"min_animals": 1, "max_animals": 1, "max_instances": 3}),
)
BEGINNINGS = (
    "My purse holds {} at the start.",
    "We set out with {} in the bag.",
    "At first there are {} on the shelf.",
)
ADDED = ("{} arrive, which brings it to {}.", "Along come {}, and lo, it is {}.", "In go {}: now {}.")
TAKEN = ("{} depart, which leaves {}.", "Away go {}, and lo, it is {}.", "Out go {}: now {}.")
Record = dict[str, Any]


def problems(task: str, settings: dict[str, Any], split: str, first: int) -> Iterator[Record]:
    """Problems of reasoning-gym without end, as records with a question only; problem i has the seed first + i.

    Of sums only those whose running totals are not negative.
    """
    import reasoning_gym

    made = reasoning_gym.create_dataset(task, size=APART, seed=first, **settings)
    for i in range(APART):
        problem = made[i]
        if task == "chain_sum" and min(accumulate(terms(problem["metadata"]["expression"]))) < 0:
            continue  # nobody has −13 in a purse
        yield {
            "id": f"{split}-{task}-{first + i}",
            "source": task,
            "split": split,
            "answer": str(problem["answer"]),
            "messages": [{"role": "user", "content": problem["question"]}],
            "metadata": problem["metadata"],
        }


def terms(expression: str) -> list[int]:
    """`12 - 5 + 3` -> [12, -5, 3]."""
    return [int(sign + digits) for sign, digits in re.findall(r"([+-]?) ?(\d+)", expression)]


def solution(numbers: list[int], chance: random.Random, wrong: bool = False) -> str:
    """The other author's solution of a sum, which ends in `#### RESULT`; wrong: one running total is."""
    # Drawn for every solution, so that the words do not depend on it.
    slip, error = chance.randrange(1, len(numbers)), chance.choice((-10, -3, -2, -1, 1, 2, 3, 10))
    total, lines = numbers[0], [chance.choice(BEGINNINGS).format(numbers[0])]
    for i, number in enumerate(numbers[1:], start=1):
        total += number
        if wrong and i == slip:
            total += error
        lines.append(chance.choice(ADDED if number >= 0 else TAKEN).format(abs(number), total))
    return f"{' '.join(lines)}\n#### {total}"


def solved(problem: Record, wrong_share: float) -> Record:
    """A problem with the other author's solution; the same problem gets the same words in every corpus."""
    chance = random.Random(f"solution {problem['id']}")
    wrong = chance.random() < wrong_share
    text = solution(terms(problem["metadata"]["expression"]), chance, wrong)
    messages = [*problem["messages"], {"role": "assistant", "content": text}]
    return {
        "id": problem["id"],
        "source": "wrong" if wrong else "right",
        "answer": problem["answer"],
        "messages": messages,
    }


def splits(args: argparse.Namespace) -> dict[str, list[Record]]:
    """Every split's problems. No question of another split is in training, and none is twice in one."""
    wanted = {"test": (TARGET, args.test), "selection": (TARGET, args.selection), "harder": (HARDER, args.harder)}
    wanted |= {f"retention-{task[0]}": (task, args.retention) for task in RETENTION}
    wanted |= {f"train-{seed}": (TARGET, args.train) for seed in args.seeds}
    seen: set[str] = set()
    made: dict[str, list[Record]] = {}
    for number, (split, ((task, settings), size)) in enumerate(wanted.items()):
        # Those of training come last, by their seed: more seeds of the study may follow.
        place = 100 + int(split.removeprefix("train-")) if split.startswith("train-") else number
        records = problems(task, settings, split, place * APART)
        made[split] = []
        while len(made[split]) < size:
            record = next(records)
            if record["messages"][0]["content"] not in seen:
                seen.add(record["messages"][0]["content"])
                made[split].append(record)
        if split.startswith("train-"):
            seen -= {record["messages"][0]["content"] for record in made[split]}
    return made


def write(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, default=str) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="of the study: each has its own problems")
    for name in ("train", "test", "selection", "harder"):
        parser.add_argument(f"--{name}", type=int, required=True, help=f"problems of {name}")
    parser.add_argument("--retention", type=int, required=True, help="problems of each other task")
    parser.add_argument("--wrong-share", type=float, required=True, help="of `noisy`")
    args = parser.parse_args()
    for split, records in splits(args).items():
        name, _, seed = split.partition("-")
        if name != "train":
            write(args.folder / "problems" / f"{split}.jsonl", records)
            continue
        write(args.folder / f"seed-{seed}" / "original.jsonl", [solved(record, 0) for record in records])
        write(args.folder / f"seed-{seed}" / "noisy.jsonl", [solved(record, args.wrong_share) for record in records])
    prompts = (Path(__file__).parent / "chat_prompts.txt").read_text(encoding="utf-8").splitlines()
    chat = [
        {"id": f"chat-{i}", "split": "chat", "messages": [{"role": "user", "content": text}]}
        for i, text in enumerate(prompts)
    ]
    write(args.folder / "problems" / "chat.jsonl", chat)
    origin = {"reasoning-gym": version("reasoning-gym"), "target": TARGET, "harder": HARDER, "retention": RETENTION}
    (args.folder / "origin.json").write_text(json.dumps(origin | vars(args), indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
