"""Conversation -> token ids and loss mask, with the mask proven from the chat template.

Trained are each assistant turn's content and the special token that ends the turn; nothing else, not even a newline
that the template writes behind that token. The conversation is rendered once and tokenised once, as inference would
see it; the assistant's characters in it are found in one of two ways:

- The template has `{% generation %}` blocks: they are taken, one for each assistant turn.
- It has none: the text up to an assistant turn, with the generation prompt, must be a prefix of the whole text, and
  so must
  the text up to its end. The span lies between the two.

Either way the turn is rendered again with a probe in place of its content, which shows where the content stands and
what the template writes behind it. A template that edits earlier turns without marking them, that never ends the turn
with a special token, or that hides the turn's header from the generation prompt proves nothing, and is refused
(TemplateError).

A token counts as trained if it begins inside a span. So a token that straddles the beginning of a span, such as a blank
of the header merged with the first word of the answer, is not trained; these are counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.records import Message
from megatron_idft.data.template import ChatTemplate, ConversationError, TemplateError
from megatron_idft.data.tokenizer import ChatTokenizer

Span = tuple[int, int]  # [start, end) characters

_UNPROVEN = "the loss mask cannot be proven"
_REMEDY = (
    "mark the assistant's text in the template with {% generation %} … {% endgeneration %}, the end-of-turn token "
    "inside, and pass the edited template with --chat-template FILE"
)
# They change what the model should say, and are not rendered here: training without them would be silently wrong.
_UNSERVED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "loss", "weight", "train")


@dataclass(slots=True)
class RenderedConversation:
    """text: the whole conversation. spans: the trained characters, one span for each assistant turn, in order.

    spells_special: some message's content spells a special token, which will be read as that token.
    unwritten: some system, user or tool message does not occur in the text: the template leaves it out or rewrites it.
    """

    text: str
    spans: list[Span]
    spells_special: bool = False
    unwritten: bool = False


@dataclass(slots=True)
class EncodedConversation:
    """ids: int32 [n]. mask: uint8 [n], 1 where the token is trained. end_ids: the tokens that end assistant turns.

    straddles: the number of spans whose first character lies inside a token that begins before the span.
    pretokenized: ids and mask came with the record, see pretokenized.py.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    end_ids: set[int]
    straddles: int
    pretokenized: bool = False


