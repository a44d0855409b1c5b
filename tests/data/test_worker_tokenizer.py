"""The tokenizer of the worker processes: the same ids and cuts as the one that it was made from."""

import json
import random
import unicodedata

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers

from megatron_idft.data.chat.conversations import encode_conversation
from megatron_idft.data.chat.template import BUILTIN_TEMPLATES
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.worker_tokenizer import describe_tokenizer, rebuild_tokenizer
from tests.tiny_tokenizers import KINDS

PIECES = [
    "hello", " world", "\n", "  ", "naïve", "你好", "😀", "<|im_end|>", "<|im_start|>", "e\u0301", "\u0958", "3.5",
    "\t", "\ufeff", "ÄÖ", "<s>", "fox dog", " \n ", "\u2028", "\x00",
]  # fmt: skip


def texts():
    rng = random.Random(0)
    made = ["".join(rng.choices(PIECES, k=rng.randrange(1, 30))) for _ in range(300)]
    return made, [sorted(rng.randrange(len(text) + 1) for _ in range(4)) for text in made]


def rebuilt(tokenizer, tmp_path):
    return rebuild_tokenizer(json.loads(json.dumps(describe_tokenizer(tokenizer))), tmp_path)


def assert_alike(ours, theirs):
    made, cuts = texts()
    for text, at, one, two in zip(
        made, cuts, ours.encode_batch(made, cuts), theirs.encode_batch(made, cuts), strict=True
    ):
        assert one.ids.dtype == two.ids.dtype == np.int32 and one.ids.tolist() == two.ids.tolist(), text
        assert one.first == two.first, (text, at)


@pytest.mark.parametrize("kind", [*KINDS, "sentencepiece"])
def test_it_encodes_alike(kind, huggingface_folder, sentencepiece_model, tmp_path):
    if kind == "sentencepiece":
        tokenizer = load_tokenizer(sentencepiece_model, "chatml")
    else:
        tokenizer = load_tokenizer(huggingface_folder(kind, BUILTIN_TEMPLATES["chatml"]))
        assert (rebuilt(tokenizer, tmp_path)._bytes is not None) == (kind == "byte-level")  # the way without offsets
    again = rebuilt(tokenizer, tmp_path)
    assert_alike(again, tokenizer)
    assert again.fingerprint() == tokenizer.fingerprint() and not list(tmp_path.iterdir())
    for name in ("vocab_size", "eos_id", "pad_id", "bos_id", "special_ids"):
        assert getattr(again, name) == getattr(tokenizer, name)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "\n naïve 😀"}]
    for one, two in zip(encode_conversation(again, messages), encode_conversation(tokenizer, messages), strict=True):
        assert np.array_equal(one, two)


def test_texts_that_the_tokenizer_changes_are_read_by_their_offsets(huggingface_folder, tmp_path):
    """A normalizer shortens and lengthens texts, and an added token swallows the blanks around it."""
    tokenizer = load_tokenizer(huggingface_folder("byte-level", BUILTIN_TEMPLATES["chatml"]))
    tokenizer.backend.normalizer = normalizers.NFC()
    tokenizer.backend.add_tokens([AddedToken("world", lstrip=True, rstrip=True)])
    again = rebuilt(tokenizer, tmp_path)
    assert again._bytes is not None
    made, _ = texts()
    assert any(unicodedata.normalize("NFC", text) != text for text in made)
    assert_alike(again, tokenizer)
    tokenizer.backend.normalizer = normalizers.Lowercase()
    assert rebuilt(tokenizer, tmp_path)._bytes is None


def test_straddled_cuts_are_told(huggingface_folder, tmp_path):
    tokenizer = load_tokenizer(huggingface_folder("byte-level", BUILTIN_TEMPLATES["chatml"]))
    text = "hello hello<|im_end|>naïve"
    cuts = [[0, 2, 5, 6, 11, 21, len(text)]]
    [ours], [theirs] = rebuilt(tokenizer, tmp_path).encode_batch([text], cuts), tokenizer.encode_batch([text], cuts)
    assert ours.straddled == theirs.straddled and True in ours.straddled and False in ours.straddled
