"""A conversation whose assistant turns are written anew one after the other, as exact token ids.

The prompt of a turn is the ids so far, followed by the ids of the text that the chat template writes between the last
turn and the next. So tokens that a model drew are never tokenized again from their text. This needs a template that
leaves earlier turns as they are, which every turn proves anew.

Some turns stay as the record has them: those that are not trained, those of negative weight (it is from their very
tokens that the model is to move away), those that only call tools, and those before the last whose reasoning is
written, since most templates take it out once the conversation goes on. Tool calls beside a text are the record's: a
response ends where the model would begin its own. Reasoning of the last turn is a part of the response; what the
template leaves out of earlier turns is left out of their prompts, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.messages import trained_weight
from megatron_idft.corpus.records import Message
from megatron_idft.data.chat.conversations import render_conversation
from megatron_idft.data.chat.mask_proof import Tools
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
        header: the template's text between the generation prompt and the response; mostly empty, sometimes an empty
            thought, or the beginning of one.
        end, end_ids: the end of the turn, with the record's tool calls: text and tokens.
        original_ids: the record's own response, through `end`.
        weight: of the turn's tokens in the loss.
        fixed: the turn stays as it is; then `header` and `end` are not known.
        calls_begin: the text with which a tool call begins; empty where the record's turn has none.
        thought_ends: the text between reasoning and content; empty where the record's turn has no reasoning.
    """

    message: int
    text: str
    ids: Ids
    header: str
    end: str
    end_ids: Ids
    original_ids: Ids
    weight: float = 1.0
    fixed: bool = False
    calls_begin: str = ""
    thought_ends: str = ""

    def ends_its_thought(self, text: str) -> bool:
        """Whether a response does not end inside of the thought that the prompt or itself begins."""
        return not self.thought_ends or self.thought_ends in text or (self.header != "" and self.header not in text)


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

    def __init__(self, tokenizer: ChatTokenizer, messages: list[Message], tools: Tools = None):
        self._tokenizer, self._tools = tokenizer, tools
        self.messages = [dict(message) for message in messages]
        self.turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not self.turns:
            raise ConversationError("no assistant turn: there is nothing to realign")
        self._weights = {i: trained_weight(messages[i]) for i in self.turns}
        for i, message in enumerate(messages):
            if i not in self._weights and trained_weight(message):
                raise ConversationError(
                    f"messages[{i}].loss: what is written trains only what the assistant says. Remove the loss of other"
                    " messages; to train these, drop token_ids and loss_mask from what is written, and give them their"
                    " loss there"
                )
        everything = [{key: value for key, value in m.items() if key != "loss"} for m in messages]
        rendered = render_conversation(tokenizer, everything, tools=tools)
        self._originals = [rendered.text[start:end] for start, end in rendered.spans]
        # As the template writes them at last: without the reasoning that it leaves out.
        self._shown = [dict(message) for message in everything]
        for i, original in zip(self.turns, self._originals, strict=True):
            reasoning = self._shown[i].get("reasoning_content")
            if reasoning and reasoning.strip() not in original:
                del self._shown[i]["reasoning_content"]
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
        text = self._render(self._shown[:message])
        new = text if self._prompt is None else self._between(self._prompt, text, message)
        self._append(encode(tokenizer, new), weight=0.0)
        original = encode_after(tokenizer, text, self._originals[turn])
        frame = None if self._is_fixed(turn) else self._frame(message, text)
        weight = self._weights[message]
        if frame is None:
            self._prompt = TurnPrompt(message, text, self.ids, "", "", original[-1:], original, weight, fixed=True)
        else:
            header, thought_ends, end = frame
            calls_begin = self._calls_begin(message)
            ends = encode(tokenizer, end)
            self._prompt = TurnPrompt(
                message, text, self.ids, header, end, ends, original, weight, False, calls_begin, thought_ends
            )
        return self._prompt

    def accept(self, ids: Ids, content: str | None, weight: float = 1.0) -> None:
        """Take a text for the turn that was begun last.

        Args:
            ids: int32 [n], of the turn with its end.
            content: its new text, with its reasoning; None: the old one.
            weight: of its tokens in the loss. Another one than the record's is also written into the message, as
                `loss`.
        """
        prompt = self._prompt
        assert prompt is not None
        self._append(ids, weight)
        changed: dict[str, Any] = {} if weight == prompt.weight else {"loss": weight}
        if content is None:
            self._written = self._originals[self.turns.index(prompt.message)].removesuffix(prompt.end)
        else:
            self._written = content
            changed |= _fields(prompt, content)
        for messages in (self.messages, self._shown):
            messages[prompt.message] = _without_none({**messages[prompt.message], **changed})

    def _is_fixed(self, turn: int) -> bool:
        message = self.turns[turn]
        said = self._shown[message]
        thinks_before = bool(said.get("reasoning_content")) and turn < len(self.turns) - 1
        return self._weights[message] <= 0 or not str(said["content"]).strip() or thinks_before

    def _render(self, messages: list[Message]) -> str:
        return self._tokenizer.template.render(messages, add_generation_prompt=True, tools=self._tools)

    def _append(self, ids: Ids, weight: float) -> None:
        self.ids = np.concatenate([self.ids, ids])
        self.mask = np.concatenate([self.mask, np.full(len(ids), weight, dtype=np.float64)])

    def _frame(self, message: int, prompt: str) -> tuple[str, str, str] | None:
        """The template's texts before the response, between its reasoning and its content, and after it.

        None where the template does not write a text beside tool calls.
        """
        probe = _probe(self._shown)
        thinks = bool(self._shown[message].get("reasoning_content"))
        changes = {"content": probe} | ({"reasoning_content": f"{probe}R"} if thinks else {})
        last = [*self._shown[:message], {**self._shown[message], **changes}]
        rendered = render_conversation(self._tokenizer, last, tools=self._tools)
        start, end = rendered.spans[-1]
        parts = rendered.text[start:end].split(probe)
        if len(parts) == 2 and not thinks:
            return parts[0], "", parts[1]
        if thinks and rendered.text[:start] != prompt:
            raise TemplateError(
                f"messages[{message}].reasoning_content: the template asks for the turn by another text than stands"
                " before it (its prompt closes or leaves out the thought). Remedy: pass a template that asks for"
                " reasoning with --chat-template FILE, or leave reasoning_content out of the record"
            )
        if len(parts) == 3 and thinks:
            return parts[0], parts[1].removeprefix("R").strip(), parts[2]
        if self._shown[message].get("tool_calls"):
            return None
        what = "reasoning and content" if thinks else "the content"
        raise TemplateError(f"the template does not write {what} of messages[{message}] as they are. {_REMEDY}")

    def _calls_begin(self, message: int) -> str:
        """The text with which the template begins any tool call, as far as it stands on one line."""
        calls = self._shown[message].get("tool_calls")
        if not calls:
            return ""
        probe = _probe(self._shown)
        changed = [{**call, "function": {"name": probe, "arguments": {}}} for call in calls]
        other = [*self._shown[:message], {**self._shown[message], "content": probe, "tool_calls": changed}]
        parts = self._tokenizer.template.render(other, tools=self._tools).split(probe)
        return parts[1].strip().partition("\n")[0].strip() if len(parts) > 2 else ""

    def _between(self, last: TurnPrompt, text: str, message: int) -> str:
        """The part of `text`, the prompt of this turn, that follows the turn before it."""
        if last.fixed:
            before = last.text + self._written
            if text.startswith(before):
                return text.removeprefix(before)
        elif text.startswith(last.text):
            probe = _probe(self._shown)
            probed = [{**m, "content": probe} if i == last.message else m for i, m in enumerate(self._shown[:message])]
            _, found, after = self._render(probed).partition(probe)
            inside = text.removeprefix(last.text).removesuffix(after).strip()
            fits = text.endswith(after) and inside == self._written.strip()
            if found and after.startswith(last.end) and fits:
                return after.removeprefix(last.end)
        raise TemplateError(
            f"once messages[{last.message}] is no longer the last turn, the template writes it otherwise than"
            f" it was asked for or answered (it edits earlier turns), so what was accepted is no history. {_REMEDY}"
        )


def _fields(prompt: TurnPrompt, text: str) -> dict[str, Any]:
    """The fields of a message that says `text`; None: without that field."""
    text = text.removeprefix(prompt.header) if prompt.header else text
    if not prompt.thought_ends:
        return {"content": text}
    reasoning, found, content = text.partition(prompt.thought_ends)
    if not found:
        return {"content": text, "reasoning_content": None}
    return {"content": content.strip(), "reasoning_content": reasoning.strip() or None}


def _without_none(message: Message) -> Message:
    return {key: value for key, value in message.items() if value is not None}


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
