"""The conversation of a row, from its keys: `messages`, or `prompt` and `response`, with `system` and `history`.

Keys that say something of the conversation, and that nobody renders here, are refused by name: training without them
would be silently wrong. All others are no part of it.
"""

from typing import Any

from megatron_idft.corpus.messages import Bad, Message, checked_content, checked_messages, kind, without_nulls

_SYSTEM = ("system", "system_prompt")
_TEXT_ONLY = "only text is served: leave such records out, or remove the key"
_BUILT_IN = "use a chat template that has it built in (--chat-template FILE), and remove the key"
_UNSERVED = {
    "functions": 'write them as "tools": [{"type": "function", "function": {"name": …}}]',
    "chat_template_kwargs": _BUILT_IN,
    "enable_thinking": _BUILT_IN,
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _TEXT_ONLY),
}
_WEIGHTS = ("weight", "loss_weight", "sample_weight")


def conversation(row: dict[str, Any], bad: Bad, *, from_parquet: bool = False) -> tuple[list[Message], set[str]]:
    """The messages of a row, checked, and the keys that they came from. Raises `bad(field, why)`."""
    if row.get("messages") is not None:
        messages, used = checked_messages(row["messages"], bad, from_parquet=from_parquet), {"messages"}
        if row.get("history") not in (None, [], ""):
            raise bad("history", 'stands beside "messages", which hold the whole conversation: put its turns there')
    elif row.get("prompt") is not None or row.get("response") is not None:
        messages, used = _history(row.get("history"), bad), {"messages", "history", "prompt", "response"}
        messages += _exchange((row.get("prompt"), row.get("response")), ("prompt", "response"), bad)
    else:
        raise bad("messages", 'missing; a record holds "messages", or "prompt" and "response"')
    return _with_system(messages, row, bad), used.union(_SYSTEM)


def refuse_unserved(row: dict[str, Any], bad: Bad, *, from_parquet: bool = False) -> None:
    """Raises `bad(field, why)` for a key that changes the conversation or its weight and is not served."""
    for key, remedy in _UNSERVED.items():
        value = without_nulls(row.get(key)) if from_parquet else row.get(key)
        if value not in (None, [], {}, ""):
            raise bad(key, f"is not served: {remedy}")
    for key in _WEIGHTS:
        if isinstance(row.get(key), int | float) and row[key] != 1:
            raise bad(key, 'is not served: give the assistant\'s messages a "loss", or call the key otherwise')


def _history(pairs: Any, bad: Bad) -> list[Message]:
    if pairs is None or pairs == "":
        return []
    if not isinstance(pairs, list):
        raise bad("history", f"expected a list of [question, answer], found {kind(pairs)}")
    messages: list[Message] = []
    for i, pair in enumerate(pairs):
        at = f"history[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise bad(at, f"expected [question, answer], found {kind(pair)}")
        messages += _exchange(pair, (f"{at}[0]", f"{at}[1]"), bad)
    return messages


def _exchange(texts: Any, fields: tuple[str, str], bad: Bad) -> list[Message]:
    return [
        {"role": role, "content": checked_content(text, role, field, bad)}
        for text, role, field in zip(texts, ("user", "assistant"), fields, strict=True)
    ]


def _with_system(messages: list[Message], row: dict[str, Any], bad: Bad) -> list[Message]:
    said = {key: row[key] for key in _SYSTEM if row.get(key) not in (None, "")}
    for key, text in said.items():
        checked_content(text, "system", key, bad)
        there = [message["content"] for message in messages if message["role"] == "system"]
        if not there:
            messages = [{"role": "system", "content": text}, *messages]
        elif there != [text]:
            raise bad(key, "contradicts the system message that is there already: keep one of the two")
    return messages
