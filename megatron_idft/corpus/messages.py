"""The messages and tools of a record, checked and brought into one form: what chat templates expect.

A message is `{"role", "content"}`, or ShareGPT's `{"from", "value"}` with the names of roles that `SHAREGPT_ROLES`
lists. `content` is a text, or a list of text parts, which are joined. It may carry, beside keys that are passed on as
they came:

- all: `loss`, the weight of its tokens in the loss, which may be negative. What other trainers call `loss` is read as
  such of the assistant, with which all of them agree.
- assistant: `tool_calls` in the OpenAI form, `reasoning_content`. `content` may be empty or null beside one of these
  two, and is then the empty text.
- tool: `tool_call_id`, `name`.

Arguments of tool calls become objects, also where they came as JSON text: templates of Hugging Face write them with
`tojson`, which would quote a text a second time. formats.py says where a record holds its messages.
"""

import json
from collections.abc import Callable
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
# Weights are kept in 32 bits: beyond these, the size of a weight would become infinity or nothing.
LEAST_WEIGHT, GREATEST_WEIGHT = 2.0**-126, 3e38

MAX_DEPTH = 100  # of nested lists and objects: what is read must also be written, by programs that recurse

# `loss` in the words of OpenAI, Axolotl, slime and others: 0 or false leaves the message out, 1 or true trains it.
_LOSS_NAMES = ("loss", "loss_mask", "step_loss_mask", "loss_weight", "weight", "train", "trainable", "training")
# They say which tokens are trained, too, but a part of the message, or in a sense that differs between programs.
_UNCLEAR_LOSS_NAMES = ("mask", "masked", "loss_scale", "train_detail", "training_detail", "ignore_loss", "no_loss")

# Who speaks, in ShareGPT's words, as FastChat, Axolotl and LLaMA-Factory read them; in any case of letters.
SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_PART_KEYS = ("type", "text", "annotations", "cache_control", "citations", "logprobs")  # the last four change no text

Message = dict[str, Any]
Bad = Callable[[str, str], Exception]  # (field, message) -> the error to raise


def checked_messages(messages: Any, key: str, bad: Bad, *, from_parquet: bool = False) -> list[Message]:
    """The messages of a record in the form above.

    Args:
        messages: as the record has them: a list, or its JSON text.
        key: of the record, that holds them.
        bad: makes the error for a field and the reason.
        from_parquet: every object has every key there, so null means absent inside tool calls too.

    Raises:
        RecordError: as `bad` makes it.
    """
    if isinstance(messages, str):
        messages, from_parquet = _from_json(messages, key, bad), False
        _check_text(json.dumps(messages, ensure_ascii=False), key, bad)  # escapes in there were not looked at yet
    if not isinstance(messages, list):
        raise bad(key, f"expected a list, found {kind(messages)}")
    if not messages:
        raise bad(key, "empty")
    return [_checked_message(message, f"{key}[{i}]", bad, from_parquet) for i, message in enumerate(messages)]


def checked_tools(
    tools: Any, bad: Bad, *, from_parquet: bool = False, may_be_bare: bool = False
) -> list[dict[str, Any]] | None:
    """The record's tools in the OpenAI form; None where there are none. A JSON text is read. Raises `bad(field, why)`.

    Parquet cannot hold a different object in each row, so a JSON text is the usual form there. `may_be_bare`: functions
    without the object around them, as LLaMA-Factory has them, are given it.
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
    if may_be_bare:
        tools = [
            {"type": "function", "function": tool} if isinstance(tool, dict) and "name" in tool else tool
            for tool in tools
        ]
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


def is_weight(value: float) -> bool:
    """Whether the number may stand for what a token counts in the loss: 0, or of a size that 32 bits keep."""
    return value == 0 or LEAST_WEIGHT <= abs(value) <= GREATEST_WEIGHT  # NaN fails both


def trained_weight(message: Message, prompt_weight: float = 0.0) -> float:
    """The weight of a checked message's tokens in the loss: its `loss`; without one, 1 for an assistant's, 0 for a
    tool's, and `prompt_weight` for a user's or the system's."""
    loss = message.get("loss")
    if loss is not None:
        return float(loss)
    return {"assistant": 1.0, "tool": 0.0}.get(message["role"], prompt_weight)


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
        if role is not None:
            raise bad(f"{at}.role", f"{shown(role)} is none of {', '.join(ROLES)}")
        if message.get("from") is None:
            raise bad(f"{at}.role", 'missing; a message holds "role" and "content", or "from" and "value"')
        renamed = {f"{at}.content": f"{at}.value"}
        if message.get("tool_calls") is None:
            renamed[f"{at}.tool_calls"] = f"{at}.value"
        return _checked_message(_from_sharegpt(message, at, bad), at, _naming(renamed, bad), from_parquet)
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
    content = checked.get("content")
    if not isinstance(content, str):
        content = _unusual_content(content, checked, at, bad)
    checked["content"] = checked_content(content, role, f"{at}.content", bad, may_be_empty=may_be_empty)
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if not isinstance(checked.get(key, ""), str):
                raise bad(f"{at}.{key}", f"expected a string, found {kind(checked[key])}")
    _read_loss(checked, at, bad)
    return checked


