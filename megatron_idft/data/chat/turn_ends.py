"""The special token that ends a turn: without it in the loss, a model does not learn to stop."""

from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import TemplateError

Span = tuple[int, int]  # [start, end) characters
UNPROVEN = "the loss mask cannot be proven"


def end_of_turn(tokenizer: ChatTokenizer, after: str, ends_with_call: bool) -> Span | None:
    """Where in `after`, the template's text behind what the assistant says, the end of the turn stands; None: nowhere.

    That is the first special token, with the special tokens that follow it directly (Cohere's templates end with two),
    but never the BOS of a next turn. Behind tool calls, whose own special tokens come first, it is the EOS token if the
    template writes it.
    """
    bos, eos = bos_only(tokenizer), tokenizer.eos_id
    tokens = list(tokenizer.special_pattern.finditer(after))
    if ends_with_call and any(tokenizer.special_ids[token.group()] == eos for token in tokens):
        while tokenizer.special_ids[tokens[0].group()] != eos:
            tokens.pop(0)
    begin = end = None
    for token in tokens:
        if tokenizer.special_ids[token.group()] == bos or end not in (None, token.start()):
            break
        begin, end = token.start() if begin is None else begin, token.end()
    return None if begin is None or end is None else (begin, end)


def never_ends(after: str) -> TemplateError:
    """The error of a template that ends no turn, for what it writes behind an answer."""
    return TemplateError(
        f"{UNPROVEN}: the template never ends the assistant's turn with a special token of this tokenizer "
        f"(behind the answer it writes {after[:80]!r}), so the model would not learn to stop. "
        "Remedy: write the EOS or end-of-turn token behind the answer, inside the {% generation %} block if there "
        "is one, and pass the template with --chat-template FILE"
    )


def bos_only(tokenizer: ChatTokenizer) -> int | None:
    """The id of BOS, None where the same token is the EOS."""
    return None if tokenizer.bos_id == tokenizer.eos_id else tokenizer.bos_id  # GPT-2 has one token for both
