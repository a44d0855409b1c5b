"""`render_conversation` for many conversations of few structures, with a few renderings instead of some six a turn.

The place of the trained spans is proven by rendering a conversation several times, with probes in place of its texts.
Conversations of the same roles differ only in their texts. So for each such structure one conversation of nothing but
probes is proven; its renderings hold the text that the template writes between the probes. The proof holds for each
other conversation whose renderings are the same, letter by letter, with its contents in place of the probes (or with
their blanks trimmed, as many templates do):

- the whole conversation, in which the spans then stand in the same places;
- for each trained turn the prompt that the template asks the model with, which stands in no text for training;
- of templates with `{% generation %}` marks, instead of the prompts, the places of the blocks.

Any other conversation is proven for itself: where the template looks at the contents, and with tools, reasoning, or
special tokens spelled in a text. Which messages are trained is a part of the structure; how much they weigh is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_idft.corpus.messages import Message
from megatron_idft.corpus.records import Record
from megatron_idft.data.chat.conversations import RenderedConversation, render_conversation, trained_messages
from megatron_idft.data.chat.mask_proof import MANY, Tools
from megatron_idft.data.chat.probes import THINKING
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import ConversationError, TemplateError

_Place = tuple[int, int]  # a constant, and an offset in it
_MARK = "\ue0f0"  # the first letter of the template's marks


@dataclass(slots=True)
class _Prompt:
    """The prompt for messages[turn]: what the template writes around the contents before. thinking: how it is asked."""

    turn: int
    thinking: bool | None
    constants: list[str]


@dataclass(slots=True)
class _Structure:
    """What the template writes around the contents of a conversation.

    constants: before, between and after the contents. spans, blocks: beginning and end of each in the constants.
    others: the numbers of the spans that are not the assistant's.
    """

    constants: list[str]
    spans: list[tuple[_Place, _Place]]
    blocks: list[tuple[_Place, _Place]]
    prompts: list[_Prompt]
    others: set[int]


class Renderer:
    """Renders records by one tokenizer's template, and remembers the structures that it has met."""

    def __init__(self, tokenizer: ChatTokenizer, last_turn_only: bool, prompt_weight: float = 0.0):
        self._tokenizer, self._last_turn_only, self._prompt_weight = tokenizer, last_turn_only, prompt_weight
        self._structures: dict[tuple[tuple[str, bool], ...], _Structure | None] = {}

    def render(self, record: Record) -> RenderedConversation:
        """What `render_conversation` gives for the record, or raises."""
        short = None if record.tools else self._short(record.messages)
        if short is not None:
            return short
        return self._long(record.messages, record.tools)

    def _long(self, messages: list[Message], tools: Tools = None) -> RenderedConversation:
        last_turn_only, prompt_weight = self._last_turn_only, self._prompt_weight
        return render_conversation(
            self._tokenizer, messages, tools=tools, last_turn_only=last_turn_only, prompt_weight=prompt_weight
        )

    def _short(self, messages: list[Message]) -> RenderedConversation | None:
        if any(len(message) != 2 + ("loss" in message) for message in messages):  # more than role and content
            return None
        weights = trained_messages(messages, self._last_turn_only, self._prompt_weight)
        kind = tuple((message["role"], i in weights) for i, message in enumerate(messages))
        try:
            if kind not in self._structures:
                self._structures[kind] = None
                self._structures[kind] = self._structure(messages, list(weights))
            structure = self._structures[kind]
            return None if structure is None else self._same(structure, messages, list(weights.values()))
        except (ConversationError, TemplateError):
            return None  # the long way says why

    def _same(
        self, structure: _Structure, messages: list[Message], weights: list[float]
    ) -> RenderedConversation | None:
        """The conversation, where its renderings are those of the structure."""
        template = self._tokenizer.template
        contents = [str(message["content"]) for message in messages]
        text = template.render(messages)
        if text != _filled(structure.constants, contents):
            contents = [content.strip() for content in contents]
            if text != _filled(structure.constants, contents):
                return None
        if any(map(self._tokenizer.special_pattern.search, contents)) or _MARK in text:
            return None
        for prompt in structure.prompts:
            asked = template.render(messages[: prompt.turn], add_generation_prompt=True, thinking=prompt.thinking)
            if asked != _filled(prompt.constants, contents):
                return None
        begins, at = [], 0  # of the constants
        for constant, content in zip(structure.constants, [*contents, ""], strict=True):
            begins.append(at)
            at += len(constant) + len(content)
        blocks = [(begins[a] + i, begins[b] + j) for (a, i), (b, j) in structure.blocks]
        if template.has_generation_blocks and template.render_marked(messages) != (text, blocks):
            return None
        spans = [(begins[a] + i, begins[b] + j) for (a, i), (b, j) in structure.spans]
        return RenderedConversation(text, spans, weights=weights, others=set(structure.others))

    def _structure(self, messages: list[Message], trained: list[int]) -> _Structure | None:
        template = self._tokenizer.template
        probes = [f"Content{'i' * number}of" for number in range(len(messages))]
        probed = [{**message, "content": probe} for message, probe in zip(messages, probes, strict=True)]
        proven = self._long(probed)
        constants = _constants(proven.text, probes)
        if constants is None or proven.unwritten or proven.spells_special:
            return None
        begins = [0]
        for constant, probe in zip(constants, probes, strict=False):
            begins.append(begins[-1] + len(constant) + len(probe))
        prompts, blocks = [], []
        if template.has_generation_blocks:
            blocks = template.render_marked(probed)[1]
        else:
            # The contents stand in order, so the spans are those of the trained messages in order.
            spans = enumerate(zip(trained, proven.spans, strict=True))
            pairs = [pair for number, pair in spans if number not in proven.others]
            # Of many turns the proof, too, trusts that turns after the same text are asked for with the same prompt.
            for turn, (start, _) in pairs if len(pairs) < MANY else [*pairs[:2], pairs[-1]]:
                asked = [
                    template.render(probed[:turn], add_generation_prompt=True, thinking=thinking)
                    for thinking in THINKING
                ]
                # The one that the text begins with; all where the template edits earlier turns.
                equal = [prompt == proven.text[:start] for prompt in asked]
                for number in [equal.index(True)] if any(equal) else range(len(asked)):
                    around = _constants(asked[number], probes[:turn])
                    if around is None:
                        return None
                    prompts.append(_Prompt(turn, THINKING[number], around))
        places = [_places(found, begins, constants) for found in (proven.spans, blocks)]
        if None in places:
            return None
        return _Structure(constants, places[0] or [], places[1] or [], prompts, proven.others)


def _constants(text: str, probes: Sequence[str]) -> list[str] | None:
    """What stands around the probes; None unless each stands there once, in order."""
    constants, rest = [], text
    for probe in probes:
        before, found, rest = rest.partition(probe)
        if not found:
            return None
        constants.append(before)
    constants.append(rest)
    return None if any(probe in constant for probe in probes for constant in constants) else constants


def _places(
    spans: list[tuple[int, int]], begins: list[int], constants: Sequence[str]
) -> list[tuple[_Place, _Place]] | None:
    """The constants that hold a span's ends, or end there, and where in them; None where one lies inside a probe."""
    found = []
    for span in spans:
        places = [
            next(
                (
                    (number, at - begin)
                    for number, (begin, constant) in enumerate(zip(begins, constants, strict=True))
                    if begin <= at <= begin + len(constant)
                ),
                None,
            )
            for at in span
        ]
        start, end = places
        if start is None or end is None:
            return None
        found.append((start, end))
    return found


def _filled(constants: list[str], contents: list[str]) -> str:
    parts = [part for pair in zip(constants, contents, strict=False) for part in pair]
    return "".join([*parts[: 2 * (len(constants) - 1)], constants[-1]])
