"""Texts that another engine wrote, in the place of the responses and analyses that would be decoded here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import InputError
from megatron_idft.hinted_decoding.input.provided import Kind, ProvidedText, prompt_sha256
from megatron_idft.hinted_decoding.stages.candidates import (
    Candidate,
    Floats,
    Ids,
    cut_before,
    from_completion,
    from_text,
)
from megatron_idft.hinted_decoding.stages.conversation import TurnPrompt, encode_after
from megatron_idft.hinted_decoding.stages.needs import Steps, score
from megatron_idft.inference.requests import Completion, Request

_REMEDY = "write the prompts by `realign prompts` and the texts anew, or take the line out"


def check_given(kind: Kind, given: ProvidedText, prompt: Ids, tokenizer: ChatTokenizer) -> None:
    """Refuse a text that answers another prompt, or whose token ids say something else.

    Args:
        kind: of the file, for the message.
        given: the text.
        prompt: int32 [n], what it should answer.
        tokenizer: of the model.

    Raises:
        InputError: in the words for a record.
    """
    if given.prompt_sha256 not in (None, prompt_sha256(prompt)):
        raise InputError(f"--{kind} answers another prompt than this record has now: {_REMEDY}")
    if given.token_ids is not None:
        stops = set(tokenizer.special_ids.values())
        ids = [i for i in given.token_ids if i not in stops]
        if _letters(tokenizer.decode(ids)) != _letters(tokenizer.special_pattern.sub("", given.text)):
            raise InputError(
                f"--{kind} has a text that its token_ids do not spell: take out the token_ids of edited texts"
            )


def read_rollouts(
    prompt: TurnPrompt, rollouts: Collection[ProvidedText], tokenizer: ChatTokenizer, max_positions: int
) -> Steps[list[Candidate]]:
    """The candidates that these responses to `prompt` are, scored here."""
    rollouts = [_without_calls(given, prompt) for given in rollouts]
    room = max_positions - len(prompt.ids)
    written = [_response_ids(prompt, given, tokenizer) for given in rollouts]
    scored = yield from score([np.concatenate([prompt.ids, ids[:room]]) for ids in written])
    first = len(prompt.ids) - 1
    made = [
        _candidate(prompt, given, ids, room, log_prob[first:], entropy[first:], tokenizer)
        for given, ids, (log_prob, entropy) in zip(rollouts, written, scored, strict=True)
    ]
    for candidate in made:
        candidate.finished = candidate.finished and prompt.ends_its_thought(candidate.text)
    return made


def analysis_ids(given: ProvidedText, text: str, tokenizer: ChatTokenizer) -> Ids:
    """The tokens of an analysis after the prompt `text`."""
    if given.token_ids is not None:
        return np.array(given.token_ids, dtype=np.int32)
    return encode_after(tokenizer, text, given.text)


def _without_calls(given: ProvidedText, prompt: TurnPrompt) -> ProvidedText:
    """A text up to the tool calls in it: the record's stand there instead. Token ids are cut once they are scored."""
    if not prompt.calls_begin or given.token_ids is not None:
        return given
    return replace(given, text=given.text.partition(prompt.calls_begin)[0].rstrip())


def _response_ids(prompt: TurnPrompt, given: ProvidedText, tokenizer: ChatTokenizer) -> Ids:
    if given.token_ids is not None:
        return np.array(given.token_ids, dtype=np.int32)
    return encode_after(tokenizer, prompt.text, given.text + prompt.end)


def _candidate(
    prompt: TurnPrompt,
    given: ProvidedText,
    ids: Ids,
    room: int,
    log_prob: Floats,
    entropy: Floats,
    tokenizer: ChatTokenizer,
) -> Candidate:
    """log_prob, entropy: fp32, of the first `room` of the ids."""
    fits, ids = len(ids) <= room, ids[:room]
    if given.token_ids is None:
        return from_text(given.text, ids, fits, log_prob, entropy)
    ended = int(ids[-1]) in (int(prompt.end_ids[-1]), tokenizer.eos_id)
    completion = Completion(
        Request("", prompt.ids),
        ids,
        "context" if not fits else "eos" if ended else "length",
        log_prob,
        entropy,
        hint_share=np.zeros(len(ids), dtype=np.float32),
        hinted_entropy=np.full(len(ids), np.nan, dtype=np.float32),
    )
    if prompt.calls_begin:
        completion = cut_before(completion, prompt.calls_begin, prompt.end_ids, tokenizer.decode)
    candidate = from_completion(completion, "rollout", prompt.end_ids, tokenizer.eos_id, tokenizer.decode)
    candidate.seed = None
    return candidate


def _letters(text: str) -> str:
    """Without blanks, and without characters that were cut in their bytes, which engines spell in their own ways."""
    return "".join(text.replace("\ufffd", "").split())
