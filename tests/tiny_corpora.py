"""Conversations for models that train in seconds."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.tiny_tokenizers import train_tokenizer


def additions(count: int, turns: Sequence[int]) -> list[dict]:
    """Conversations of as many turns as one of `turns`, which the tokenizer of `train_tokenizer` knows."""
    rng = random.Random(5)
    records = []
    for _ in range(count):
        messages = []
        for _ in range(rng.choice(turns)):
            a, b = rng.randrange(50), rng.randrange(50)
            messages += [{"role": "user", "content": f"{a} + {b}?"}, {"role": "assistant", "content": f"{a + b}."}]
        records.append({"messages": messages})
    return records


def write_records(path: Path, records: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_additions(folder: Path) -> None:
    """Write FOLDER/train.jsonl, 30 conversations of one turn, and a tokenizer for them."""
    write_records(folder / "train.jsonl", additions(30, [1]))
    train_tokenizer(folder)
