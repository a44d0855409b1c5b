"""The forms in which people keep conversations, and how each becomes messages.

The keys of a record say which form it has; what stands in them is never looked at to guess, and null means absent: a
Parquet file of several forms has the columns of all. Each record is looked at by itself. Where two forms are there,
the first of `FORMS` is taken if the others hold the same conversation, or are columns that it was made from (`over`);
else the record is refused.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_idft.corpus.messages import Bad, Message, checked_content, checked_messages, kind, without_nulls

Row = Mapping[str, Any]
Reader = Callable[[Row, Bad, bool], list[Message]]  # (record, makes its errors, whether Parquet holds it)


def _talk(key: str, row: Row, bad: Bad, from_parquet: bool) -> list[Message]:
    if row.get("history") not in (None, [], ""):
        raise bad("history", f'stands beside "{key}", which hold the whole conversation: put its turns there')
    return checked_messages(row[key], key, bad, from_parquet=from_parquet)


def _sharegpt(row: Row, bad: Bad, from_parquet: bool) -> list[Message]:
    masked = row.get("mask")  # NeMo: whose turns are not trained
    if isinstance(masked, str) and masked.lower() not in ("", "user", "human"):
        raise bad("mask", 'is not served but for "User": give the turns "loss", 0 or 1, and remove the key')
    messages = _talk("conversations", row, bad, from_parquet)
    for i, message in enumerate(messages if masked is not None else ()):
        if "label" in message:
            raise bad(f"conversations[{i}].label", "is not served: SteerLM's values are not written; remove the key")
    return messages


def _prompted(answer: str, row: Row, bad: Bad, from_parquet: bool) -> list[Message]:
    """A prompt and an answer to it, each a text or a list of messages. Of lists only the answer is trained, as TRL."""
    asked = row.get("prompt")
    if isinstance(asked, list):
        if row.get("history") not in (None, [], ""):
            raise bad("history", 'stands beside a "prompt" of messages: put its turns there')
        messages = checked_messages(asked, "prompt", bad, from_parquet=from_parquet)
        if messages[-1]["role"] == "assistant":
            raise bad(f"prompt[{len(messages) - 1}]", f'is the assistant\'s: write it at the beginning of "{answer}"')
        messages = [{"loss": 0} | message if message["role"] == "assistant" else message for message in messages]
    else:
        messages = [*_history(row, bad), _message("user", row, "prompt", bad)]
    if not isinstance(row.get(answer), list):
        return [*messages, _message("assistant", row, answer, bad)]
    said = checked_messages(row[answer], answer, bad, from_parquet=from_parquet)
    if said[0]["role"] != "assistant":
        raise bad(f"{answer}[0].role", f"{said[0]['role']} is not who answers: expected assistant")
    return messages + said


def _alpaca(row: Row, bad: Bad, from_parquet: bool) -> list[Message]:
    """One message asks with the instruction, an empty line and the input; Alpaca's own headers are no chat."""
    texts = [_message("user", row, key, bad)["content"] for key in ("instruction", "input") if row.get(key) is not None]
    asked = "\n\n".join(text for text in texts if text.strip())
    if not asked:
        raise bad("instruction", 'empty, and so is "input": nothing is asked')
    return [*_history(row, bad), {"role": "user", "content": asked}, _message("assistant", row, "output", bad)]


SYSTEM = ("system", "system_prompt")


@dataclass(frozen=True, slots=True)
class Form:
    """A way to write a conversation down.

    Attributes:
        name: in `the … form`.
        keys: a record has this form if none of them is null.
        read: what turns the record into messages.
        beside: further keys of the conversation.
        over: forms whose keys are carried through beside it, as columns that mean nothing.
        bare_tools: `tools` may hold functions without the object around them.
        used: all keys that the conversation comes from.
    """

    name: str
    keys: tuple[str, ...]
    read: Reader
    beside: tuple[str, ...] = ()
    over: tuple[str, ...] = ()
    bare_tools: bool = False
    used: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "used", frozenset(("messages", *self.keys, *self.beside, *SYSTEM)))


