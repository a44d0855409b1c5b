"""Find what the assistant says in a rendered conversation, and prove that it is that and nothing else.

The conversation is rendered once, as a whole. Then each trained turn is rendered with probes (see probes.py) in place
of its reasoning, its content and the arguments of its tool calls, and what stands there is found by where the probes
stand:

- The span begins where inference would hand over to the model: after the generation prompt, as the template writes it
  by default or when it is told whether the model is to think (`enable_thinking`). Mostly the text up to the turn,
  rendered with it, is how the whole text begins. Where a template edits earlier turns it is not; then the text between
  the message before and the turn is compared with the text that the generation prompt puts there.
- It ends with the special token that ends the turn, the first after the answer. Some templates write it with the next
  message, GLM's with its role: then it is taken from there, and after the last turn from a user message put there,
  unless the token opens every message.

It is proven that outside the span the conversation and the one with probes are the same text, and that the span with
probes does not change when a probe is put into every other message. Templates with `{% generation %}` blocks say
themselves where the turn stands, in one block or in several that follow each other. The same two are proven of these,
and that all the turn says stands in them. A template that proves nothing is refused.

What others say, where it is trained, has a proof of its own, see prompt_proof.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from megatron_idft.corpus.records import Message
from megatron_idft.data.chat.many_turns_proof import Edges, prove_together
from megatron_idft.data.chat.marked_proof import prove_marked
from megatron_idft.data.chat.probes import (
    THINKING,
    UNPROVEN,
    ProbedConversation,
    Span,
    bos_only,
    common,
    end_of_turn,
    never_ends,
    reasons_in_content,
)
from megatron_idft.data.chat.prompt_proof import prove_prompts
from megatron_idft.data.chat.template import QUESTION
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import ConversationError, TemplateError

Tools = list[dict[str, Any]] | None

MANY = 24  # turns that are proven together
REMEDY = (
    "mark the assistant's text in the template with {% generation %} … {% endgeneration %}, the end-of-turn token "
    "inside, and pass the edited template with --chat-template FILE"
)


@dataclass(slots=True)
class ProvenSpans:
    """A conversation with the spans of its messages.

    Attributes:
        text: the whole conversation.
        spans: one for each turn of the assistant that was asked for.
        prompts: one for each message of others that was asked for.
        edited: the text lacks words of the assistant, because the template leaves them out of earlier turns.
    """

    text: str
    spans: list[Span]
    prompts: list[Span]
    edited: bool


def prove_spans(
    tokenizer: ChatTokenizer, messages: list[Message], tools: Tools, turns: list[int], prompts: Sequence[int] = ()
) -> ProvenSpans:
    """The text of a conversation and where the assistant's messages with the indices `turns`, ascending, and those of
    others with the indices `prompts` stand in it.

    Raises:
        ConversationError: the conversation is at fault.
        TemplateError: the template proves nothing.
    """
    try:
        return _proven(Finder(tokenizer, messages, tools), turns, prompts)
    except (ConversationError, TemplateError):
        if not any(reasons_in_content(messages[i]) for i in turns):
            raise
        # The template's text before an answer may hang on the tags of its reasoning, which probes took away.
        try:
            return _proven(Finder(tokenizer, messages, tools, keep_tags=True), turns, prompts)
        except (ConversationError, TemplateError):
            pass
        raise


def _proven(finder: Finder, turns: list[int], prompts: Sequence[int]) -> ProvenSpans:
    others = prove_prompts(finder, prompts)  # first: the end of a last turn may be added to the text
    if finder.template.has_generation_blocks:
        spans = prove_marked(finder, turns)
    else:
        together = prove_together(finder, turns) if len(turns) >= MANY else None
        spans = together or [finder.probed(i) for i in turns]
    for before, span in pairwise(sorted([*spans, *others]) if others else spans):
        if span[0] < before[1]:
            raise TemplateError(f"{UNPROVEN}: two trained messages overlap in the text. Remedy: {REMEDY}")
    finder.check_context(turns)
    return ProvenSpans(finder.text, spans, others, finder.edited)


class Finder:
    """The proof for one conversation. edges: of the turns that were proven one by one."""

    def __init__(self, tokenizer: ChatTokenizer, messages: list[Message], tools: Tools, *, keep_tags: bool = False):
        self.tokenizer, self.template = tokenizer, tokenizer.template
        self.messages, self.tools = messages, tools
        self.last_turn = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        self.text = self.template.render(messages, tools=tools)
        if tools and self.text == self.template.render(messages):
            raise ConversationError(
                "the template does not write the record's `tools`, so the model would call what it was never shown."
                " Remedy: pass a template that writes them with --chat-template FILE, or remove the field"
            )
        self.conversation = ProbedConversation(messages, self.text, keep_tags)
        self.edited = False
        self.edges: dict[int, Edges] = {}
        self._everywhere: str | None = None

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

    def probed(self, i: int) -> Span:
        """The span of messages[i]; `text` may grow by the token that ends a last turn."""
        whole = self.template.render(self.conversation.with_turn(i), tools=self.tools)
        own = self.as_last(i, whole)
        first, last = self.written(i, own, whole)
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
                f"{UNPROVEN}: what the template writes after the answer, messages[{i}], depends on the answer. "
                f"Remedy: {REMEDY}"
            )
        if whole[start:end] not in self.everywhere_text():
            raise TemplateError(
                f"{UNPROVEN}: what the template writes of messages[{i}] depends on what other messages say, or holds "
                f"some of it. Remedy: {REMEDY}"
            )
        self.edges[i] = Edges(whole[start:first], whole[last:end], whole[begin:end])
        return start, len(self.text) - len(whole) + end

    def written(self, i: int, own: str, whole: str) -> Span:
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
        """Where the model takes over: after the generation prompt of messages[i], as the template writes it by default
        or when it is told whether the model is to think."""
        for thinking in THINKING:
            start = self._behind_prompt(i, whole, first, thinking)
            if start is not None:
                return start
        raise TemplateError(
            f"{UNPROVEN}: before messages[{i}] the template writes another text in the whole conversation than it asks "
            f"the model with (it edits earlier turns, or its generation prompt is another header). Remedy: {REMEDY}"
        )

    def _behind_prompt(self, i: int, whole: str, first: int, thinking: bool | None) -> int | None:
        prompt = self._part(self.messages[:i], i, add_generation_prompt=True, thinking=thinking)
        if self.text.startswith(prompt) and whole.startswith(prompt) and len(prompt) <= first:
            if whole[len(prompt) : first].strip():
                self._check_generation_prompt(i, prompt)
            return len(prompt)
        # Some earlier turn is edited: compare what stands between the message before and the turn.
        turn = self.conversation.turn(i)
        between, header = self._after_previous(i, turn, thinking)
        if not between or not whole[:first].endswith(between):
            return None
        if between.startswith(header):
            if between[len(header) :].strip():
                self._check_generation_prompt(i, prompt)
            return first - len(between) + len(header)
        if i == self.last_turn and not any(message["role"] == "user" for message in self.messages[i:]):
            return None
        # A template that drops the reasoning of earlier turns drops the opening there that it asks a model with.
        word = next(iter(self.conversation.probes[i].values()))[0]
        plain, header = self._after_previous(i, {"role": "assistant", "content": word}, thinking)
        if plain and header.startswith(plain) and between.startswith(plain):
            return first - len(between) + len(plain)
        return None

    def _after_previous(self, i: int, turn: Message, thinking: bool | None) -> tuple[str, str]:
        """The text between the last probe of messages[i - 1] and the first of `turn`, messages[i] with probes, and
        what a generation prompt puts there; empty texts where they cannot be found."""
        if i == 0:
            return "", ""
        everywhere, find = self.conversation.everywhere, self.conversation.find
        text = self.template.render([*everywhere[:i], turn, *everywhere[i + 1 :]], tools=self.tools)
        prompt = self._part(everywhere[:i], i, add_generation_prompt=True, thinking=thinking)
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
        itself = common(own[own_last[1] :], after)  # what the template writes whether a message follows or not
        span = end_of_turn(self.tokenizer, itself, bool(self.messages[i].get("tool_calls")))
        if span is not None:
            return last + span[0], last + span[1], whole
        follows = self._with_question(i, after) if i + 1 == len(self.messages) else ""
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

    def _with_question(self, i: int, after: str) -> str:
        """The text that a question puts after the last message, the turn messages[i]; `after` stands there without one.

        The question may change the turn itself: GLM's template drops its reasoning then."""
        probed = self._part([*self.conversation.with_turn(i), *QUESTION], i)
        found = self.conversation.find(i, probed)
        behind = "" if found is None else probed[found[1] :]
        if not behind.startswith(after) or not self._part([*self.messages, *QUESTION], i).endswith(behind):
            return ""
        return behind[len(after) :]

    def _opens_every_turn(self, token: str) -> bool:
        """Whether a special token begins a first question as well as an answer, so that it says nothing of an end."""
        return token in self.template.first_header() and token in self.template.generation_prompt()

    def as_last(self, i: int, whole: str) -> str:
        """The conversation up to messages[i], that one with its probes."""
        if i + 1 == len(self.messages):
            return whole
        return self._part([*self.messages[:i], self.conversation.turn(i)], i)

    def everywhere_text(self) -> str:
        """The conversation with probes in all messages."""
        if self._everywhere is None:
            self._everywhere = self.template.render(self.conversation.everywhere, tools=self.tools)
        return self._everywhere

    def _part(
        self, messages: list[Message], i: int, *, add_generation_prompt: bool = False, thinking: bool | None = None
    ) -> str:
        if not messages and not add_generation_prompt:
            return ""
        try:
            return self.template.render(
                messages, add_generation_prompt=add_generation_prompt, tools=self.tools, thinking=thinking
            )
        except (ConversationError, TemplateError) as error:
            # Templates reject conversations that begin with an assistant turn, or whose roles do not alternate.
            raise ConversationError(
                f"{UNPROVEN}: the template renders the conversation, but not its part up to messages[{i}]: {error}"
            ) from error
