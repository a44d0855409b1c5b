"""Conversations for models that train in seconds."""

import json
import random
from pathlib import Path

from tests.tiny_tokenizers import train_tokenizer


def write_additions(folder: Path) -> None:
    """Write FOLDER/train.jsonl, 30 conversations of one turn, and a tokenizer for them."""
    rng = random.Random(5)
    lines = []
    for _ in range(30):
        a, b = rng.randrange(50), rng.randrange(50)
        turns = [{"role": "user", "content": f"{a} + {b}?"}, {"role": "assistant", "content": f"{a + b}."}]
        lines.append(json.dumps({"messages": turns}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer(folder)
