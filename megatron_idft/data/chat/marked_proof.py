"""The proof of mask_proof.py for templates with `{% generation %}` blocks, which say themselves where a turn stands.

A turn may stand in several blocks in a row, such as its reasoning, its answer and its end: blanks between them are
trained with it. A block belongs to the turn whose probes it holds where every message has probes.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

from megatron_idft.corpus.records import Message
from megatron_idft.data.chat.probes import THINKING, UNPROVEN, Span, common, end_of_turn, never_ends
from megatron_idft.errors import TemplateError

if TYPE_CHECKING:
    from megatron_idft.data.chat.mask_proof import Finder


def prove_marked(finder: Finder, turns: list[int]) -> list[Span]:
    """The spans of the turns in `finder.text`.

    Raises:
        ConversationError: the conversation is at fault.
        TemplateError: the template proves nothing.
    """
    return _Marked(finder).spans(turns)


class _Marked:
    """blocks, of the conversation; everywhere, all_blocks: the text and the blocks where all messages have probes."""

    def __init__(self, finder: Finder):
        self._finder = finder
        _, self._blocks = self._render(finder.messages)
        self._everywhere, self._all_blocks = self._render(finder.conversation.everywhere)
        if len(self._all_blocks) != len(self._blocks):
            raise TemplateError(f"{UNPROVEN}: the number of {{% generation %}} blocks depends on what is said")

    def spans(self, turns: list[int]) -> list[Span]:
        numbers = self._blocks_of_turns()
        return [self._span(i, numbers[i]) for i in turns]

    def _render(self, messages: list[Message]) -> tuple[str, list[Span]]:
        return self._finder.template.render_marked(messages, tools=self._finder.tools)

    def _blocks_of_turns(self) -> dict[int, list[int]]:
        """The numbers of the blocks of each turn, by the message's index.

        Blocks without probes, such as one for the end of the turn, belong to the turn before them, or to the next one
        where the probes of another role stand between.
        """
        roles = [message["role"] for message in self._finder.messages]
        said = [(probe.start(), i) for probe, i, _ in self._finder.conversation.found(self._everywhere)]
        numbers: dict[int, list[int]] = defaultdict(list)
        turn, last, waiting = None, 0, list[int]()
        for number, (start, end) in enumerate(self._all_blocks):
            if any(roles[i] != "assistant" for at, i in said if last <= at < start):
                turn = None
            last = end
            owners = {i for at, i in said if start <= at < end}
            for i in sorted(owners):
                if roles[i] != "assistant":
                    raise TemplateError(
                        f"{UNPROVEN}: a {{% generation %}} block depends on what other messages say, or holds some of "
                        f"it: messages[{i}], of the role {roles[i]!r}. It must hold what the assistant says and the end"
                        " of the turn"
                    )
                turn = i
                numbers[i] += [*waiting, number]
            if owners:
                waiting = []
            elif turn is None:
                waiting.append(number)
            else:
                numbers[turn].append(number)
        return numbers

    def _span(self, i: int, numbers: list[int]) -> Span:
        finder = self._finder
        text, conversation = finder.text, finder.conversation
        whole, probed = self._render(conversation.with_turn(i))
        if len(probed) != len(self._blocks):
            raise TemplateError(f"{UNPROVEN}: the number of {{% generation %}} blocks depends on the answer")
        complete = all(probe in whole for probes in conversation.probes[i].values() for probe in probes)
        left, right = finder.written(i, whole if complete else finder.as_last(i, whole), whole)
        numbers = _in_a_row(whole, probed, numbers)
        first, last = _around(probed, numbers)
        if left < first or right > last:
            raise TemplateError(
                f"{UNPROVEN}: what the assistant says in messages[{i}] stands outside of its {{% generation %}} block,"
                " or in several with other text between them. The template must write it into one block, or into"
                " several in a row"
            )
        start, end = _around(self._blocks, numbers)
        after = whole[right:last]
        ending = end_of_turn(finder.tokenizer, after, bool(finder.messages[i].get("tool_calls")))
        if ending is None:
            raise never_ends(after)
        if (
            text[:start] != whole[:first]
            or text[end:] != whole[last:]
            or not text[start:end].endswith(after[ending[0] :])
            or _between(text, self._blocks, numbers) != _between(whole, probed, numbers)
        ):
            raise TemplateError(f"{UNPROVEN}: what the template writes around the answer depends on the answer")
        if self._everywhere[slice(*_around(self._all_blocks, numbers))] != whole[first:last]:
            raise TemplateError(
                f"{UNPROVEN}: the {{% generation %}} block of messages[{i}] depends on what other messages say, or "
                "holds some of it; it must hold what the assistant says there, and the end of the turn"
            )
        return start + self._header(text[start:end], whole, first, left), end + ending[1] - len(after)

    def _header(self, own: str, whole: str, first: int, left: int) -> int:
        """How many characters at the beginning of `own`, a turn's blocks, inference writes for the model.

        Some templates put the header into the block. It is looked for in `whole` from the beginning of the blocks to
        the first probe: an answer may spell it.
        """
        finder = self._finder
        header, size = finder.template.generation_prompt(), 0
        for thinking in THINKING:
            prompt = finder.template.generation_prompt(thinking)
            at = whole.find(prompt, max(0, first - len(prompt)), left) if prompt else -1
            if at >= 0:
                size = at + len(prompt) - first
                break
        else:
            # DeepSeek-R1's prompt opens the reasoning, too; before an answer without it stands the prompt's beginning.
            shared = common(whole[first:left], header)
            tokens = [token.end() for token in finder.tokenizer.special_pattern.finditer(shared)]
            size = len(shared) if len(shared) in tokens else 0
        if own[:size] != whole[first : first + size] or (0 < size < len(header) and own.startswith(header)):
            raise TemplateError(f"{UNPROVEN}: the header in the {{% generation %}} block depends on the answer")
        return size


def _in_a_row(text: str, blocks: list[Span], numbers: list[int]) -> list[int]:
    """The first of a turn's blocks that hold something, as far as only blanks stand between them."""
    row: list[int] = []
    for number in numbers:
        start, end = blocks[number]
        if row and text[blocks[row[-1]][1] : start].strip():
            break
        if start != end:
            row.append(number)
    return row


def _around(blocks: list[Span], numbers: list[int]) -> Span:
    return (blocks[numbers[0]][0], blocks[numbers[-1]][1]) if numbers else (0, 0)


def _between(text: str, blocks: list[Span], numbers: list[int]) -> list[str]:
    return [text[blocks[a][1] : blocks[b][0]] for a, b in pairwise(numbers)]
