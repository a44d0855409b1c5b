"""A chat tokenizer carried to worker processes, where it needs neither transformers nor torch, and encodes faster.

Importing transformers costs seconds and hundreds of megabytes in each process, and the offsets of every token cost
about a third of the time that finding the tokens takes. Byte-level tokenizers do not need them: the bytes of the tokens
add up to the bytes of the text, which is checked for each text, so sums over a table of lengths say where a token
begins. Whatever does not add up (a normalizer that changes the text, an added token that swallows blanks) is encoded
once more with offsets, to the same result.
"""

import datetime
import json
import os
import unicodedata
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_idft.data.chat.template import ChatTemplate
from megatron_idft.data.chat.tokenizer import (
    ChatTokenizer,
    Encoding,
    HuggingFaceChatTokenizer,
    SentencePieceChatTokenizer,
)


def describe_tokenizer(tokenizer: ChatTokenizer) -> dict[str, Any]:
    """The tokenizer as JSON, for `rebuild_tokenizer`.

    Raises:
        TypeError: a tokenizer of another kind.
    """
    template = tokenizer.template
    described: dict[str, Any] = {
        "fingerprint": tokenizer.fingerprint(),
        "template": template.source,
        "variables": json.loads(json.dumps(template.variables, default=str)),
        "date": None if template.date is None else template.date.isoformat(),
    }
    if isinstance(tokenizer, HuggingFaceChatTokenizer):
        names = ("vocab_size", "eos_id", "pad_id", "bos_id", "special_ids")
        described |= {name: getattr(tokenizer, name) for name in names}
        return described | {"kind": "huggingface", "backend": tokenizer.backend.to_str()}
    if isinstance(tokenizer, SentencePieceChatTokenizer):
        return described | {"kind": "sentencepiece", "model": tokenizer._model.serialized_model_proto().hex()}
    raise TypeError(f"cannot carry a {type(tokenizer).__name__} to another process")


def rebuild_tokenizer(described: dict[str, Any], scratch: Path) -> ChatTokenizer:
    """The same tokenizer again.

    Args:
        described: by `describe_tokenizer`.
        scratch: a folder for a temporary file.
    """
    date = None if described["date"] is None else datetime.date.fromisoformat(described["date"])
    if described["kind"] == "huggingface":
        return _HuggingFace(described, ChatTemplate(described["template"], described["variables"], date))
    path = scratch / f"tokenizer-{os.getpid()}.model"
    path.write_bytes(bytes.fromhex(described["model"]))
    try:
        tokenizer = SentencePieceChatTokenizer(path, described["template"], date, tried=True)
    finally:
        path.unlink()
    return tokenizer


class _HuggingFace(HuggingFaceChatTokenizer):
    """From the parts of another one, which has made all the checks."""

    def __init__(self, described: dict[str, Any], template: ChatTemplate):
        from tokenizers import Tokenizer

        self.template = template
        self.backend = Tokenizer.from_str(described["backend"])
        self._described = described
        self.vocab_size, self.eos_id = described["vocab_size"], described["eos_id"]
        self.pad_id, self.bos_id = described["pad_id"], described["bos_id"]
        self.special_ids = described["special_ids"]
        self._bytes = _byte_lengths(self.backend, described["backend"])

    def fingerprint(self) -> str:
        return str(self._described["fingerprint"])

    def encode_batch(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[Encoding]:
        encode = getattr(self.backend, "encode_batch_fast", None)  # tokenizers >= 0.20
        if self._bytes is None or encode is None:
            return super().encode_batch(texts, cuts)
        ids = [encoding.ids for encoding in encode(list(texts), add_special_tokens=False)]
        encoded = _locate(ids, texts, cuts, self._bytes)
        again = [i for i, found in enumerate(encoded) if found is None]
        slow = iter(super().encode_batch([texts[i] for i in again], [cuts[i] for i in again]) if again else [])
        return [next(slow) if found is None else found for found in encoded]


def _locate(
    ids: Sequence[Sequence[int]],
    texts: Sequence[str],
    cuts: Sequence[Sequence[int]],
    byte_lengths: NDArray[np.int64],
) -> list[Encoding | None]:
    """The encodings of texts, from the lengths of their tokens in bytes; None where these do not add up to the text's.

    All at once: one text at a time, short ones would cost more in calls of NumPy than in the tokenizer.
    """
    joined = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=sum(map(len, ids)))
    lengths = byte_lengths[joined]
    starts = np.zeros(len(joined) + 1, dtype=np.int64)  # of each token in all texts; the last is where they end
    np.cumsum(lengths, out=starts[1:])
    bounds = [0, *accumulate(map(len, ids))]
    begins = starts[bounds].tolist()
    places: list[int] = []
    adds_up = []
    for text, at, begin, end in zip(texts, cuts, begins, begins[1:], strict=False):
        ascii_only = text.isascii()
        own, total = (at, len(text)) if ascii_only else _byte_places(text, at)
        places += [begin + place for place in own]
        # NFC is the one normalizer that such tokenizers have.
        adds_up.append(end - begin == total > 0 and (ascii_only or unicodedata.is_normalized("NFC", text)))
    wanted, counts = np.array(places, dtype=np.int64), [len(at) for at in cuts]
    tokens = np.searchsorted(starts[:-1], wanted)
    straddled = ((starts[tokens] != wanted) | (tokens == np.repeat(bounds[1:], counts))).tolist()
    first = (tokens - np.repeat(bounds[:-1], counts)).tolist()
    ends = [0, *accumulate(counts)]
    return [
        Encoding(joined[begin:end], first[a:b], straddled[a:b]) if right else None
        for right, begin, end, a, b in zip(adds_up, bounds, bounds[1:], ends, ends[1:], strict=False)
    ]


def _byte_places(text: str, cuts: Sequence[int]) -> tuple[list[int], int]:
    """The cuts in bytes, and the text's length."""
    places, at, total = [], 0, 0
    for cut in [*cuts, len(text)]:
        total += len(text[at:cut].encode())
        places.append(total)
        at = cut
    return places[:-1], total


def _byte_lengths(backend: Any, serialized: str) -> NDArray[np.int64] | None:
    """Bytes of each token, int64 [ids]; None if this is not a byte-level BPE, whose tokens are the text's bytes."""
    from tokenizers import pre_tokenizers

    parts = json.loads(serialized)
    model, alphabet = parts["model"], pre_tokenizers.ByteLevel.alphabet()
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if (
        model["type"] != "BPE"
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or not set(alphabet) <= vocabulary.keys()
        or not _writes_bytes(parts.get("pre_tokenizer"))
        or (parts.get("normalizer") or {"type": "NFC"})["type"] != "NFC"
    ):
        return None
    added = {token["id"]: token["content"] for token in parts.get("added_tokens", [])}
    lengths = np.full(
        max([*vocabulary.values(), *added]) + 1, 1 << 40, dtype=np.int64
    )  # an id of no token adds up never
    for token, i in vocabulary.items():
        lengths[i] = len(token)  # the byte-level alphabet has one character for each byte
    for i, content in added.items():
        lengths[i] = len(content.encode())
    return lengths


def _writes_bytes(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether it cuts the text without leaving anything out or adding a blank, and then writes its bytes."""
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    cuts = {"Digits", "Split"}
    return (
        all(step["type"] in cuts or (step["type"] == "ByteLevel" and not step["add_prefix_space"]) for step in steps)
        and all(step.get("behavior") != "Removed" for step in steps)
        and [step["type"] for step in steps].count("ByteLevel") == 1
    )