FORMS = (
    Form(
        "messages",
        ("messages",),
        partial(_talk, "messages"),
        over=("prompt-response", "prompt-completion", "Alpaca"),
    ),
    Form("prompt-response", ("prompt", "response"), partial(_prompted, "response"), ("history",), over=("Alpaca",)),
    Form("prompt-completion", ("prompt", "completion"), partial(_prompted, "completion"), ("history",)),
    Form("ShareGPT", ("conversations",), _sharegpt, bare_tools=True),
    Form("Alpaca", ("instruction", "output"), _alpaca, ("input", "history"), bare_tools=True),
)
MESSAGES = FORMS[0]
_SAID: dict[str, str] = {form.name: f"{form.name} form ({', '.join(form.keys)})" for form in FORMS}
_SAID["Alpaca"] = "Alpaca form (instruction, input, output)"
_MOST_SAID = 12  # lines about forms

# Pairs of keys that would be a question and an answer under other names.
_RENAMED = {
    ("question", "answer"): 'call them "prompt" and "response"',
    ("question", "response"): 'call "question" "prompt"',
    ("query", "response"): 'call "query" "prompt"',
    ("instruction", "response"): 'call "response" "output", and what "instruction" is about "input"',
    ("input", "output"): 'call them "prompt" and "response"',
    ("conversation",): 'call it "conversations"',
}
_ANSWERED = (
    'write the one to be trained as "completion" beside "prompt", "output" beside "instruction" or the last of'
    " the messages, and remove the pair"
)

_VERDICT = "leave out the records where it is false, and remove the key"

_TEXT_ONLY = "only text is served: leave such records out, or remove the key"
_BUILT_IN = "use a chat template that has it built in (--chat-template FILE), and remove the key"
_UNSERVED = {
    "functions": 'write them as "tools": [{"type": "function", "function": {"name": …}}]',
    "chat_template_kwargs": _BUILT_IN,
    "enable_thinking": _BUILT_IN,
    "kto_tag": _VERDICT,
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _TEXT_ONLY),
}
_WEIGHTS = ("weight", "loss_weight", "sample_weight")


def conversation(row: Row, bad: Bad, *, from_parquet: bool = False) -> tuple[list[Message], Set[str], Form]:
    """The messages of a row, checked, the keys that they came from, and its form. Raises `bad(field, why)`."""
    if row.get("messages") is not None and row.get("conversations") is None:
        form, others = MESSAGES, list[Form]()  # what stands beside it is carried through
    else:
        form, *others = _forms_of(row, bad)
    messages = _with_system(form.read(row, bad, from_parquet), row, bad)
    if messages[-1]["role"] != "assistant" or form.name not in ("messages", "prompt-response"):
        _refuse_preferences(row, form, bad)  # where the answer is there, a pair beside it is carried through
    used = form.used
    for other in others:
        if other.name not in form.over and row.get("token_ids") is None:  # else nobody renders the conversation
            if _with_system(other.read(row, bad, from_parquet), row, bad) != messages:
                differs = next(key for key in other.keys if key not in form.keys)
                raise bad(
                    differs, f"{_quoted(other)} and {_quoted(form)} hold different conversations: keep one of them"
                )
            used |= other.used
    return messages, used, form


def describe_forms(counts: Iterable[Sequence[Any]]) -> list[str]:
    """Lines that say the forms of records, given as (file, name of the form, number of records)."""
    rows = list(counts)
    if len(rows) > _MOST_SAID:
        return [
            f"{len(of)} files: {_records(sum(count for *_, count in of))} in the {_SAID[form.name]}"
            for form in FORMS
            if (of := [row for row in rows if row[1] == form.name])
        ]
    names = Counter(Path(file).name for file in {file for file, *_ in rows})
    shown = {file: Path(file).name if names[Path(file).name] == 1 else file for file, *_ in rows}
    return [f"{shown[file]}: {_records(count)} in the {_SAID[name]}" for file, name, count in rows]


