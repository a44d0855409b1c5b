"""The tiny tokenizers, saved as a user would have them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from megatron_idft.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from tests.tiny_tokenizers import SPECIAL, TEXTS, save_tokenizer


@pytest.fixture(scope="session")
def huggingface_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(kind, template) -> a saved tokenizer."""

    def save(kind: str, template: str | None, **special: str | None) -> Path:
        return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), template, kind, **special)

    return save


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Control symbols and user-defined symbols, among these a marker and digits; bytes for what it has not seen."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(prefix),
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=3,
        control_symbols=[token for token in SPECIAL[4:] if token != "<end_of_turn>"],
        user_defined_symbols=["<end_of_turn>", "7", "\n"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def tokenizer(sentencepiece_model: Path) -> ChatTokenizer:
    return load_tokenizer(sentencepiece_model, chat_template="chatml")
