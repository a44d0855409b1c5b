"""Probes: letters that stand in for what a message says, to find where a chat template writes it."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_idft.corpus.records import Message

Probes = dict[str, list[str]]  # field of a message -> the letters that stand for it; one text for each tool call


@dataclass
class ProbedConversation:
    """A conversation with probes in place of its texts. No probe occurs in `text` or in any message.

    messages: of the conversation. text: all of it, rendered.
    """

    messages: list[Message]
    text: str

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
                if str(message["content"]).strip() or not (fields or calls):
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

    def find(self, i: int, text: str) -> tuple[int, int] | None:
        """Where the first probe of messages[i] begins in `text`, and where its last one ends; None: it holds none."""
        probes = [probe for letters in self.probes[i].values() for probe in letters if probe in text]
        if not probes:
            return None
        return min(text.find(probe) for probe in probes), max(text.rfind(probe) + len(probe) for probe in probes)


def _with_arguments(call: Any, arguments: dict[str, str]) -> Any:
    return {**call, "function": {**call["function"], "arguments": arguments}}