def refuse_unserved(row: Row, bad: Bad, *, from_parquet: bool = False) -> None:
    """Raises `bad(field, why)` for a key that changes the conversation or its weight and is not served."""
    for key, remedy in _UNSERVED.items():
        value = without_nulls(row.get(key)) if from_parquet else row.get(key)
        if value not in (None, [], {}, ""):
            raise bad(key, f"is not served: {remedy}")
    for key in _WEIGHTS:
        if isinstance(row.get(key), int | float) and row[key] != 1:
            raise bad(key, 'is not served: give the assistant\'s messages a "loss", or call the key otherwise')


def _refuse_preferences(row: Row, form: Form | None, bad: Bad) -> None:
    """Answers of which some are to be avoided: training on all of them would be silently wrong."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        raise bad("rejected", f"pairs of answers are not served: {_ANSWERED}")
    if form is not None and form.name == "prompt-completion" and isinstance(row.get("label"), bool):  # as TRL has it
        raise bad("label", f"is not served: {_VERDICT}")


def _forms_of(row: Row, bad: Bad) -> list[Form]:
    found = [form for form in FORMS if all(row.get(key) is not None for key in form.keys)]
    if not found:
        raise _formless(row, bad)
    return found


def _formless(row: Row, bad: Bad) -> Exception:
    _refuse_preferences(row, None, bad)
    for keys, remedy in _RENAMED.items():
        if all(row.get(key) is not None for key in keys):
            return bad(keys[0], f"is not read under this name: {remedy}")
    for form in FORMS:
        there = [key for key in form.keys if row.get(key) is not None]
        if there:
            absent = next(key for key in form.keys if key not in there)
            return bad(absent, f'expected a string, found nothing; "{there[0]}" belongs to the {_SAID[form.name]}')
    if row.get("text") is not None:
        return bad("text", 'says nothing of who speaks, so no answer can be trained: write "messages"')
    found = ", ".join(repr(key) for key, value in row.items() if value is not None)
    served = "; ".join(map(_quoted, FORMS))
    return bad("messages", f"missing; this record has {found or 'nothing'}, and one to train on has {served}")


def _message(role: str, row: Row, key: str, bad: Bad) -> Message:
    return {"role": role, "content": checked_content(row.get(key), role, key, bad)}


def _history(row: Row, bad: Bad) -> list[Message]:
    pairs = row.get("history")
    if pairs is None or pairs == "":
        return []
    if not isinstance(pairs, list):
        raise bad("history", f"expected a list of [question, answer], found {kind(pairs)}")
    messages: list[Message] = []
    for i, pair in enumerate(pairs):
        at = f"history[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise bad(at, f"expected [question, answer], found {kind(pair)}")
        messages += [
            {"role": role, "content": checked_content(text, role, f"{at}[{place}]", bad)}
            for place, (role, text) in enumerate(zip(("user", "assistant"), pair, strict=True))
        ]
    return messages


def _with_system(messages: list[Message], row: Row, bad: Bad) -> list[Message]:
    said = {key: row[key] for key in SYSTEM if row.get(key) not in (None, "")}
    for key, text in said.items():
        checked_content(text, "system", key, bad)
        there = [message["content"] for message in messages if message["role"] == "system"]
        if not there:
            messages = [{"role": "system", "content": text}, *messages]
        elif there != [text]:
            raise bad(key, "contradicts the system message that is there already: keep one of the two")
    return messages


def _records(count: int) -> str:
    return f"{count:,} record{'s' * (count != 1)}"


def _quoted(form: Form) -> str:
    return " and ".join(f'"{key}"' for key in form.keys)
