"""Conversation -> token ids and loss mask, with the mask proven from the chat template.

The loss trains the text of the assistant's turns (content, reasoning and tool calls as the template writes them) and
the special token that ends each turn. It trains nothing else: neither the text that inference writes for the model (the
generation prompt) nor a newline that the template writes after that token. Messages of others are trained where they
have a weight (`loss`, or `prompt_weight`): their content, and the special token behind it that ends the message, where
the template proves one. The conversation is rendered once and tokenised once, as inference would see it; mask_proof.py
and prompt_proof.py find the trained characters in it and prove them.

Templates that edit earlier turns (Qwen3's drops their reasoning) are rendered once as a whole: an earlier turn is
trained as it stands there, its reasoning left out. To train every turn with its reasoning, write one record for each,
and train the last turn only.

A token counts as trained if it begins inside a span. So a token that straddles the beginning of a span, such as a blank
of the header merged with the first word of the answer, is not trained; these are counted.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.messages import trained_weight
from megatron_idft.corpus.records import Message
from megatron_idft.data.chat.mask_proof import Tools, prove_spans
from megatron_idft.data.chat.probes import Span
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import ConversationError, TemplateError

# They change what the model should say, and are not rendered here: training without them would be silently wrong.
_UNSERVED = {
    "function_call": "write it as tool_calls",
    "reasoning": "call it reasoning_content",
    "thinking": "call it reasoning_content",
    "refusal": "write what it says as content",
    "function_calls": "write them as tool_calls",
    **dict.fromkeys(("functions", "tools"), "give the record tools"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is served"),
}


@dataclass(slots=True)
class RenderedConversation:
    """A conversation as text.

    Attributes:
        text: the whole conversation.
        spans: the trained characters, one span for each trained message, in the order of the text.
        weights: of the spans' tokens in the loss, maybe negative; a message of weight 0 has no span.
        others: the numbers of the spans that are not the assistant's.
        spells_special: some message's content spells a special token, which will be read as that token.
        unwritten: a text of a message does not occur in the whole text, or one of a trained message not in its span,
            letter by letter but for blanks around it: the template leaves it out or rewrites it.
    """

    text: str
    spans: list[Span]
    spells_special: bool = False
    unwritten: bool = False
    weights: list[float] = field(default_factory=list)
    others: set[int] = field(default_factory=set)


@dataclass(slots=True)
class EncodedConversation:
    """A conversation as tokens.

    Attributes:
        ids: int32 [n].
        mask: uint8 [n], 1 where the token is trained.
        end_ids: the tokens that end assistant turns.
        straddles: the number of spans whose first character lies inside a token that begins before the span.
        pretokenized: ids and mask came with the record, see pretokenized.py.
        weights: float32 [n], of the tokens in the loss, not 0 where the mask is 1 and else 0; None: the mask itself.
        prompts: messages of others than the assistant are trained; not known of a conversation that came with its ids.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    end_ids: set[int]
    straddles: int
    pretokenized: bool = False
    weights: NDArray[np.float32] | None = None
    prompts: bool = False


