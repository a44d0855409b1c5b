"""A sentencepiece tokenizer of 60 pieces, for programs that make their own data."""

from pathlib import Path


def train_tokenizer(folder: Path) -> Path:
    """Write FOLDER/tokenizer.model, with ChatML's markers: for additions of two numbers, one piece a digit."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"user assistant Add. {a} + {a + 3} = {2 * a + 3}." for a in range(100)),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=60,
        hard_vocab_limit=False,
        split_digits=True,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        user_defined_symbols=["\n"],
        pad_id=3,
        minloglevel=2,
    )
    return folder / "tokenizer.model"
