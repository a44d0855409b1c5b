"""Find what the assistant says in a rendered conversation, and prove that it is that and nothing else.

The conversation is rendered once, as a whole. Then each trained turn is rendered with probes (see probes.py) in place
of its reasoning, its content and the arguments of its tool calls, and what stands there is found by where the probes
stand:

- The span begins where inference would hand over to the model: behind the generation prompt. Mostly the text up to the
  turn, rendered with it, is how the whole text begins. Where a template edits earlier turns it is not; then what stands
  between the message before and the turn is compared with what the generation prompt puts there.
- It ends with the special token that ends the turn, the first behind the answer. Some templates write it with the next
  message, GLM's with its role: then it is taken from there, and behind the last turn from a user message put there,
  unless the token opens every message.

Proven is that outside the span the conversation and the one with probes are the same text, and that the span with
probes does not change when a probe is put into every other message. Templates with `{% generation %}` blocks say
themselves where the turn stands; the same two are proven of each block, and that all the turn says stands in it. What
proves nothing is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from megatron_idft.corpus.records import Message
from megatron_idft.data.chat.headers import QUESTION, first_header, generation_prompt
from megatron_idft.data.chat.long_conversations import Edges, prove_together
from megatron_idft.data.chat.probes import ProbedConversation
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.data.chat.turn_ends import UNPROVEN, Span, bos_only, end_of_turn, never_ends
from megatron_idft.errors import ConversationError, TemplateError

Tools = list[dict[str, Any]] | None

REMEDY = (
    "mark the assistant's text in the template with {% generation %} … {% endgeneration %}, the end-of-turn token "
    "inside, and pass the edited template with --chat-template FILE"
)


@dataclass(slots=True)
class ProvenSpans:
    """text: the whole conversation. spans: one for each turn that was asked for. edited: something that the assistant
    says is not in the text, because the template leaves it out of earlier turns."""

    text: str
    spans: list[Span]
    edited: bool


def prove_spans(tokenizer: ChatTokenizer, messages: list[Message], tools: Tools, turns: list[int]) -> ProvenSpans:
    """The text of a conversation and where the assistant's messages with the indices `turns`, ascending, stand in it.

    Raises ConversationError where the conversation is at fault, TemplateError where the template proves nothing.
    """
    finder = Finder(tokenizer, messages, tools)
    if tokenizer.template.has_generation_blocks:
        spans = finder.marked(turns)
    else:
        spans = prove_together(finder, turns) or [finder.probed(i) for i in turns]
    for before, span in pairwise(spans):
        if span[0] < before[1]:
            raise TemplateError(f"{UNPROVEN}: two turns of the assistant overlap in the text. Remedy: {REMEDY}")
    finder.check_context(turns)
    return ProvenSpans(finder.text, spans, finder.edited)


class Finder:
    """The proof for one conversation. edges: of the turns that were proven one by one."""

    def __init__(self, tokenizer: ChatTokenizer, messages: list[Message], tools: Tools):
        self.tokenizer, self.template = tokenizer, tokenizer.template
        self.messages, self.tools = messages, tools
        self.last_turn = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        self.text = self.template.render(messages, tools=tools)
        if tools and self.text == self.template.render(messages):
            raise ConversationError(
                "the template does not write the record's `tools`, so the model would call what it was never shown."
                " Remedy: pass a template that writes them with --chat-template FILE, or remove the field"
            )
        self.conversation = ProbedConversation(messages, self.text)
        self.edited = False
        self.edges: dict[int, Edges] = {}
        self._everywhere: str | None = None
        self._marked_everywhere: tuple[str, list[Span]] | None = None

    def check_context(self, turns: list[int]) -> None:
        """Whether the template writes the turns that are not trained, too: they are what the others answer."""
        for i, message in enumerate(self.messages):
            if message["role"] != "assistant" or i in turns:
                continue
            for field, probes in self.conversation.probes[i].items():
                if all(probe in self.everywhere_text() for probe in probes):
                    continue
                if field == "tool_calls":
                    raise ConversationError(
                        f"messages[{i}].tool_calls stands nowhere in the conversation: the template does not write it. "
                        "Remedy: pass a template that does with --chat-template FILE, or remove tool_calls"
                    )
                self.edited = True

    # Templates without marks

    def probed(self, i: int) -> Span:
        """The span of messages[i]; `text` may grow by the token that ends a last turn."""
        whole = self.template.render(self.conversation.with_turn(i), tools=self.tools)
        own = self._as_last(i, whole)
        first, last = self._written(i, own, whole)
        begin, end, whole = self._ending(i, own, whole, last)
        start = self._start(i, whole, first)
        if self.text[:start] != whole[:start]:
            raise TemplateError(
                f"{UNPROVEN}: what the template writes before messages[{i}] depends on what the assistant says there. "
                f"Remedy: {REMEDY}"
            )
        behind = len(whole) - begin
        if not self.text.endswith(whole[begin:]) or len(self.text) - behind < start:
            raise TemplateError(
                f"{UNPROVEN}: what the template writes behind the answer, messages[{i}], depends on the answer. "
                f"Remedy: {REMEDY}"
            )
        if whole[start:end] not in self.everywhere_text():
            raise TemplateError(
                f"{UNPROVEN}: what the template writes of messages[{i}] depends on what other messages say, or holds "
                f"some of it. Remedy: {REMEDY}"
            )
        self.edges[i] = Edges(whole[start:first], whole[last:end], whole[begin:end])
        return start, len(self.text) - len(whole) + end

    def _written(self, i: int, own: str, whole: str) -> Span:
        """From the first probe of messages[i] to the end of the last in `whole`; all must be in `own`, where the
        conversation ends with the turn."""
        message = self.messages[i]
        # A template that cannot write an ordinary answer serves no record; one without tool calls serves others.
        plain = not message.get("tool_calls") and not message.get("reasoning_content")
        error = TemplateError if plain else ConversationError
        for field, probes in self.conversation.probes[i].items():
            if any(own.count(probe) > 1 or whole.count(probe) > 1 for probe in probes) and field != "tool_calls":
                raise TemplateError(
                    f"{UNPROVEN}: messages[{i}].{field} stands more than once in the assistant's part. Remedy: {REMEDY}"
                )
            if all(probe in own for probe in probes):
                self.edited |= any(probe not in whole for probe in probes)
            elif field == "content" and message.get("tool_calls"):
                raise ConversationError(
                    f"messages[{i}].content: the template writes no content beside tool calls, so it would be left out;"
                    " empty it, or make it a message of its own"
                )
            else:
                raise error(
                    f"{UNPROVEN}: messages[{i}].{field} stands nowhere in the assistant's part: the template does not "
                    f"write it. Remedy: pass a template that does with --chat-template FILE, or remove {field}"
                )
        found = self.conversation.find(i, whole)
        if found is None:
            raise error(
                f"messages[{i}]: nothing of it stands in the conversation, the template leaves it out of earlier turns;"
                ' set its "loss" to 0, or train the last turn only with --sft-last-turn-only'
            )
        return found

    def _start(self, i: int, whole: str, first: int) -> int:
        """Where the model takes over: behind the generation prompt of messages[i]."""
        prompt = self._part(self.messages[:i], i, add_generation_prompt=True)
        if self.text.startswith(prompt) and whole.startswith(prompt) and len(prompt) <= first:
            if whole[len(prompt) : first].strip():
                self._check_generation_prompt(i, prompt)
            return len(prompt)
        # Some earlier turn is edited: compare what stands between the message before and the turn.
        turn = self.conversation.turn(i)
        between, header = self._after_previous(i, turn)
        if between and whole[:first].endswith(between):
            if between.startswith(header):
                if between[len(header) :].strip():
                    self._check_generation_prompt(i, prompt)
                return first - len(between) + len(header)
            # A template that drops the reasoning of earlier turns drops the opening there that it asks a model with.
            word = next(iter(self.conversation.probes[i].values()))[0]
            plain, header = self._after_previous(i, {"role": "assistant", "content": word})
            if plain and i != self.last_turn and header.startswith(plain) and between.startswith(plain):
                return first - len(between) + len(plain)
        raise TemplateError(
            f"{UNPROVEN}: before messages[{i}] the template writes another text in the whole conversation than it asks "
            f"the model with (it edits earlier turns, or its generation prompt is another header). Remedy: {REMEDY}"
        )

    def _after_previous(self, i: int, turn: Message) -> tuple[str, str]:
        """What stands between the last probe of messages[i - 1] and the first of `turn`, messages[i] with probes, and
        what a generation prompt puts there; empty texts where they cannot be found."""
        if i == 0:
            return "", ""
        everywhere, find = self.conversation.everywhere, self.conversation.find
        text = self.template.render([*everywhere[:i], turn, *everywhere[i + 1 :]], tools=self.tools)
        prompt = self._part(everywhere[:i], i, add_generation_prompt=True)
        previous, asked, first = find(i - 1, text), find(i - 1, prompt), find(i, text)
        if previous is None or asked is None or first is None or first[0] < previous[1]:
            return "", ""
        return text[previous[1] : first[0]], prompt[asked[1] :]

    def _check_generation_prompt(self, i: int, prompt: str) -> None:
        if prompt != self._part(self.messages[:i], i):
            return
        word = next(iter(self.conversation.probes[i].values()))[0]
        plain = self._part([*self.messages[:i], {"role": "assistant", "content": word}], i)
        header = plain.partition(word)[0].removeprefix(prompt)
        if header.strip():  # else what stands there is the beginning of a tool call or of reasoning
            raise TemplateError(
                f"{UNPROVEN}: the template writes {header!r} before the answer but ignores add_generation_prompt. "
                f"Remedy: {REMEDY}"
            )

    def _ending(self, i: int, own: str, whole: str, last: int) -> tuple[int, int, str]:
        """Where in `whole` the token that ends messages[i] begins and where it ends; and `whole`, which may grow."""
        own_last = self.conversation.find(i, own)
        assert own_last is not None
        after = whole[last:]
        itself = _common(own[own_last[1] :], after)  # what the template writes whether a message follows or not
        span = end_of_turn(self.tokenizer, itself, bool(self.messages[i].get("tool_calls")))
        if span is not None:
            return last + span[0], last + span[1], whole
        follows = ""
        if i + 1 == len(self.messages):
            longer = self._part([*self.messages, *QUESTION], i)
            follows = longer[len(self.text) :] if longer.startswith(self.text) else ""
        token = self.tokenizer.special_pattern.search(after + follows)
        if (
            token is None
            or self.tokenizer.special_ids[token.group()] == bos_only(self.tokenizer)
            or (after + follows)[: token.start()].strip() != itself[: token.start()].strip()
            or self._opens_every_turn(token.group())
        ):
            raise never_ends(after)
        if follows:
            added = follows[: token.end() - len(after)]
            self._everywhere = self.everywhere_text() + added
            self.text, whole = self.text + added, whole + added
        return last + token.start(), last + token.end(), whole

    def _opens_every_turn(self, token: str) -> bool:
        """Whether a special token begins a first question as well as an answer, so that it says nothing of an end."""
        return token in first_header(self.template) and token in generation_prompt(self.template)

    def _as_last(self, i: int, whole: str) -> str:
        """The conversation up to messages[i], that one with its probes."""
        if i + 1 == len(self.messages):
            return whole
        return self._part([*self.messages[:i], self.conversation.turn(i)], i)

    def everywhere_text(self) -> str:
        """The conversation with probes in all messages."""
        if self._everywhere is None:
            self._everywhere = self.template.render(self.conversation.everywhere, tools=self.tools)
        return self._everywhere

    def _part(self, messages: list[Message], i: int, *, add_generation_prompt: bool = False) -> str:
        if not messages and not add_generation_prompt:
            return ""
        try:
            return self.template.render(messages, add_generation_prompt=add_generation_prompt, tools=self.tools)
        except (ConversationError, TemplateError) as error:
            # Templates reject conversations that begin with an assistant turn, or whose roles do not alternate.
            raise ConversationError(
                f"{UNPROVEN}: the template renders the conversation, but not its part up to messages[{i}]: {error}"
            ) from error

    # Templates with marks

    def marked(self, turns: list[int]) -> list[Span]:
        text, blocks = self.template.render_marked(self.messages, tools=self.tools)
        assistant = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if len(blocks) != len(assistant):
            raise TemplateError(
                f"{UNPROVEN}: the template wrote {len(blocks)} {{% generation %}} blocks for {len(assistant)} "
                "assistant turns; it must write exactly one around each"
            )
        return [self._marked(i, assistant.index(i), text, blocks) for i in turns]

    def _marked(self, i: int, number: int, text: str, blocks: list[Span]) -> Span:
        whole, probed = self.template.render_marked(self.conversation.with_turn(i), tools=self.tools)
        if len(probed) != len(blocks):
            raise TemplateError(f"{UNPROVEN}: the number of {{% generation %}} blocks depends on the answer")
        (start, end), (first, last) = blocks[number], probed[number]
        written = all(probe in whole for probes in self.conversation.probes[i].values() for probe in probes)
        own = whole if written else self._as_last(i, whole)
        left, right = self._written(i, own, whole)
        if left < first or right > last:
            raise TemplateError(
                f"{UNPROVEN}: what the assistant says in messages[{i}] stands outside of its {{% generation %}} block"
            )
        after = whole[right:last]
        ending = end_of_turn(self.tokenizer, after, bool(self.messages[i].get("tool_calls")))
        if ending is None:
            raise never_ends(after)
        if (
            text[:start] != whole[:first]
            or text[end:] != whole[last:]
            or not text[start:end].endswith(after[ending[0] :])
        ):
            raise TemplateError(f"{UNPROVEN}: what the template writes around the answer depends on the answer")
        if self._marked_everywhere is None:
            self._marked_everywhere = self.template.render_marked(self.conversation.everywhere, tools=self.tools)
        everywhere, others = self._marked_everywhere
        if len(others) != len(blocks) or everywhere[slice(*others[number])] != whole[first:last]:
            raise TemplateError(
                f"{UNPROVEN}: the {{% generation %}} block of messages[{i}] depends on what other messages say, or "
                "holds some of it; it must hold what the assistant says there, and the end of the turn"
            )
        # The header is what inference writes for the model, even where a template puts it into the block. It is looked
        # for beside the probes: an answer may spell it.
        header = generation_prompt(self.template)
        at = whole.find(header, max(0, first - len(header) + 1), left) if header else -1
        size = max(0, at + len(header) - first) if at >= 0 else 0  # of what of it stands in the block
        if text[start : start + size] != whole[first : first + size]:
            raise TemplateError(f"{UNPROVEN}: the header in the {{% generation %}} block depends on the answer")
        return start + size, end + ending[1] - len(after)


def _common(a: str, b: str) -> str:
    length = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]
