"""The messages and tools of a record, checked and brought into one form: what chat templates expect.

A message is `{"role", "content"}` and may carry, beside keys that are passed on as they came:

- assistant: `tool_calls` in the OpenAI form, `reasoning_content`, `loss`. `content` may be empty or null beside one of
  the first two, and is then the empty text. What other trainers call `loss` is read as such.
- tool: `tool_call_id`, `name`.

Arguments of tool calls become objects, also where they came as JSON text: templates of Hugging Face write them with
`tojson`, which would quote a text a second time.

A record holds them as `messages`, or as `prompt` and `response`, with `system` and `history`. Keys that say something
of the conversation, and that nobody renders here, are refused by name: training without them would be silently wrong.
All others are no part of it.
"""

import json
from collections.abc import Callable
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
# Weights are kept in 32 bits: beyond these, a weight would become infinity or nothing.
LEAST_WEIGHT, GREATEST_WEIGHT = 2.0**-126, 3e38

MAX_DEPTH = 100  # of nested lists and objects: what is read must also be written, by programs that recurse

# `loss` in the words of OpenAI, Axolotl, slime and others: 0 or false leaves the message out, 1 or true trains it.
_LOSS_NAMES = ("loss", "loss_mask", "step_loss_mask", "loss_weight", "weight", "train", "trainable", "training")
# They say which tokens are trained, too, but a part of the message, or in a sense that differs between programs.
_UNCLEAR_LOSS_NAMES = ("mask", "masked", "loss_scale", "train_detail", "training_detail", "ignore_loss", "no_loss")

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

Message = dict[str, Any]
Bad = Callable[[str, str], Exception]  # (field, message) -> the error to raise


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


def checked_messages(messages: Any, bad: Bad, *, from_parquet: bool = False) -> list[Message]:
    """The messages of a record in the form above.

    Args:
        messages: as the record has them.
        bad: makes the error for a field and the reason.
        from_parquet: every object has every key there, so null means absent inside tool calls too.

    Raises:
        RecordError: as `bad` makes it.
    """
    if not isinstance(messages, list):
        raise bad("messages", f"expected a list, found {kind(messages)}")
    if not messages:
        raise bad("messages", "empty")
    return [_checked_message(message, f"messages[{i}]", bad, from_parquet) for i, message in enumerate(messages)]


def checked_tools(tools: Any, bad: Bad, *, from_parquet: bool = False) -> list[dict[str, Any]] | None:
    """The record's tools in the OpenAI form; None where there are none. A JSON text is read. Raises `bad(field, why)`.

    Parquet cannot hold a different object in each row, so a JSON text is the usual form there.
    """
    if isinstance(tools, str):
        if not tools.strip():
            return None
        tools = _from_json(tools, "tools", bad)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise bad("tools", f"expected a list, found {kind(tools)}")
    if from_parquet:
        tools = without_nulls(tools)
    for i, tool in enumerate(tools):
        function = _function(tool, f"tools[{i}]", bad)
        if not isinstance(function.get("description", ""), str):
            raise bad(f"tools[{i}].function.description", f"expected a string, found {kind(function['description'])}")
        if not isinstance(function.get("parameters", {}), dict | None):
            raise bad(f"tools[{i}].function.parameters", f"expected an object, found {kind(function['parameters'])}")
        _check_writable(tool, f"tools[{i}]", bad)
    checked: list[dict[str, Any]] = tools
    return checked


def checked_content(value: Any, role: str, at: str, bad: Bad, *, may_be_empty: bool = False) -> str:
    """A message's text. Raises `bad(at, why)` where it is no string, or an assistant's that is empty and may not be."""
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise bad(at, f"expected a string, found {kind(value)}")
    if role == "assistant" and not value.strip() and not may_be_empty:
        raise bad(at, "empty: nothing to train on")
    _check_text(value, at, bad)
    return value


def trained_weight(message: Message) -> float:
    """The weight of a checked message's tokens in the loss: its `loss`; without one, 1 for an assistant's, else 0."""
    loss = message.get("loss")
    return float(message["role"] == "assistant") if loss is None else float(loss)


def kind(value: Any) -> str:
    """The kind of a JSON value, for error messages."""
    if value is None:
        return "nothing"
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}.get(type(value)) or shown(value)


