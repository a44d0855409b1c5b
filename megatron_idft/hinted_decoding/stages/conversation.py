"""A conversation whose assistant turns are written anew one after the other, as exact token ids.

The prompt of a turn is the ids so far, followed by the ids of the text that the chat template writes between the last
turn and the next. So tokens that a model drew are never tokenized again from their text. This needs a template that
leaves earlier turns as they are, which every turn proves anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.messages import trained_weight
from megatron_idft.corpus.records import Message
from megatron_idft.data.chat.conversations import render_conversation
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import ConversationError, TemplateError

Ids = NDArray[np.int32]

_REMEDY = (
    "Remedy: pass a template that keeps earlier turns as they are with --chat-template FILE, or split the conversation"
    " into one record for each of its assistant turns"
)


@dataclass(frozen=True, slots=True)
class TurnPrompt:
    """The prompt of one assistant turn, and the template's frame of the turn.

    Attributes:
        message: the turn's index in `messages`.
        text, ids: the conversation up to the turn, with the generation prompt.
        header: the template's text between the generation prompt and the content; mostly empty, sometimes an empty
            thought.
        end, end_ids: the end of the turn, text and tokens.
        original_ids: the record's own response, through `end`.
    """

    message: int
    text: str
    ids: Ids
    header: str
    end: str
    end_ids: Ids
    original_ids: Ids


class RunningConversation:
    """A record's conversation with the turns that were accepted so far.

    Attributes:
        messages: the accepted turns hold their new text.
        turns: indices of the assistant's messages.
        ids: int32 [n], through the last accepted turn.
        mask: float64 [n], the weight of each token in the loss: 0 but on the tokens of accepted turns.

    Raises:
        ConversationError, TemplateError: as when the record is tokenized for training, and where there is no assistant
            turn.
    """

    def __init__(self, tokenizer: ChatTokenizer, messages: list[Message]):
        self._tokenizer = tokenizer
        self.messages = [dict(message) for message in messages]
        self.turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not self.turns:
            raise ConversationError("no assistant turn: there is nothing to realign")
        for i in self.turns:
            for key in ("tool_calls", "reasoning_content"):
                if messages[i].get(key):
                    raise ConversationError(
                        f"messages[{i}].{key} is not served: assistant turns with tool calls or reasoning are not"
                        " realigned yet"
                    )
            if trained_weight(messages[i]) != 1:
                raise ConversationError(
                    f"messages[{i}].loss is not served: every assistant turn is realigned, and trained alike"
                )
        rendered = render_conversation(tokenizer, messages)
        self._originals = [rendered.text[start:end] for start, end in rendered.spans]
        self.ids: Ids = np.zeros(0, dtype=np.int32)
        self.mask = np.zeros(0, dtype=np.float64)
        self._prompt: TurnPrompt | None = None  # of the last turn that was begun
        self._written = ""  # the text that was accepted there

    def begin(self, turn: int) -> TurnPrompt:
        """The prompt of the assistant's turn number `turn`, counted from 0; those before it must have been accepted.

        Raises:
            ConversationError, TemplateError: the template cannot write this turn.
        """
        tokenizer, message = self._tokenizer, self.turns[turn]
        history = self.messages[:message]
        text = tokenizer.template.render(history, add_generation_prompt=True)
        new = text if self._prompt is None else self._between(self._prompt, text, message)
        self._append(encode(tokenizer, new), weight=0.0)
        header, end = self._frame(message)
        end_ids = encode(tokenizer, end)
        original = encode_after(tokenizer, text, self._originals[turn])
        self._prompt = TurnPrompt(message, text, self.ids, header, end, end_ids, original)
        return self._prompt

    def accept(self, ids: Ids, content: str | None, weight: float = 1.0) -> None:
        """Take a text for the turn that was begun last.

        Args:
            ids: int32 [n], of the turn with its end.
            content: its new text; None: the old one.
            weight: of its tokens in the loss. Another one than 1 is also written into the message, as `loss`.
        """
        prompt = self._prompt
        assert prompt is not None
        self._append(ids, weight)
        if weight != 1:
            self.messages[prompt.message] = {**self.messages[prompt.message], "loss": weight}
        if content is None:
            self._written = self._originals[self.turns.index(prompt.message)].removesuffix(prompt.end)
        else:
            self._written = content
            content = content.removeprefix(prompt.header) if prompt.header else content
            self.messages[prompt.message] = {**self.messages[prompt.message], "content": content}

    def _append(self, ids: Ids, weight: float) -> None:
        self.ids = np.concatenate([self.ids, ids])
        self.mask = np.concatenate([self.mask, np.full(len(ids), weight, dtype=np.float64)])

    def _frame(self, message: int) -> tuple[str, str]:
        """The template's text between the generation prompt and the turn's content, and its end of the turn."""
        probe = _probe(self.messages)
        probed = self._with_content(message, probe)
        rendered = render_conversation(self._tokenizer, probed[: message + 1])
        start, end = rendered.spans[-1]
        header, found, ending = rendered.text[start:end].partition(probe)
        if not found:
            raise TemplateError(f"the template does not write the content of messages[{message}] as it is. {_REMEDY}")
        return header, ending

    def _between(self, last: TurnPrompt, text: str, message: int) -> str:
        """The part of `text`, the prompt of this turn, that follows the turn before it."""
        probe = _probe(self.messages)
        probed = self._with_content(last.message, probe)[:message]
        _, found, after = self._tokenizer.template.render(probed, add_generation_prompt=True).partition(probe)
        inside = text.removeprefix(last.text).removesuffix(after).strip()
        if (
            not found
            or not after.startswith(last.end)
            or not text.startswith(last.text)
            or not text.endswith(after)
            or inside != self._written.strip()
        ):
            raise TemplateError(
                f"once messages[{last.message}] is no longer the last turn, the template writes it otherwise than"
                f" it was asked for or answered (it edits earlier turns), so what was accepted is no history. {_REMEDY}"
            )
        return after.removeprefix(last.end)

    def _with_content(self, message: int, content: str) -> list[Message]:
        return [{**m, "content": content} if i == message else m for i, m in enumerate(self.messages)]


def encode(tokenizer: ChatTokenizer, text: str) -> Ids:
    [encoding] = tokenizer.encode_batch([text], [[]])
    return encoding.ids


def encode_after(tokenizer: ChatTokenizer, before: str, text: str) -> Ids:
    """The tokens of `text` after `before`; where the two share a token, those of `text` by itself."""
    [encoding] = tokenizer.encode_batch([before + text], [[len(before)]])
    if encoding.straddled[0]:
        return encode(tokenizer, text)
    return encoding.ids[encoding.first[0] :]


def _probe(messages: list[dict[str, Any]]) -> str:
    """Letters that occur in no message."""
    probe = "Probe"
    while any(probe in str(message["content"]) for message in messages):
        probe += "x"
    return probe