def encode_conversation(
    tokenizer: ChatTokenizer, messages: list[Message], *, tools: Tools = None, last_turn_only: bool = False
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Token ids int32 [n] and loss mask uint8 [n] of one conversation, neither truncated nor padded.

    Arguments and errors as in `render_conversation`.
    """
    rendered = render_conversation(tokenizer, messages, tools=tools, last_turn_only=last_turn_only)
    [encoded] = tokenize(tokenizer, [rendered])
    return encoded.ids, encoded.mask


def trained_messages(
    messages: Sequence[Message], last_turn_only: bool = False, prompt_weight: float = 0.0
) -> dict[int, float]:
    """The weights in the loss by the indices of the trained messages, ascending; none is 0.

    Args:
        messages: as a `Record` holds them. What is empty and not the assistant's is not trained.
        last_turn_only: nothing is trained before the assistant's last turn but what others say since the turn before.
        prompt_weight: of the messages of users and the system that say nothing of their own.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    first = turns[-2] + 1 if last_turn_only and len(turns) > 1 else 0
    said = [i for i in range(first, len(messages)) if i in turns or str(messages[i]["content"]).strip()]
    return {i: weight for i in said if (weight := trained_weight(messages[i], prompt_weight))}


def render_conversation(
    tokenizer: ChatTokenizer,
    messages: list[Message],
    *,
    tools: Tools = None,
    last_turn_only: bool = False,
    prompt_weight: float = 0.0,
) -> RenderedConversation:
    """The text of a conversation and its trained spans.

    Args:
        tokenizer: with the template.
        messages: as a `Record` holds them.
        tools: the same.
        last_turn_only, prompt_weight: as in `trained_messages`.

    Raises:
        ConversationError: the conversation is at fault.
        TemplateError: the template does not prove the mask of an ordinary conversation of these roles either.
    """
    for i, message in enumerate(messages):
        for key, remedy in _UNSERVED.items():
            if message.get(key) not in (None, [], ""):
                raise ConversationError(f"messages[{i}].{key} is not served: {remedy}, or remove it")
    weights = trained_messages(messages, last_turn_only, prompt_weight)
    turns = [i for i in weights if messages[i]["role"] == "assistant"]
    prompts = [i for i in weights if messages[i]["role"] != "assistant"]
    try:
        proven = prove_spans(tokenizer, messages, tools, turns, prompts)
    except TemplateError as error:
        if _proves_ordinary(tokenizer, messages, turns, prompts):
            raise ConversationError(str(error)) from error
        raise
    try:
        proven.text.encode()
    except UnicodeEncodeError:  # in some key of a message that only this template writes
        raise ConversationError("holds a lone surrogate, which no tokenizer can read") from None
    trained = {i: proven.text[start:end] for i, (start, end) in zip(turns, proven.spans, strict=True)}
    written = all(_is_written(message, trained.get(i, proven.text)) for i, message in enumerate(messages))
    said = [str(message.get(key, "")) for message in messages for key in ("content", "reasoning_content")]
    placed = sorted(zip([*proven.spans, *proven.prompts], [*turns, *prompts], strict=True))
    return RenderedConversation(
        proven.text,
        [span for span, _ in placed],
        spells_special=any(tokenizer.special_pattern.search(text) for text in said),
        unwritten=proven.edited or not written,
        weights=[weights[i] for _, i in placed],
        others={number for number, (_, i) in enumerate(placed) if messages[i]["role"] != "assistant"},
    )


def tokenize(tokenizer: ChatTokenizer, conversations: Sequence[RenderedConversation]) -> list[EncodedConversation]:
    """Tokenise whole conversations and carry their spans over to the tokens.

    Raises:
        TemplateError: the tokenizer does not read an end of turn as a special token, or as in `encode_batch`.
    """
    special = set(tokenizer.special_ids.values())
    cuts = [[cut for span in item.spans for cut in span] for item in conversations]
    encoded = []
    for item, encoding in zip(
        conversations, tokenizer.encode_batch([item.text for item in conversations], cuts), strict=True
    ):
        mask = np.zeros(len(encoding.ids), dtype=np.uint8)
        weights = np.zeros(len(encoding.ids), dtype=np.float32) if set(item.weights) - {1.0} else None
        end_ids = set()
        for k, (start, end) in enumerate(item.spans):
            first, last = encoding.first[2 * k], encoding.first[2 * k + 1]
            if k not in item.others and (first == last or int(encoding.ids[last - 1]) not in special):
                ending = item.text[max(start, end - 40) : end]
                raise TemplateError(f"the tokenizer does not read the end of turn {ending!r} as a special token")
            mask[first:last] = 1
            if weights is not None:
                weights[first:last] = item.weights[k]
            if k not in item.others:
                end_ids.add(int(encoding.ids[last - 1]))
        straddles, prompts = sum(encoding.straddled[::2]), bool(item.others)
        encoded.append(EncodedConversation(encoding.ids, mask, end_ids, straddles, weights=weights, prompts=prompts))
    return encoded


def _proves_ordinary(tokenizer: ChatTokenizer, messages: list[Message], turns: list[int], prompts: list[int]) -> bool:
    """Whether the template proves a conversation of the same roles in which plain words are said."""
    ordinary = [{"role": message["role"], "content": "hello"} for message in messages]
    try:
        prove_spans(tokenizer, ordinary, None, turns, prompts)
    except (ConversationError, TemplateError):
        return False
    return True


def _is_written(message: Message, text: str) -> bool:
    """Whether a message's content stands in the text; some templates write tool results as JSON."""
    content = str(message["content"]).strip()
    if content in text:
        return True
    return message["role"] == "tool" and json.dumps(content, ensure_ascii=False)[1:-1] in text
