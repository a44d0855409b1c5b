"""Tokenizers that know chat: Hugging Face folders and sentencepiece models with one small interface.

The chat template's text is the whole truth: no tokenizer adds BOS or EOS of its own here, the template writes them.
Special tokens spelled in the text become their ids, wherever they stand, as with `apply_chat_template`.
"""

import datetime
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_idft.data.chat.template import ChatTemplate, read_template
from megatron_idft.data.chat.template_trial import try_template
from megatron_idft.data.chat.tokenizer_files import (
    check_head,
    check_reads_text,
    check_size,
    check_tokenizer_files,
    open_with,
)
from megatron_idft.errors import InputError, TemplateError


@dataclass(slots=True)
class Encoding:
    """A tokenised text and where its cuts (characters) fall among the tokens.

    Attributes:
        ids: int32 [n].
        first: for each cut the index of the first token that begins at the cut or after it, n if there is none; a
            token's leading blank belongs to it.
        straddled: whether a token begins before the cut and reaches over it.
    """

    ids: NDArray[np.int32]
    first: list[int]
    straddled: list[bool]


class ChatTokenizer(ABC):
    """A tokenizer with its chat template.

    Attributes:
        vocab_size: the true size, one more than the largest id that can occur.
        eos_id: int.
        pad_id: int; falls back to EOS: padding is never trained.
        bos_id: int or None.
        special_ids: the text of each special token, and its id.
    """

    template: ChatTemplate
    vocab_size: int
    eos_id: int
    pad_id: int
    bos_id: int | None
    special_ids: dict[str, int]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[Encoding]:
        """Token ids, adding nothing to the texts, and where each text's ascending `cuts` fall.

        Raises:
            TemplateError: characters cannot be mapped to tokens.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of `ids`, special tokens spelled out."""

    @abstractmethod
    def _content(self) -> bytes:
        """Everything about the vocabulary that decides how text becomes ids."""

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches any special token's text, the longest first."""
        return re.compile(
            "|".join(re.escape(text) for text in sorted(self.special_ids, key=len, reverse=True)) or r"(?!)"
        )

    def fingerprint(self) -> str:
        """A hash of the tokenizer and its chat template: equal means the same ids for the same conversation."""
        template = self.template
        rest = [type(self).__name__, template.source, template.variables, str(template.date), self.special_ids]
        digest = hashlib.sha256(self._content())
        digest.update(json.dumps(rest, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def load_tokenizer(
    path: str | Path,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    template_date: str | None = None,
) -> ChatTokenizer:
    """Open the tokenizer at `path`: a Hugging Face folder, or a sentencepiece `*.model` file. Nothing is downloaded.

    Args:
        path: of the tokenizer.
        chat_template: a Jinja file, or the name of a built-in template (`chatml`, `plain`). Overrides the folder's own;
            a sentencepiece model has none, so there it is required.
        trust_remote_code: run code of the folder.
        template_date: `YYYY-MM-DD` for templates that write today's date; see `ChatTemplate`.

    Raises:
        FileNotFoundError: a missing path.
        InputError: a tokenizer without template, EOS token or token offsets (a slow tokenizer), damaged files, links
            out of the folder, a tokenizer that does not give a text back, a template that is not valid Jinja; names
            the remedy.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no tokenizer at {path}: expected a Hugging Face folder or a sentencepiece *.model file"
        )
    source = read_template(chat_template) if chat_template is not None else None
    try:
        date = None if template_date is None else datetime.date.fromisoformat(template_date)
    except ValueError as error:
        raise InputError(f"template date {template_date!r}: write it as YYYY-MM-DD") from error
    if path.is_file():
        if path.suffix != ".model":
            raise InputError(
                f"{path}: a tokenizer file must be a sentencepiece *.model; for Hugging Face give the folder"
            )
        return SentencePieceChatTokenizer(path, source, date)
    return HuggingFaceChatTokenizer(path, source, date, trust_remote_code=trust_remote_code)


class HuggingFaceChatTokenizer(ChatTokenizer):
    """A fast tokenizer of `transformers`, driven through its Rust backend: batches use all cores, offsets are exact.

    backend: our copy of its `tokenizers.Tokenizer`.
    """

    def __init__(
        self,
        path: Path,
        template: str | None = None,
        date: datetime.date | None = None,
        *,
        trust_remote_code: bool = False,
    ):
        from tokenizers import Tokenizer, processors
        from transformers import AutoTokenizer

        check_tokenizer_files(path)
        hf = open_with(
            path,
            lambda: AutoTokenizer.from_pretrained(
                str(path), trust_remote_code=trust_remote_code, local_files_only=True
            ),
        )
        if not hf.is_fast:
            raise InputError(f"{path}: a slow tokenizer gives no token offsets; save the fast form (tokenizer.json)")
        if hf.eos_token_id is None:
            raise InputError(f"{path}: the tokenizer names no EOS token; set eos_token in tokenizer_config.json")
        if template is None:
            if not hf.chat_template:
                raise InputError(f"{path}: the tokenizer has no chat template; give one with --chat-template FILE")
            template = open_with(path, hf.get_chat_template)
        try_template(template, hf.special_tokens_map, date)
        self.template = ChatTemplate(template, hf.special_tokens_map, date)
        # A private copy, without what the calls of other people may have left in it: truncation, padding, and a
        # post-processor that adds special tokens or trims blanks off the offsets.
        self.backend = Tokenizer.from_str(hf.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.post_processor = processors.ByteLevel(trim_offsets=False)
        self._check_same_ids(hf, path)
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(len(hf), max(ids) + 1)
        self.eos_id = int(hf.eos_token_id)
        self.pad_id = self.eos_id if hf.pad_token_id is None else int(hf.pad_token_id)
        self.bos_id = None if hf.bos_token_id is None else int(hf.bos_token_id)
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = {token.content: int(i) for i, token in added.items() if token.special}
        self.special_ids[str(hf.eos_token)] = self.eos_id
        check_size(path, self.vocab_size)
        regular = sorted(set(ids) - set(added))
        check_reads_text(
            path, regular, lambda text: self.backend.encode(text, add_special_tokens=False).ids, self.decode
        )

    def _check_same_ids(self, hf: Any, path: Path) -> None:
        text = (
            self.template.source + " Hello,  world!\n\tÄ 你好 😀 " + "".join(map(str, self.template.variables.values()))
        )
        if list(hf(text, add_special_tokens=False)["input_ids"]) != self.backend.encode(text).ids:
            raise InputError(
                f"{path}: the tokenizer's Python code changes the ids of its tokenizer.json, which is not served"
            )

    def encode_batch(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[Encoding]:
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [self._with_cuts(encoding, at) for encoding, at in zip(encodings, cuts, strict=True)]

    def _with_cuts(self, encoding: Any, cuts: Sequence[int]) -> Encoding:
        ids = np.asarray(encoding.ids, dtype=np.int32)
        starts = np.fromiter((start for start, _ in encoding.offsets), dtype=np.int64, count=len(ids))
        if (np.diff(starts) < 0).any():
            raise TemplateError("the tokenizer's offsets go backwards, so characters cannot be mapped to tokens")
        first = np.searchsorted(starts, cuts)
        ends = np.fromiter((end for _, end in encoding.offsets), dtype=np.int64, count=len(ids))
        # A token may hold a blank and the first byte of a letter, whose other bytes' tokens begin at the cut.
        reached = np.append(0, ends)[first] > np.asarray(cuts, dtype=np.int64)
        straddled = ~np.isin(cuts, starts) | reached
        return Encoding(ids, first.tolist(), straddled.tolist())

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def _content(self) -> bytes:
        return self.backend.to_str().encode()


class SentencePieceChatTokenizer(ChatTokenizer):
    """A sentencepiece model with an explicit template.

    Sentencepiece itself reads a control symbol in a text as ordinary characters. Here the text is cut at control
    symbols (and at markers, user-defined symbols written like `<…>` or `[…]`), which become their ids; the text between
    them is encoded in one piece each, with the model's own dummy prefix. Other user-defined symbols are left to
    the model.

    Args:
        tried: the template is known to end.
    """

    def __init__(self, path: Path, template: str | None, date: datetime.date | None = None, *, tried: bool = False):
        import sentencepiece

        if template is None:
            raise InputError(
                f"{path}: a sentencepiece model has no chat template; give one with --chat-template chatml|plain|FILE"
            )
        content = path.read_bytes()
        check_head(path, content[:100])
        try:
            types = _piece_types(content)
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"{path} is no sentencepiece model ({str(error)[:300]}): download it again") from None
        self.vocab_size = int(self._model.get_piece_size())
        self.eos_id, self.bos_id = int(self._model.eos_id()), _id_or_none(self._model.bos_id())
        if self.eos_id < 0:
            raise InputError(f"{path}: the model has no EOS piece; train it with one (eos_id >= 0)")
        pad = _id_or_none(self._model.pad_id())
        self.pad_id = self.eos_id if pad is None else pad
        pieces = {i: self._model.id_to_piece(i) for i in range(self.vocab_size)}
        self.special_ids = {
            piece: i
            for i, piece in pieces.items()
            if types[i] == _CONTROL or (types[i] == _USER_DEFINED and _MARKER.fullmatch(piece))
        }
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": pad}
        variables = {name: pieces[i] for name, i in names.items() if i is not None}
        if not tried:
            try_template(template, variables, date)
        self.template = ChatTemplate(template, variables, date)
        self._spelled = {i: piece for piece, i in self.special_ids.items()}
        regular = [i for i in range(self.vocab_size) if types[i] == _NORMAL]
        check_reads_text(path, regular, lambda text: self._model.encode(text, out_type=int), self.decode)

    def encode_batch(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[Encoding]:
        return [self._encode(text, at) for text, at in zip(texts, cuts, strict=True)]

    def _encode(self, text: str, cuts: Sequence[int]) -> Encoding:
        ids: list[int] = []
        first: list[int] = []
        straddled: list[bool] = []
        for start, end, special in self._segments(text):
            before = len(ids)
            ids += [self.special_ids[text[start:end]]] if special else self._model.encode(text[start:end], out_type=int)
            while len(first) < len(cuts) and cuts[len(first)] < end:
                cut = cuts[len(first)] - start
                if cut <= 0:
                    tokens, exact = 0, True
                elif special:
                    tokens, exact = 1, False
                else:
                    tokens, exact = self._tokens_before(text[start:end], cut)
                first.append(before + tokens)
                straddled.append(not exact)
        rest = len(cuts) - len(first)
        return Encoding(np.asarray(ids, dtype=np.int32), first + [len(ids)] * rest, straddled + [True] * rest)

    def _segments(self, text: str) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether it is a special token) of the parts of the text."""
        at = 0
        for special in self.special_pattern.finditer(text):
            if at < special.start():
                yield at, special.start(), False
            at = special.end()
            yield special.start(), at, True
        if at < len(text):
            yield at, len(text), False

    def _tokens_before(self, text: str, cut: int) -> tuple[int, bool]:
        """How many tokens begin before the cut, and whether the next one begins right there."""
        # The serialized form is the one that every release of sentencepiece has; its offsets count bytes. Reading it in
        # Python is slow, but cuts come early in a segment: after a header.
        cut = len(text[:cut].encode())
        proto = self._model.encode(text, out_type="serialized_proto")
        count = 0
        for number, piece in _fields(proto):
            if number == 2:
                begin = dict(_fields(piece)).get(4, 0)
                if begin >= cut:
                    return count, begin == cut
                count += 1
        return count, False

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        numbers = [int(i) for i in ids]
        cuts = [i for i, number in enumerate(numbers) if number in self._spelled]
        text = [self._model.decode(numbers[: cuts[0]] if cuts else numbers)]
        for cut, end in pairwise([*cuts, len(numbers)]):
            text += [self._spelled[numbers[cut]], self._model.decode(numbers[cut + 1 : end])]
        return "".join(text)

    def _content(self) -> bytes:
        return self._model.serialized_model_proto()


_MARKER = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # ModelProto.SentencePiece.Type


def _id_or_none(number: int) -> int | None:
    return None if number < 0 else int(number)


def _piece_types(model: bytes) -> list[int]:
    """The type of every piece, which the Python interface hides: ModelProto.pieces = 1, SentencePiece.type = 3."""
    return [dict(_fields(piece)).get(3, 1) for number, piece in _fields(model) if number == 1]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: two messages do not justify depending on protobuf."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
        elif kind == 2:
            size, at = _varint(message, at)
            yield number, message[at : at + size]
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"not a protobuf message: wire type {kind}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
