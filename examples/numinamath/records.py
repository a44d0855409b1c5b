"""Turn the Parquet files of AI-MO/NuminaMath-CoT into records: OUT/train.jsonl and OUT/valid.jsonl.

    python records.py RAW OUT [--records 100000] [--held-out 256] [--seed 1]

The user's message is the problem, the assistant's the solution. Rows with an empty problem or solution are left out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq


def read_rows(raw: Path) -> list[dict[str, Any]]:
    """The rows of the training files, in the order of files and rows, each with an `id` that says where it was."""
    files = sorted(raw.rglob("train-*.parquet"))
    if not files:
        raise SystemExit(f"{raw}: no train-*.parquet below it. Download AI-MO/NuminaMath-CoT there, as run.sh does")
    rows = []
    for path in files:
        table = pq.read_table(path, columns=["source", "problem", "solution"])
        for number, row in enumerate(table.to_pylist()):
            rows.append({**row, "id": f"{path.stem}/{number}"})
    return rows


def records(rows: list[dict[str, Any]], chosen: np.ndarray) -> list[dict[str, Any]]:
    return [
        {
            "id": row["id"],
            "source": row["source"],
            "messages": [
                {"role": "user", "content": row["problem"].strip()},
                {"role": "assistant", "content": row["solution"].strip()},
            ],
        }
        for row in (rows[index] for index in chosen)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=int, default=100_000, help="to train on; default 100000")
    parser.add_argument("--held-out", type=int, default=256, help="to evaluate on; default 256")
    parser.add_argument("--seed", type=int, default=1, help="of the choice; default 1")
    args = parser.parse_args()
    rows = [row for row in read_rows(args.raw) if (row["problem"] or "").strip() and (row["solution"] or "").strip()]
    if len(rows) < args.records + args.held_out:
        raise SystemExit(f"{args.raw} has {len(rows)} rows, fewer than --records plus --held-out: ask for fewer")
    order = np.random.default_rng(args.seed).permutation(len(rows))
    parts = {"valid": order[: args.held_out], "train": order[args.held_out : args.held_out + args.records]}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in parts.items():
        partial = args.out / f"{name}.jsonl.partial"
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records(rows, chosen))
        partial.rename(args.out / f"{name}.jsonl")
        print(f"{args.out / name}.jsonl: {len(chosen)} of {len(rows)} rows")


if __name__ == "__main__":
    main()
