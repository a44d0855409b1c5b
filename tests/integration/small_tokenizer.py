"""A sentencepiece tokenizer of few pieces, for models that train in seconds."""

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
