"""A sentencepiece tokenizer of few pieces, and conversations for it, for models that train in seconds."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

SUMS = [f"user assistant {a} + {a + 3}? {a}." for a in range(100)]


def train_tokenizer(folder: Path, lines: Iterable[str] = SUMS, vocab_size: int = 60) -> Path:
    """Write FOLDER/tokenizer.model, with ChatML's markers; lines: whose characters it must know."""
    text = folder / "text"
    text.write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        split_digits=True,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        user_defined_symbols=["\n"],
        pad_id=3,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


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
