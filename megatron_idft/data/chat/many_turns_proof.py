"""The proof of mask_proof.py for conversations of many turns, by a number of renderings that does not grow with them.

Turn by turn the proof renders the conversation some six times for each turn, which costs the square of their number:
minutes for an agent's 600 steps. Here

- turns that the template treats alike (the same fields, the same text before and after them where all messages are
  probes) form a class, and the first two and the last of each are proven turn by turn;
- all turns are probed at once, which gives the text that the template writes between them, and every eighth turn at
  once, eight times: each of these renderings, and the conversation itself, must be that text letter by letter, with the
  turn itself or its probes in its place. So outside of a turn nothing depends on it, whether it is probed by itself
  among its neighbours or with all of them;
- a turn with probes must read the same where every message has a probe, and begin and end as its class does.

Turns that do not agree are proven, or refused, one by one. One assumption is left: a template that writes the same
text before two turns asks the model with the same generation prompt there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_idft.corpus.records import Message
from megatron_idft.data.chat.probes import Span
from megatron_idft.errors import ConversationError, TemplateError

if TYPE_CHECKING:
    from megatron_idft.data.chat.mask_proof import Finder

_GROUPS = 8


@dataclass(frozen=True, slots=True)
class Edges:
    """A turn's span around its probes: before the first, after the last, and the token that ends it."""

    head: str
    tail: str
    ending: str


class _DifferentError(Exception):
    """The template does not treat the turns alike: they are to be proven one by one."""


def prove_together(finder: Finder, turns: list[int]) -> list[Span] | None:
    """The spans of the turns in `finder.text`; None where they have to be proven one by one.

    Raises:
        ConversationError, TemplateError: as `finder.probed` for the turns that it is asked for.
    """
    rendered = finder.text
    try:
        classes = _classes(finder, turns)
    except (_DifferentError, ConversationError, TemplateError):
        return None
    examples = sorted({i for members in classes for i in (*members[:2], members[-1])})
    for i in examples:
        finder.probed(i)
    try:
        edges: dict[int, Edges] = {}
        for members in classes:
            if len({finder.edges[i] for i in members if i in finder.edges}) != 1:
                return None
            edges |= dict.fromkeys(members, finder.edges[members[0]])
        return _Together(finder, turns, edges, finder.text[len(rendered) :]).spans()
    except (_DifferentError, ConversationError, TemplateError):
        return None


def _classes(finder: Finder, turns: list[int]) -> list[list[int]]:
    """The turns that stand in like surroundings."""
    conversation = finder.conversation
    bare = [
        conversation.turn(i)
        if message["role"] == "assistant"
        else {**message, "content": conversation.probes[i]["content"][0]}
        for i, message in enumerate(finder.messages)
    ]
    text = finder.template.render(bare, tools=finder.tools)
    places = _places(finder, text)
    classes: dict[object, list[int]] = defaultdict(list)
    for i in turns:
        before = places[i - 1][1] if i else 0
        behind = places[i + 1][0] if i + 1 < len(bare) else len(text)
        first, last = places[i]
        parts = [(field, len(probes)) for field, probes in conversation.probes[i].items()]
        said = re.sub(finder.conversation.pattern, "", text[first:last])  # between the parts of the turn
        key = (*parts, bare[i - 1]["role"] if i else "", text[before:first], said, text[last:behind])
        classes[key].append(i)
    return list(classes.values())


def _places(finder: Finder, text: str) -> dict[int, Span]:
    """From the first probe to the last of each message, found in one pass. All must be there, a text only once."""
    places: dict[int, Span] = {}
    once = set()
    for match, i, field in finder.conversation.found(text):
        if field != "tool_calls" and match.group() in once:
            raise _DifferentError
        once.add(match.group())
        places[i] = places.get(i, match.span())[0], match.end()
    return _Found(places)


class _Found(dict[int, Span]):
    def __missing__(self, i: int) -> Span:
        raise _DifferentError


class _Together:
    """suffix: what `finder.text` has grown by, the end of a last turn."""

    def __init__(self, finder: Finder, turns: list[int], edges: dict[int, Edges], suffix: str):
        self._finder, self._turns, self._edges, self._suffix = finder, turns, edges, suffix
        self._all, at_all = self._probed(turns)
        everywhere = finder.everywhere_text()
        elsewhere = self._spans(everywhere, turns)
        self._said = [self._all[slice(*at_all[i])] for i in turns]
        for i, said in zip(turns, self._said, strict=True):
            if everywhere[slice(*elsewhere[i])] != said:
                raise _DifferentError
        bounds = [0, *(at for i in turns for at in at_all[i]), len(self._all)]
        self._between = [self._all[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]

    def spans(self) -> list[Span]:
        """The spans of the turns.

        Raises:
            _DifferentError: the turns do not go together.
        """
        turns, text = self._turns, self._finder.text
        groups = [self._probed(turns[number::_GROUPS]) for number in range(_GROUPS)]
        # Where the turns stand in the conversation follows from the lengths: the first turn of each group is where it
        # is with probes; between two turns of a group lies as much as there.
        starts = [groups[k][1][turns[k]][0] for k in range(_GROUPS)]
        for k in range(len(turns) - _GROUPS):
            at = groups[k % _GROUPS][1]
            apart = at[turns[k + _GROUPS]][0] - at[turns[k]][1]
            starts.append(starts[k + 1] - len(self._between[k + 1]) + apart)
        ends = [start - len(part) for start, part in zip(starts[1:], self._between[1:-1], strict=True)]
        ends.append(len(text) - len(self._between[-1]))
        own = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        if any(start < 0 or end < start for start, end in zip(starts, ends, strict=True)):
            raise _DifferentError
        self._require(text, own)
        for number, (written, _) in enumerate(groups):
            parts = list(own)
            parts[number::_GROUPS] = self._said[number::_GROUPS]
            self._require(written, parts)
        for i, part in zip(turns, own, strict=True):
            if not part.endswith(self._edges[i].ending):
                raise _DifferentError
        return list(zip(starts, ends, strict=True))

    def _require(self, written: str, parts: Iterable[str]) -> None:
        """That `written` is the turns' `parts` in what stands between them."""
        pieces = [piece for pair in zip(self._between, parts, strict=False) for piece in pair]
        if "".join([*pieces, self._between[-1]]) != written:
            raise _DifferentError

    def _probed(self, turns: list[int]) -> tuple[str, dict[int, Span]]:
        """The conversation with probes in these turns, and where their spans stand."""
        finder = self._finder
        messages: list[Message] = list(finder.messages)
        for i in turns:
            messages[i] = finder.conversation.turn(i)
        text = finder.template.render(messages, tools=finder.tools) + self._suffix
        return text, self._spans(text, turns)

    def _spans(self, text: str, turns: list[int]) -> dict[int, Span]:
        places, spans = _places(self._finder, text), {}
        for i in turns:
            first, last = places[i]
            edges = self._edges[i]
            start, end = first - len(edges.head), last + len(edges.tail)
            if start < 0 or text[start:first] != edges.head or text[last:end] != edges.tail:
                raise _DifferentError
            spans[i] = start, end
        return spans
