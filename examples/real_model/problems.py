"""Grade-school problems with worked solutions, as records for training and for held-out questions.

    python examples/real_model/problems.py OUTPUT [--seed 1] [--train 256] [--validation 32] [--held-out 64]

The problems are `gsm_symbolic` of reasoning-gym: 95 templates in the words of GSM8K, filled with other names and
numbers, without end. Each split has random seeds of its own, and no question is in two splits; the templates are the
same in all of them. A worked solution that does not end in the problem's answer is left out.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TASK = "gsm_symbolic"
# Problem i of a set has the random seed `seed + i`: neighbouring seeds would give the same problems.
APART = 1_000_000
SPLITS = {"held-out": 64, "validation": 32, "train": 256}  # a question that comes again belongs to the first


def problems(split: str, seed: int) -> Iterator[dict[str, Any]]:
    """The records of a split, without end.

    Args:
        split: of `SPLITS`.
        seed: from 0; the problems of two seeds have no random seed in common.
    """
    import reasoning_gym

    first = (seed * len(SPLITS) + list(SPLITS).index(split)) * APART
    made = reasoning_gym.create_dataset(TASK, size=APART, seed=first)
    for i in range(APART):
        problem = made[i]
        answer, solution = str(problem["answer"]), str(problem["metadata"]["answer_cot"])
        if solution.rpartition("####")[2].strip() != answer:
            continue
        yield {
            "id": f"{TASK}-{first + i}",
            "source": TASK,
            "answer": answer,
            "messages": [
                {"role": "user", "content": problem["question"]},
                {"role": "assistant", "content": solution},
            ],
        }


def corpora(seed: int, sizes: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """The records of each split; no question is there twice.

    Args:
        seed: see `problems`.
        sizes: number of records of each split.
    """
    seen: set[str] = set()
    made: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        made[split] = []
        records = problems(split, seed)
        while len(made[split]) < sizes[split]:
            record = next(records)
            question = record["messages"][0]["content"]
            if question not in seen:
                seen.add(question)
                made[split].append(record)
    return made


def write(folder: Path, seed: int, sizes: dict[str, int]) -> dict[str, Path]:
    """One file for each split, and where they come from in origin.json."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, records in corpora(seed, sizes).items():
        paths[split] = folder / f"{split}.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        paths[split].write_text("".join(lines), encoding="utf-8")
    origin = {"task": TASK, "reasoning-gym": version("reasoning-gym"), "seed": seed, "records": sizes}
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    return paths


def _count(text: str) -> int:
    count = int(text)
    if not 0 <= count <= APART // 2:
        raise argparse.ArgumentTypeError(f"pass a number from 0 to {APART // 2:,}")
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a folder for train.jsonl, validation.jsonl and held-out.jsonl")
    parser.add_argument("--seed", type=_count, default=1, help="other problems; default: %(default)s")
    for split, size in SPLITS.items():
        parser.add_argument(f"--{split}", type=_count, default=size, help="number of records; default: %(default)s")
    args = parser.parse_args()
    if find_spec("reasoning_gym") is None:
        print("problems.py: reasoning-gym is not installed: pip install 'megatron-idft[real]'", file=sys.stderr)
        return 1
    sizes = {split: getattr(args, split.replace("-", "_")) for split in SPLITS}
    for split, path in write(args.output, args.seed, sizes).items():
        print(f"{path}: {sizes[split]} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