def shown(value: Any) -> str:
    """A value in an error message: its beginning."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def too_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than MAX_DEPTH levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [item for item in level if isinstance(item, dict | list)]
        if not nested:
            return False
        level = [child for item in nested for child in (item.values() if isinstance(item, dict) else item)]
    return True


def without_nulls(value: Any) -> Any:
    """The value without keys that are null, at any depth: Parquet gives every object every key."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _checked_message(message: Any, at: str, bad: Bad, from_parquet: bool) -> Message:
    if not isinstance(message, dict):
        raise bad(at, f"expected an object, found {kind(message)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise bad(f"{at}.role", f"{shown(role)} is none of {', '.join(ROLES)}")
    # Parquet gives every message every key; null means absent there and means nothing in JSON.
    checked = {key: value for key, value in message.items() if value is not None}
    calls = _checked_calls(checked.pop("tool_calls", None), role, f"{at}.tool_calls", bad, from_parquet)
    if calls:
        checked["tool_calls"] = calls
    reasoning = checked.pop("reasoning_content", "")
    if not isinstance(reasoning, str):
        raise bad(f"{at}.reasoning_content", f"expected a string, found {kind(reasoning)}")
    _check_text(reasoning, f"{at}.reasoning_content", bad)
    if reasoning.strip():
        if role != "assistant":
            raise bad(f"{at}.reasoning_content", f"only assistant messages have one, this is a {role} message")
        checked["reasoning_content"] = reasoning
    may_be_empty = bool(calls or reasoning.strip())
    checked["content"] = checked_content(checked.get("content"), role, f"{at}.content", bad, may_be_empty=may_be_empty)
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if not isinstance(checked.get(key, ""), str):
                raise bad(f"{at}.{key}", f"expected a string, found {kind(checked[key])}")
    _read_loss(checked, at, bad)
    return checked


def _read_loss(message: Message, at: str, bad: Bad) -> None:
    """Check the message's weight, and call it `loss`."""
    for name in _UNCLEAR_LOSS_NAMES:
        if name in message:
            raise bad(f"{at}.{name}", "is not served, its sense differs between programs: write loss, 0 or 1")
    names = [name for name in _LOSS_NAMES if name in message]
    if len(names) > 1:
        raise bad(f"{at}.{names[1]}", f"stands beside {names[0]}, which means the same: keep one of the two")
    for name in names:
        _check_loss(message[name], message["role"], f"{at}.{name}", bad)
        message["loss"] = message.pop(name)


def _checked_calls(calls: Any, role: str, at: str, bad: Bad, from_parquet: bool) -> list[dict[str, Any]]:
    if calls is None or calls == []:
        return []
    if not isinstance(calls, list):
        raise bad(at, f"expected a list, found {kind(calls)}")
    if role != "assistant":
        raise bad(at, f"only assistant messages have tool calls, this is a {role} message")
    checked = []
    for i, call in enumerate(calls):
        place = f"{at}[{i}]"
        function = _function(call, place, bad)
        if not isinstance(call.get("id") or "", str):
            raise bad(f"{place}.id", f"expected a string, found {kind(call['id'])}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _from_json(arguments, f"{place}.function.arguments", bad) if arguments.strip() else {}
        elif from_parquet:
            arguments = without_nulls(arguments)
        if arguments is not None and not isinstance(arguments, dict):
            raise bad(
                f"{place}.function.arguments", f"expected an object, or JSON text of one, found {kind(arguments)}"
            )
        call = {key: value for key, value in call.items() if value is not None}
        function = {key: value for key, value in function.items() if value is not None}
        checked.append(call | {"type": "function", "function": function | {"arguments": arguments or {}}})
        _check_writable(checked[-1], place, bad)
    return checked


def _function(value: Any, at: str, bad: Bad) -> dict[str, Any]:
    form = '{"type": "function", "function": {"name": …}}'
    if not isinstance(value, dict):
        raise bad(at, f"expected an object, found {kind(value)}")
    if value.get("type") not in (None, "function"):
        raise bad(f"{at}.type", f'expected "function", found {shown(value["type"])}')
    function = value.get("function")
    if not isinstance(function, dict):
        raise bad(f"{at}.function", f"expected an object as in {form}, found {kind(function)}")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise bad(f"{at}.function.name", f"expected a name, found {kind(name) if name != '' else 'an empty string'}")
    return function


def _check_loss(loss: Any, role: str, at: str, bad: Bad) -> None:
    if not isinstance(loss, bool | int | float):
        raise bad(at, f"expected 0, 1 or a weight, found {kind(loss)}")
    if not 0 <= loss <= GREATEST_WEIGHT or 0 < loss < LEAST_WEIGHT:  # NaN fails the first
        raise bad(at, f"{shown(loss)} is no weight: it must be 0 or lie between {LEAST_WEIGHT:.1e} and 3e38")
    if loss and role != "assistant":
        raise bad(at, f"only what the assistant says is trained, and this is a {role} message: leave it out, or 0")


def _from_json(text: str, at: str, bad: Bad) -> Any:
    try:
        value = json.loads(text)
        if too_deep(value):
            raise RecursionError
    except RecursionError:  # of json's own, or ours
        raise bad(at, f"nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise bad(at, f"not JSON: {error}") from None
    return value


def _check_text(value: str, at: str, bad: Bad) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise bad(at, "holds a lone surrogate, which no tokenizer can read") from None


def _check_writable(value: Any, at: str, bad: Bad) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise bad(at, "holds NaN or infinity, which is no JSON") from None
    except (TypeError, RecursionError) as error:  # what only Parquet holds, such as dates
        raise bad(at, f"cannot be written as JSON: {error}") from None
    _check_text(text, at, bad)


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
