"""The proof of mask_proof.py for what others than the assistant say (users, the system, tools), where it is trained.

Their letters are known, since they are the record's own, so the proof is a stricter one: the text must be what the
template writes around probes, letter by letter, with the contents in the probes' places (as they are, trimmed, or as
JSON writes them). A template that leaves a content out, writes it twice or rewrites it, or whose other text depends on
it, proves nothing. Where the content stands does not matter: some templates write the system's into the first question.

The span is the content, and the special token behind it that ends the message, where the template proves one: nothing
but blanks lies between, and it is written whether a message follows or not. Others open the next message with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_idft.corpus.records import Message
from megatron_idft.data.chat.probes import UNPROVEN, Span, common, end_of_turn
from megatron_idft.errors import ConversationError, TemplateError

if TYPE_CHECKING:
    from megatron_idft.data.chat.mask_proof import Finder

_REMEDY = (
    'set its "loss" to 0 (under --sft-prompt-weight every user and system message has one), or pass a template that '
    "writes it once, as it is, with --chat-template FILE"
)
# How templates write a content.
_FORMS = (str, str.strip, lambda content: json.dumps(content, ensure_ascii=False)[1:-1])


def prove_prompts(finder: Finder, prompts: Sequence[int]) -> list[Span]:
    """Where the messages with the indices `prompts`, none of them the assistant's, stand in `finder.text`.

    Raises:
        ConversationError: the template does not write such a message.
        TemplateError: the template proves nothing.
    """
    if not prompts:
        return []
    spans = _around(finder, prompts) or [_alone(finder, i) for i in prompts]
    ends = _Ends(finder)
    return [(start, end + ends.behind(i, end)) for i, (start, end) in zip(prompts, spans, strict=True)]


def _around(finder: Finder, prompts: Sequence[int]) -> list[Span] | None:
    """The contents of all `prompts` by one rendering; None where it does not prove them."""
    text = _probed(finder, {i: finder.conversation.probes[i]["content"][0] for i in prompts})
    found = [(probe, i) for probe, i, _ in finder.conversation.found(text)]
    if sorted(i for _, i in found) != sorted(prompts):
        return None
    bounds = [0, *(at for probe, _ in found for at in probe.span()), len(text)]
    constants = [text[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    for form in _FORMS:
        contents = {i: form(str(finder.messages[i]["content"])) for _, i in found}
        spans, at = {}, 0
        for constant, (_, i) in zip(constants, found, strict=False):
            spans[i] = at + len(constant), at + len(constant) + len(contents[i])
            at = spans[i][1]
        parts = [part for pair in zip(constants, contents.values(), strict=False) for part in pair]
        if "".join([*parts, constants[-1]]) == finder.text:
            return [spans[i] for i in prompts]
    return None


def _alone(finder: Finder, i: int) -> Span:
    """The content of messages[i]: with a probe in its place, or else, since some templates look at how it begins and
    ends, with a probe in its middle."""
    alone = _around(finder, [i])
    if alone is not None:
        return alone[0]
    probe, role = finder.conversation.probes[i]["content"][0], finder.messages[i]["role"]
    said = str(finder.conversation.everywhere[i]["content"])
    text = _probed(finder, {i: said})
    if probe not in text:
        raise ConversationError(
            f"messages[{i}].content: the template does not write what this {role} message says, or not with these "
            f"words, and its weight is to train it. Remedy: {_REMEDY}"
        )
    before, after = said.partition(probe)[0].lstrip(), said.partition(probe)[2].rstrip()
    left, _, right = text.partition(probe)
    if left + right != finder.text or not left.endswith(before) or not right.startswith(after):
        raise TemplateError(
            f"{UNPROVEN}: the template writes what messages[{i}], of the role {role!r}, says more than once or in "
            f"other words, or other text depends on it. Remedy: {_REMEDY}"
        )
    return len(left) - len(before), len(left) + len(after)


def _probed(finder: Finder, contents: dict[int, str]) -> str:
    """The conversation with other contents; empty where the template does not take them."""
    messages: list[Message] = list(finder.messages)
    for i, content in contents.items():
        messages[i] = {**messages[i], "content": content}
    try:
        return finder.template.render(messages, tools=finder.tools)
    except (ConversationError, TemplateError):
        return ""


class _Ends:
    """The texts with which messages end, from the conversation of nothing but probes: each kind is looked at once."""

    def __init__(self, finder: Finder):
        conversation, self._finder = finder.conversation, finder
        self._bare = [
            conversation.turn(i)
            if message["role"] == "assistant"
            else {**message, "content": conversation.probes[i]["content"][0]}
            for i, message in enumerate(finder.messages)
        ]
        text = self._render(self._bare) or ""
        places = [(probe.span(), i) for probe, i, _ in conversation.found(text)]
        begins = [*(begin for (begin, _), _ in places[1:]), len(text)]
        # What stands between the last probe of a message and the next one.
        self._behind = {i: text[end:begin] for ((_, end), i), begin in zip(places, begins, strict=True)}
        self._known: dict[tuple[str, str, str], str] = {}

    def behind(self, i: int, at: int) -> int:
        """How many characters of the text from `at` on, where the content of messages[i] ends, end the message."""
        roles = [message["role"] for message in self._finder.messages[i : i + 2]]
        kind = roles[0], roles[-1] if len(roles) == 2 else "", self._behind.get(i, "")
        if kind not in self._known:
            self._known[kind] = self._end(i, *kind[1:])
        end = self._known[kind]
        return len(end) if self._finder.text.startswith(end, at) else 0

    def _end(self, i: int, follows: str, behind: str) -> str:
        finder = self._finder
        probe = finder.conversation.probes[i]["content"][0]
        own = self._render(self._bare[: i + 1])
        if own is not None:
            behind = common(own.partition(probe)[2], behind)
        elif follows == "user":
            # The template takes no conversation without a question. What opens any first question ends nothing.
            opening = finder.template.first_header()
            tokens = finder.tokenizer.special_pattern.finditer(behind)
            behind = behind[: next((token.start() for token in tokens if token.group() in opening), len(behind))]
        else:
            return ""
        span = end_of_turn(finder.tokenizer, behind, ends_with_call=False)
        return "" if span is None or behind[: span[0]].strip() else behind[: span[1]]

    def _render(self, messages: list[Message]) -> str | None:
        try:
            return self._finder.template.render(messages, tools=self._finder.tools)
        except (ConversationError, TemplateError):
            return None
