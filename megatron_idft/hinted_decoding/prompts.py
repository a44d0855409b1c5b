"""The texts that show the model a reference: the stage that analyses it, and the plain hint without an analysis.

A template file begins with lines `key: value`, then a line `---`, then Jinja text that becomes one user message:

    marker: # CoT            the line between the model's analysis and its reply, with nothing else on it if the
                             after-marker begins with a line break; none: a hint without analysis
    after-marker: "\\n\\n"     JSON text that follows the marker in the hinted prompt, whether the model wrote it or
                             not; if it is line breaks only, those that the model wrote there stand for it

The text sees `conversation` (the messages up to the reply, without the system message: role, and content with the tool
calls behind it), `question` (the last of them that the user wrote), `solution` (the reference reply, as the record has
it, its reasoning first), `answer` (its final answer, empty if there is none) and `boxed` (whether the reference boxes
it). The record's system message stands before it, as in the plain prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_idft.corpus.records import Message
from megatron_idft.errors import InputError

_HEADER = ("marker", "after-marker")
_VARIABLES = {"conversation", "question", "solution", "answer", "boxed"}
_BOX = "\\boxed"


@dataclass(frozen=True)
class HintTemplate:
    """A template file, read and checked.

    Attributes:
        name: of the file, for messages.
        source: the file's content.
        marker: None for a hint without analysis.
        after_marker: the text that follows the marker in the hinted prompt.
        text: the Jinja text.

    Raises:
        InputError: header or text cannot be used; the message names the file.
    """

    name: str
    source: str = field(repr=False)
    marker: str | None = field(init=False)
    after_marker: str = field(init=False)
    text: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        head, separator, text = f"\n{self.source}".partition("\n---\n")
        if not separator:
            raise InputError(f"{self.name}: no line `---` between header and text; see templates/analysis.txt")
        header = dict(self._header_line(line) for line in head.splitlines() if line.strip())
        object.__setattr__(self, "marker", header.get("marker"))
        object.__setattr__(self, "after_marker", self._after_marker(header.get("after-marker", '""')))
        object.__setattr__(self, "text", text)
        self._check()

    @cached_property
    def sha256(self) -> str:
        """Of the whole file: identifies the template."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @cached_property
    def sees_conversation(self) -> bool:
        """Whether the text uses `conversation`, and so the responses of earlier turns."""
        return "conversation" in meta.find_undeclared_variables(_environment().parse(self.text))

    def render(self, conversation: Sequence[Message], solution: str, answer: str | None) -> list[Message]:
        """The messages that ask for the hinted reply.

        Args:
            conversation: the messages up to the reply.
            solution: the reference reply.
            answer: its final answer, if it has one.

        Raises:
            InputError: the template fails on this record.
        """
        system = [message for message in conversation[:1] if message["role"] == "system"]
        rest = [{"role": m["role"], "content": _readable(m)} for m in conversation[len(system) :]]
        questions = [message["content"] for message in rest if message["role"] == "user"]
        try:
            text = self._template.render(
                conversation=rest,
                question=questions[-1] if questions else "",
                solution=solution,
                answer=answer or "",
                boxed=_BOX in solution,
            )
        except Exception as error:  # whatever a template of the user's may raise
            raise InputError(f"{self.name}: the template failed: {type(error).__name__}: {error}") from error
        return [*system, {"role": "user", "content": text.strip()}]

    @cached_property
    def _template(self) -> jinja2.Template:
        template: jinja2.Template = _environment().from_string(self.text)
        return template

    def _header_line(self, line: str) -> tuple[str, str]:
        key, _, value = line.partition(":")
        if key not in _HEADER:
            raise InputError(f"{self.name}: header line {line!r}; the header knows {', '.join(_HEADER)}")
        if not value.strip():
            raise InputError(f"{self.name}: header line {line!r} has no value")
        return key, value.strip()

    def _after_marker(self, value: str) -> str:
        try:
            text = json.loads(value)
        except ValueError:
            text = None
        if not isinstance(text, str):
            raise InputError(f'{self.name}: after-marker must be a JSON text such as "\\n", found {value}')
        return text

    def _check(self) -> None:
        try:
            used = meta.find_undeclared_variables(_environment().parse(self.text))
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"{self.name}: not valid Jinja: {error.message} (line {error.lineno} of the text)"
            ) from error
        if unknown := sorted(used - _VARIABLES):
            raise InputError(
                f"{self.name}: unknown {', '.join(unknown)}; the text may use {', '.join(sorted(_VARIABLES))}"
            )
        if not used & {"conversation", "question"} or not used & {"solution", "answer"}:
            raise InputError(f"{self.name}: the text must use question or conversation, and solution or answer")
        if self.marker is not None and self.marker not in self.text:
            raise InputError(f"{self.name}: the text never asks for the marker {self.marker!r}")


def _readable(message: Message) -> str:
    """The content of a message, with the calls of tools that it makes."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [f"{f['name']}({json.dumps(f.get('arguments') or {}, ensure_ascii=False)})" for f in functions]
    return "\n".join(part for part in (str(message["content"]), *calls) if part)


def _environment() -> Any:
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
