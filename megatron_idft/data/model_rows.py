"""Token ids for which a model has no row, refused before anything is computed.

A tokenizer may have more ids than its model has rows: somebody added tokens and did not resize the embeddings. As long
as no record uses them nothing is wrong. One that does would read the rows that Megatron pads the vocabulary with, which
no Hugging Face folder keeps; as a label it has no logit.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from megatron_idft.corpus.records import Record
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.data.packed.store import PackedStore
from megatron_idft.errors import InputError

_BATCH = 1 << 24  # ids looked at together
_SHOWN = 5


def require_rows(data: PackedStore, tokenizer: ChatTokenizer, rows: int | None) -> None:
    """Refuse data whose tokens the model has no row for.

    Args:
        data: the packs.
        tokenizer: of the data.
        rows: of the model's true vocabulary; None where it is not known.

    Raises:
        InputError: the data holds ids from `rows` on; names the tokens, a place and the remedy.
    """
    if rows is None or tokenizer.vocab_size <= rows:
        return
    largest = data.meta.get("largest_id")  # packs of earlier versions do not say
    if largest is not None and largest < rows:
        return
    tokens = data.token_ids
    first, found = None, set[int]()
    for begin in range(0, len(tokens), _BATCH):
        batch = tokens[begin : begin + _BATCH]
        over = np.flatnonzero(batch >= rows)
        if first is None and len(over):
            first = begin + int(over[0])
        found.update(batch[over].tolist())
    if first is not None:
        file, line = data.place(first)
        raise _error(tokenizer, rows, f"{file}, line {line}", found)


def require_rows_of_records(records: Iterable[Record], tokenizer: ChatTokenizer, rows: int | None) -> None:
    """The same for records whose texts are tokenized later. Reads them all, where the tokenizer has such ids."""
    if rows is None or tokenizer.vocab_size <= rows:
        return
    for record in records:
        texts = [str(message.get("content", "")) for message in record.messages]
        texts += [str(record.answer)] if record.answer is not None else []
        with suppress(ValueError):  # the record's own fault, reported where it is met
            texts.append(tokenizer.template.render(record.messages, add_generation_prompt=True))
        ids = np.concatenate(
            [np.empty(0, np.int32)] + [encoding.ids for encoding in tokenizer.encode_batch(texts, [[]] * len(texts))]
        )
        if len(ids) and ids.max() >= rows:
            raise _error(tokenizer, rows, f"{record.file}, line {record.line}", set(ids[ids >= rows].tolist()))


def _error(tokenizer: ChatTokenizer, rows: int, place: str, ids: set[int]) -> InputError:
    names = ", ".join(f"{tokenizer.decode([i])[:80]!r} (id {i})" for i in sorted(ids)[:_SHOWN])
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return InputError(
        f"{place}: the tokenizer has tokens that the model has no row for: {names}{more}; the model has {rows} rows. "
        "Take the tokenizer that the model was trained with; or give the model rows for them in transformers "
        "(model.resize_token_embeddings(len(tokenizer)), save_pretrained) and begin with that folder; or keep these "
        "texts out of the data"
    )