def _naming(names: dict[str, str], bad: Bad) -> Bad:
    """`bad`, with the fields that begin with a name by the name that the record has for it."""

    def renamed(field: str, why: str) -> Exception:
        name = next((name for name in names if field.startswith(name)), "")
        return bad(names.get(name, "") + field[len(name) :], why)

    return renamed


def _unusual_content(content: Any, message: Message, at: str, bad: Bad) -> Any:
    """The text of a list of parts; another value as it is."""
    if isinstance(content, list):
        return "".join(_part_text(part, f"{at}.content[{i}]", bad) for i, part in enumerate(content))
    if content is None and "value" in message:
        raise bad(f"{at}.value", 'stands beside "role": write "role" and "content", or "from" and "value"')
    if content is None and "function_call" in message:
        raise bad(f"{at}.function_call", "is not served: write it as tool_calls")
    return content


def _part_text(part: Any, at: str, bad: Bad) -> str:
    """The text of a part of OpenAI's content lists."""
    if not isinstance(part, dict):
        raise bad(at, f'expected {{"type": "text", "text": …}}, found {kind(part)}')
    if part.get("type") not in (None, *_TEXT_PARTS):
        raise bad(f"{at}.type", f"{shown(part['type'])} is not served, only text is: leave such records out")
    for key, value in part.items():
        if key not in _PART_KEYS and value not in (None, "", [], {}):
            raise bad(f"{at}.{shown(key)[1:-1]}", "is not served, only text is: leave such records out")
    text = part.get("text")
    if not isinstance(text, str):
        raise bad(f"{at}.text", f"expected a string, found {kind(text)}")
    return text


def _from_sharegpt(turn: Message, at: str, bad: Bad) -> Message:
    """A turn `{"from", "value"}` with the keys of a message, still to be checked."""
    speaker, value = turn["from"], turn.get("value")
    role = SHAREGPT_ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise bad(f"{at}.from", f"{shown(speaker)} is none of {', '.join(SHAREGPT_ROLES)}")
    if turn.get("content") is not None:
        raise bad(f"{at}.content", 'stands beside "from": write "from" and "value", or "role" and "content"')
    own = ("from", "value", "role", "content")
    message = {key: item for key, item in turn.items() if key not in own and item is not None}
    if speaker.lower() != "function_call":
        return {"role": role, "content": value} | message
    if "tool_calls" in message:
        raise bad(f"{at}.tool_calls", 'stands beside "function_call", which means the same: keep one of the two')
    return {"role": role, "content": "", "tool_calls": _called(value, f"{at}.value", bad)} | message


def _called(value: Any, at: str, bad: Bad) -> list[dict[str, Any]]:
    """The calls that the value of a `function_call` turn holds: `{"name", "arguments"}`, or a list of them, as JSON."""
    calls = _from_json(value, at, bad) if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not call.keys() <= {"name", "arguments"}:
            raise bad(
                at, f'expected {{"name": …, "arguments": {{…}}}} as JSON, or a list of them, found {shown(value)}'
            )
    if not calls:
        raise bad(at, "empty: nothing to train on")
    return [{"function": call} for call in calls]


def _read_loss(message: Message, at: str, bad: Bad) -> None:
    """Check the message's weight, and call it `loss`."""
    for name in _UNCLEAR_LOSS_NAMES:
        if name in message:
            raise bad(f"{at}.{name}", "is not served, its sense differs between programs: write loss, 0 or 1")
    names = [name for name in _LOSS_NAMES if name in message]
    if len(names) > 1:
        raise bad(f"{at}.{names[1]}", f"stands beside {names[0]}, which means the same: keep one of the two")
    for name in names:
        _check_loss(message[name], f"{at}.{name}", bad)
        if name != "loss" and message[name] and message["role"] != "assistant":
            why = f"some programs train only what the assistant says in spite of it, and this is a {message['role']}"
            raise bad(f"{at}.{name}", f"{why} message: call it loss to train the message, or leave it out")
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


def _check_loss(loss: Any, at: str, bad: Bad) -> None:
    if not isinstance(loss, bool | int | float):
        raise bad(at, f"expected 0, 1 or a weight, found {kind(loss)}")
    if not is_weight(loss):
        raise bad(at, f"{shown(loss)} is no weight: it must be 0 or of a size between {LEAST_WEIGHT:.1e} and 3e38")


def _from_json(text: str, at: str, bad: Bad) -> Any:
    try:
        value = json.loads(text)
        if too_deep(value):
            raise RecursionError
    except RecursionError:  # of json's own, or ours
        raise bad(at, f"nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise bad(at, f"not JSON: {error}; write it as json.dumps does") from None
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