def encode_conversation(
    tokenizer: ChatTokenizer, messages: list[Message]
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Token ids int32 [n] and loss mask uint8 [n] of one conversation, neither truncated nor padded.

    Raises ConversationError when the conversation is at fault, TemplateError when the template does not prove the mask.
    """
    [encoded] = tokenize(tokenizer, [render_conversation(tokenizer, messages)])
    return encoded.ids, encoded.mask


def render_conversation(tokenizer: ChatTokenizer, messages: list[Message]) -> RenderedConversation:
    """The text of a conversation and its trained spans. Raises ConversationError and TemplateError."""
    for i, message in enumerate(messages):
        for key in _UNSERVED:
            if message.get(key) not in (None, [], ""):
                raise ConversationError(f"messages[{i}].{key} is not served: remove it, or write it into the content")
    template = tokenizer.template
    if template.has_generation_blocks:
        text, spans = _marked_spans(tokenizer, messages)
    else:
        text, spans = _prefix_spans(tokenizer, messages)
    contents = [(message["role"], str(message["content"])) for message in messages]
    return RenderedConversation(
        text,
        spans,
        spells_special=any(tokenizer.special_pattern.search(content) for _, content in contents),
        unwritten=any(role != "assistant" and content.strip() not in text for role, content in contents),
    )


def tokenize(tokenizer: ChatTokenizer, conversations: Sequence[RenderedConversation]) -> list[EncodedConversation]:
    """Tokenise whole conversations and carry their spans over to the tokens. Raises TemplateError."""
    special = set(tokenizer.special_ids.values())
    cuts = [[cut for span in item.spans for cut in span] for item in conversations]
    encoded = []
    for item, encoding in zip(
        conversations, tokenizer.encode_batch([item.text for item in conversations], cuts), strict=True
    ):
        mask = np.zeros(len(encoding.ids), dtype=np.uint8)
        end_ids = set()
        for (start, end), first, last in zip(item.spans, encoding.first[::2], encoding.first[1::2], strict=True):
            if first == last or int(encoding.ids[last - 1]) not in special:
                ending = item.text[max(start, end - 40) : end]
                raise TemplateError(f"the tokenizer does not read the end of turn {ending!r} as a special token")
            mask[first:last] = 1
            end_ids.add(int(encoding.ids[last - 1]))
        encoded.append(EncodedConversation(encoding.ids, mask, end_ids, sum(encoding.straddled[::2])))
    return encoded


def _prefix_spans(tokenizer: ChatTokenizer, messages: list[Message]) -> tuple[str, list[Span]]:
    template = tokenizer.template
    text = template.render(messages)
    spans = []
    for i, message in _assistant_turns(messages):
        prompt = _render_part(template, messages[:i], i, add_generation_prompt=True)
        through = text if i + 1 == len(messages) else _render_part(template, messages[: i + 1], i)
        if not text.startswith(through) or not through.startswith(prompt):
            raise TemplateError(
                f"{_UNPROVEN}: with messages[{i}] as the last or the next one, the template writes another text than "
                f"in the whole conversation (it edits earlier turns). Remedy: {_REMEDY}"
            )
        probe = _probe(messages)
        probed = _render_part(template, [*messages[:i], {**message, "content": probe}], i)
        before, after = _around(probe, probed, i)
        header = before.removeprefix(prompt)
        if header.strip() and prompt == _render_part(template, messages[:i], i):
            raise TemplateError(
                f"{_UNPROVEN}: the template writes {header!r} before the answer but ignores add_generation_prompt. "
                f"Remedy: {_REMEDY}"
            )
        if not through.endswith(after):
            raise TemplateError(
                f"{_UNPROVEN}: what the template writes behind the answer depends on the answer. Remedy: {_REMEDY}"
            )
        spans.append((len(prompt), len(through) - len(after) + _end_of_turn(tokenizer, after)))
    return text, spans


def _marked_spans(tokenizer: ChatTokenizer, messages: list[Message]) -> tuple[str, list[Span]]:
    template = tokenizer.template
    text, blocks = template.render_marked(messages)
    turns = _assistant_turns(messages)
    if len(blocks) != len(turns):
        raise TemplateError(
            f"{_UNPROVEN}: the template wrote {len(blocks)} {{% generation %}} blocks for {len(turns)} assistant "
            "turns; it must write exactly one around each"
        )
    header = _generation_prompt(template)
    spans = []
    for (i, message), (start, end), k in zip(turns, blocks, range(len(turns)), strict=True):
        probe = _probe(messages)
        probed, probed_blocks = template.render_marked(
            [*messages[:i], {**message, "content": probe}, *messages[i + 1 :]]
        )
        if len(probed_blocks) != len(blocks):
            raise TemplateError(f"{_UNPROVEN}: the number of {{% generation %}} blocks depends on the answer")
        _, after = _around(probe, probed[slice(*probed_blocks[k])], i)
        if not text[start:end].endswith(after):
            raise TemplateError(f"{_UNPROVEN}: what the template writes behind the answer depends on the answer")
        # The header is what inference writes for the model, even where a template puts it into the block.
        start += len(header) if header and text.startswith(header, start) else 0
        spans.append((start, end - len(after) + _end_of_turn(tokenizer, after)))
    return text, spans


def _assistant_turns(messages: list[Message]) -> list[tuple[int, Message]]:
    return [(i, message) for i, message in enumerate(messages) if message["role"] == "assistant"]


def _render_part(
    template: ChatTemplate, messages: list[Message], i: int, *, add_generation_prompt: bool = False
) -> str:
    if not messages and not add_generation_prompt:
        return ""
    try:
        return template.render(messages, add_generation_prompt=add_generation_prompt)
    except (ConversationError, TemplateError) as error:
        # Templates reject conversations that begin with an assistant turn, or whose roles do not alternate.
        raise ConversationError(
            f"{_UNPROVEN}: the template renders the conversation, but not its part up to messages[{i}]: {error}"
        ) from error


@lru_cache(maxsize=8)
def _generation_prompt(template: ChatTemplate) -> str:
    """What `add_generation_prompt` appends to a conversation."""
    messages: list[Message] = [{"role": "user", "content": "question"}]
    try:
        without = template.render(messages)
        return template.render(messages, add_generation_prompt=True).removeprefix(without)
    except ConversationError:  # a template that wants a system message, say
        return ""


def _probe(messages: list[Message]) -> str:
    """Letters that occur in no message, for a template to put where the answer goes."""
    probe = "Probe"
    while any(probe in str(message["content"]) for message in messages):
        probe += "x"
    return probe


def _around(probe: str, text: str, i: int) -> tuple[str, str]:
    before, found, after = text.partition(probe)
    if not found or probe in after:
        times = "more than once" if found else "nowhere"
        raise TemplateError(
            f"{_UNPROVEN}: the content of messages[{i}] stands {times} in the assistant's part. Remedy: {_REMEDY}"
        )
    return before, after


def _end_of_turn(tokenizer: ChatTokenizer, after: str) -> int:
    """The length of the part of `after`, the template's text behind an answer, that ends the turn.

    That is up to the first special token, and through the special tokens that follow it directly (Cohere's templates
    end with two), but never into the BOS of the next turn.
    """
    end = None
    for token in tokenizer.special_pattern.finditer(after):
        if tokenizer.special_ids[token.group()] == tokenizer.bos_id or end not in (None, token.start()):
            break
        end = token.end()
    if end is None:
        raise TemplateError(
            f"{_UNPROVEN}: the template never ends the assistant's turn with a special token of this tokenizer "
            f"(behind the answer it writes {after!r}), so the model would not learn to stop. "
            "Remedy: write the EOS or end-of-turn token behind the answer, inside the {% generation %} block if there "
            "is one, and pass the template with --chat-template FILE"
        )
    return end
