"""`render_conversation` for many conversations of few structures, with one rendering each instead of about six.

`render_conversation` proves where the trained spans stand: it renders a conversation several times, with probes in
place of the contents. Conversations of the same roles differ only in their contents. So one conversation of probes is
proven for each such structure; its text is that of the template, with probes in between. A conversation whose own text
is exactly that, with its contents in place of the probes (or with their blanks trimmed, as many templates do), has its
spans in the same places. Any other is proven for itself: a template that looks at the contents, tools, reasoning,
weights, special tokens spelled in a text. The first conversations of each structure are proven for themselves too, and
their spans must then be those found the short way.

One assumption remains: the prompt which a template writes for the next turn stands in no training text. Nothing shows
whether it begins to depend on the contents after these first conversations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_idft.corpus.messages import Message
from megatron_idft.corpus.records import Record
from megatron_idft.data.chat.conversations import RenderedConversation, render_conversation
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import ConversationError, TemplateError

_PROVEN_IN_FULL = 8  # of each structure


@dataclass(slots=True)
class _Structure:
    """constants: the template's texts before, between and after the contents. spans: ((constant, offset in it)
    of the beginning, the same of the end). left: conversations still to be proven in full."""

    constants: list[str]
    spans: list[tuple[tuple[int, int], tuple[int, int]]]
    left: int = _PROVEN_IN_FULL


class Renderer:
    """Renders records by one tokenizer's template, and remembers the structures that it has met."""

    def __init__(self, tokenizer: ChatTokenizer, last_turn_only: bool):
        self._tokenizer, self._last_turn_only = tokenizer, last_turn_only
        self._structures: dict[tuple[str, ...], _Structure | None] = {}

    def render(self, record: Record) -> RenderedConversation:
        """The result of `render_conversation` for the record, or its error."""
        short = None if record.tools else self._short(record.messages)
        if short is not None:
            structure, rendered = short
            if not structure.left:
                return rendered
            structure.left -= 1
        whole = render_conversation(
            self._tokenizer, record.messages, tools=record.tools, last_turn_only=self._last_turn_only
        )
        if short is not None and whole != rendered:
            self._structures[_roles(record.messages)] = None  # no shorter way for these
        return whole

    def _short(self, messages: list[Message]) -> tuple[_Structure, RenderedConversation] | None:
        if any(len(message) != 2 for message in messages):  # more than role and content
            return None
        roles = _roles(messages)
        if roles not in self._structures:
            self._structures[roles] = self._structure(messages)
        structure = self._structures[roles]
        if structure is None:
            return None
        contents = [str(message["content"]) for message in messages]
        try:
            text = self._tokenizer.template.render(messages)
        except (ConversationError, TemplateError):
            return None  # the long way says why
        if text != _filled(structure.constants, contents):
            contents = [content.strip() for content in contents]
            if text != _filled(structure.constants, contents):
                return None
        if any(map(self._tokenizer.special_pattern.search, contents)) or "\ue0f0" in text:  # marks of the template's
            return None
        begins, at = [], 0  # of the constants
        for constant, content in zip(structure.constants, [*contents, ""], strict=True):
            begins.append(at)
            at += len(constant) + len(content)
        spans = [(begins[a] + i, begins[b] + j) for (a, i), (b, j) in structure.spans]
        return structure, RenderedConversation(text, spans, weights=[1.0] * len(spans))

    def _structure(self, messages: list[Message]) -> _Structure | None:
        probes = [f"Content{'i' * number}of" for number in range(len(messages))]
        probed = [{**message, "content": probe} for message, probe in zip(messages, probes, strict=True)]
        try:
            proven = render_conversation(self._tokenizer, probed, last_turn_only=self._last_turn_only)
        except (ConversationError, TemplateError):
            return None  # the long way says why
        constants, rest = [], proven.text
        for probe in probes:
            before, found, rest = rest.partition(probe)
            if not found:
                return None
            constants.append(before)
        constants.append(rest)
        if proven.unwritten or proven.spells_special or any(p in c for p in probes for c in constants):
            return None
        begins = [0]
        for constant, probe in zip(constants, probes, strict=False):
            begins.append(begins[-1] + len(constant) + len(probe))
        spans = [(_place(start, begins, constants), _place(end, begins, constants)) for start, end in proven.spans]
        if not all(start and end for start, end in spans):
            return None
        return _Structure(constants, [(start, end) for start, end in spans if start and end])


def _place(at: int, begins: list[int], constants: Sequence[str]) -> tuple[int, int] | None:
    """The constant that holds a position or ends there, and where in it; None inside a probe."""
    for number, (begin, constant) in enumerate(zip(begins, constants, strict=True)):
        if begin <= at <= begin + len(constant):
            return number, at - begin
    return None


def _roles(messages: list[Message]) -> tuple[str, ...]:
    return tuple(message["role"] for message in messages)


def _filled(constants: list[str], contents: list[str]) -> str:
    parts = [part for pair in zip(constants, contents, strict=False) for part in pair]
    return "".join([*parts, constants[-1]])
