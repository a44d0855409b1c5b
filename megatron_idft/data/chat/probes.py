"""Where a turn stands in a text: letters that stand in for what it says (probes), and the token that ends it.

Without that special token in the loss, a model does not learn to stop.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_idft.corpus.records import Message
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import TemplateError

Span = tuple[int, int]  # [start, end) characters
# How a template may be asked for its generation prompt: by default, or told whether the model is to think.
THINKING = (None, False, True)
UNPROVEN = "the loss mask cannot be proven"
Probes = dict[str, list[str]]  # field of a message -> the letters that stand for it; one text for each tool call
_THOUGHT = re.compile(r"(\s*<think>\s*)\S.*?(\s*</think>\s*)\S.*", re.DOTALL)


@dataclass
class ProbedConversation:
    """A conversation with probes in place of its texts. No probe occurs in `text` or in any message.

    Attributes:
        messages: of the conversation.
        text: all of it, rendered.
        keep_tags: reasoning that an assistant's content holds keeps its `<think>` and `</think>`, with a probe between
            them and one for the answer.
    """

    messages: list[Message]
    text: str
    keep_tags: bool = False

    @cached_property
    def _word(self) -> str:
        given, word = json.dumps(self.messages, ensure_ascii=False, default=str), "Probe"
        while word in self.text or word in given:
            word += "x"
        return word

    @cached_property
    def pattern(self) -> str:
        """A regular expression that matches each probe, and nothing else of the texts."""
        return f"{self._word}[a-j]+Z"

    @cached_property
    def probes(self) -> list[Probes]:
        """For each message, the probes of its fields in the order in which templates write them."""
        count = 0

        def probe() -> str:
            nonlocal count
            count += 1
            return f"{self._word}{''.join(chr(ord('a') + int(digit)) for digit in str(count))}Z"

        found: list[Probes] = []
        for message in self.messages:
            fields: Probes = {}
            if message["role"] == "assistant":
                calls = message.get("tool_calls") or []
                if message.get("reasoning_content"):
                    fields["reasoning_content"] = [probe()]
                if self.keep_tags and reasons_in_content(message):
                    fields["content"] = [probe(), probe()]
                elif str(message["content"]).strip() or not (fields or calls):
                    fields["content"] = [probe()]
                if calls:
                    fields["tool_calls"] = [probe() for _ in calls]
            else:
                fields["content"] = [probe()]
            found.append(fields)
        return found

    def turn(self, i: int) -> Message:
        """messages[i], an assistant's, with probes for its content, its reasoning and the arguments of its calls."""
        message, probes = dict(self.messages[i]), self.probes[i]
        for field, letters in probes.items():
            if field == "tool_calls":
                calls = zip(message["tool_calls"], letters, strict=True)
                message["tool_calls"] = [_with_arguments(call, {probe: probe}) for call, probe in calls]
            elif len(letters) == 2:
                thought = _THOUGHT.fullmatch(message[field])
                assert thought is not None
                message[field] = thought[1] + letters[0] + thought[2] + letters[1]
            else:
                message[field] = letters[0]
        return message

    def with_turn(self, i: int) -> list[Message]:
        return [*self.messages[:i], self.turn(i), *self.messages[i + 1 :]]

    @cached_property
    def everywhere(self) -> list[Message]:
        """All messages with their probes. Texts that are not the assistant's keep their beginning and end around it:
        some templates look at these."""
        probed = []
        for i, message in enumerate(self.messages):
            if message["role"] == "assistant":
                probed.append(self.turn(i))
            else:
                content, [probe] = str(message["content"]), self.probes[i]["content"]
                middle = len(content) // 2
                while content[middle:] and content[middle].isspace():  # some templates strip what they write
                    middle += 1
                probed.append({**message, "content": content[:middle] + probe + content[middle:]})
        return probed

    @cached_property
    def owners(self) -> dict[str, tuple[int, str]]:
        """The message and the field that each probe stands for."""
        return {
            probe: (i, field)
            for i, fields in enumerate(self.probes)
            for field, probes in fields.items()
            for probe in probes
        }

    def found(self, text: str) -> Iterator[tuple[re.Match[str], int, str]]:
        """The probes in a text, in order, each with the index of its message and its field."""
        for match in re.finditer(self.pattern, text):
            yield match, *self.owners[match.group()]

    def find(self, i: int, text: str) -> tuple[int, int] | None:
        """Where the first probe of messages[i] begins in `text`, and where its last one ends; None: it holds none."""
        probes = [probe for letters in self.probes[i].values() for probe in letters if probe in text]
        if not probes:
            return None
        return min(text.find(probe) for probe in probes), max(text.rfind(probe) + len(probe) for probe in probes)


def reasons_in_content(message: Message) -> bool:
    """Whether the content is reasoning between `<think>` and `</think>`, and an answer."""
    return message["role"] == "assistant" and _THOUGHT.fullmatch(str(message["content"])) is not None


def _with_arguments(call: Any, arguments: dict[str, str]) -> Any:
    return {**call, "function": {**call["function"], "arguments": arguments}}


def end_of_turn(tokenizer: ChatTokenizer, after: str, ends_with_call: bool) -> Span | None:
    """Where in `after`, the template's text after what the assistant says, the end of the turn stands; None: nowhere.

    That is the first special token, with the special tokens that follow it directly (Cohere's templates end with two),
    but never the BOS of a next turn. After tool calls, whose own special tokens come first, it is the EOS token if the
    template writes it.
    """
    bos, eos = bos_only(tokenizer), tokenizer.eos_id
    tokens = list(tokenizer.special_pattern.finditer(after))
    if ends_with_call and any(tokenizer.special_ids[token.group()] == eos for token in tokens):
        while tokenizer.special_ids[tokens[0].group()] != eos:
            tokens.pop(0)
    begin = end = None
    for token in tokens:
        if tokenizer.special_ids[token.group()] == bos or end not in (None, token.start()):
            break
        begin, end = token.start() if begin is None else begin, token.end()
    return None if begin is None or end is None else (begin, end)


def never_ends(after: str) -> TemplateError:
    """The error of a template that ends no turn, for what it writes after an answer."""
    return TemplateError(
        f"{UNPROVEN}: the template never ends the assistant's turn with a special token of this tokenizer "
        f"(after the answer it writes {after[:80]!r}), so the model would not learn to stop. "
        "Remedy: write the EOS or end-of-turn token after the answer, inside the {% generation %} block if there "
        "is one, and pass the template with --chat-template FILE"
    )


def bos_only(tokenizer: ChatTokenizer) -> int | None:
    """The id of BOS, None where the same token is the EOS."""
    return None if tokenizer.bos_id == tokenizer.eos_id else tokenizer.bos_id  # GPT-2 has one token for both


def common(a: str, b: str) -> str:
    """The common beginning."""
    length = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]
