"""Records that carry their own token ids and loss mask, taken as they are.

The columns `token_ids` and `loss_mask` stand beside a record's text, which is then neither rendered nor tokenised: text
that a model wrote often tokenises into other ids than those that it drew, and those that it drew are its own samples.
The mask may hold weights: numbers other than 0 and 1, also negative ones, by which the loss of the token is multiplied.
What a chat template cannot render, such as a list of tools, is no reason to refuse such a record.
"""

import json
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_idft.corpus.messages import LEAST_WEIGHT, is_weight
from megatron_idft.corpus.records import Record
from megatron_idft.data.chat.conversations import EncodedConversation
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import RecordError

_REMEDY = (
    "use the tokenizer and chat template that the ids were made with, or drop the columns token_ids and loss_mask to "
    "tokenize the text anew"
)


class PretokenizedReader:
    """Reads the columns `token_ids`, `loss_mask` and `tokenizer_fingerprint` of records, for one tokenizer.

    Args:
        tokenizer: of the training.
        last_turn_only: as the flag says; a mask with more than one trained span contradicts it and is refused.
    """

    def __init__(self, tokenizer: ChatTokenizer, last_turn_only: bool = False):
        self._tokenizer, self._last_turn_only = tokenizer, last_turn_only
        self._special = np.array(sorted(tokenizer.special_ids.values()), dtype=np.int64)

    @cached_property
    def _fingerprint(self) -> str:  # it serialises the whole vocabulary: once, not for each record
        return self._tokenizer.fingerprint()

    def read(self, record: Record) -> EncodedConversation | None:
        """The record's own ids and mask; None if it has none, and is to be tokenised. Both leave `record.extra`.

        `end_ids` are the special tokens that end a trained span: a span that was cut off ends with another token.

        Raises:
            RecordError: names the column: one of the two is missing; they are not lists of numbers of one length, at
                least 2; an id outside the vocabulary; a mask value that is no weight; no trained token; a trained first
                token; several trained spans under `last_turn_only`; or `tokenizer_fingerprint` is there and not that of
                this tokenizer and its chat template.
        """
        ids, mask = record.extra.pop("token_ids", None), record.extra.pop("loss_mask", None)
        if ids is None and mask is None:
            return None
        try:
            self._check(ids, mask, record.extra.get("tokenizer_fingerprint"))
        except _ColumnError as error:
            raw = json.dumps(record.messages, ensure_ascii=False, default=str)
            raise RecordError(record.file, record.line, error.column, error.reason, raw) from None
        tokens, weights = np.array(ids, dtype=np.int32), np.array(mask, dtype=np.float32)
        trained = (weights != 0).astype(np.uint8)
        last_of_spans = tokens[(trained == 1) & (np.append(trained[1:], 0) == 0)]
        end_ids = {int(i) for i in last_of_spans[np.isin(last_of_spans, self._special)]}
        own = None if np.array_equal(weights, trained) else weights
        return EncodedConversation(tokens, trained, end_ids, straddles=0, pretokenized=True, weights=own)

    def _check(self, ids: Any, mask: Any, fingerprint: Any) -> None:
        for column, value, other in (("token_ids", ids, "loss_mask"), ("loss_mask", mask, "token_ids")):
            if value is None:
                raise _ColumnError(column, f"missing beside {other}: give both columns or neither")
        _check_numbers("token_ids", ids, {int}, "an integer")
        _check_numbers("loss_mask", mask, {int, float}, "a number")
        if fingerprint is not None:
            if not isinstance(fingerprint, str):
                raise _ColumnError("tokenizer_fingerprint", f"expected a string, found {_shown(fingerprint)}")
            if fingerprint != self._fingerprint:
                raise _ColumnError(
                    "tokenizer_fingerprint",
                    f"the ids were made with the tokenizer and chat template {_shown(fingerprint)}, these are "
                    f"{_shown(self._fingerprint)}: {_REMEDY}",
                )
        if len(ids) != len(mask):
            raise _ColumnError("loss_mask", f"{len(mask)} values for {len(ids)} token_ids, expected one for each")
        if len(ids) < 2:
            raise _ColumnError("token_ids", f"{len(ids)} tokens; at least 2 are needed, one to predict the other from")
        # Whole lists are looked at only by min and max: corpora hold billions of ids.
        size = self._tokenizer.vocab_size
        if min(ids) < 0 or max(ids) >= size:
            at = next(i for i, value in enumerate(ids) if not 0 <= value < size)
            raise _ColumnError(
                f"token_ids[{at}]", f"{_shown(ids[at])} is outside this tokenizer's vocabulary of {size} ids: {_REMEDY}"
            )
        if not set(mask) <= {0, 1}:
            at = next((i for i, value in enumerate(mask) if not is_weight(value)), -1)
            if at >= 0:
                raise _ColumnError(
                    f"loss_mask[{at}]",
                    f"{_shown(mask[at])} is no weight: it must be 0 or of a size between {LEAST_WEIGHT:.1e} and 3e38",
                )
        if not any(mask):
            raise _ColumnError("loss_mask", "no token is trained: nothing to train on")
        if mask[0]:
            raise _ColumnError("loss_mask[0]", "the first token cannot be trained: nothing predicts it")
        spans = sum(b != 0 and not a for a, b in pairwise(mask)) if self._last_turn_only else 1
        if spans > 1:
            raise _ColumnError(
                "loss_mask",
                f"{spans} trained spans, but only the last turn is to be trained: set the others to 0, drop the "
                "columns token_ids and loss_mask, or drop --sft-last-turn-only",
            )


class _ColumnError(Exception):
    def __init__(self, column: str, reason: str):
        super().__init__(column, reason)
        self.column, self.reason = column, reason


def _check_numbers(column: str, values: Any, types: set[type], what: str) -> None:
    if not isinstance(values, list):
        raise _ColumnError(column, f"expected a list of {what.split()[1]}s, found {_shown(values)}")
    if not set(map(type, values)) <= types:  # true and false are refused, though Python counts them as integers
        at = next(i for i, value in enumerate(values) if type(value) not in types)
        raise _ColumnError(f"{column}[{at}]", f"expected {what}, found {_shown(values[at])}")


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:80]
