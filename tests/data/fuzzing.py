"""Records drawn from a seed, good ones and bad ones, and what is right for each: the oracle of the fuzzer."""

import datetime
import decimal
import json
from dataclasses import dataclass, field

import pyarrow as pa

WORDS = [
    "hello",
    "Paris",
    "the quick brown fox",
    "3 + 4 = 7",
    "naïve",
    "你好,世界。",
    "a aa aaa",
    "def f(x):",
    "\\frac{1}{2}",
]
ODD = [
    " ", "\n", "\n\n", "\t", "\r\n", "\u2028", "\u200b", "\u202e", "e\u0301\u0323", "\U0001f469\u200d\U0001f467",
    "\U0010ffff", "\x00", "\x7f", "\ufeff", "{{ 7 }}", "{% if %}", "<|im_end|>", "<|im_start|>assistant\n", "</s>",
    "[INST]", "<|eot_id|>", "<end_of_turn>", "<think>", "</think>", "Probe", "ContentofContentiof", "assistant",
    "user\n", "\\ud800", '"', "\\", "\ue000", "\ue0f0",
]  # fmt: skip
LOSS_NAMES = ["loss", "loss_mask", "step_loss_mask", "loss_weight", "weight", "train", "trainable", "training"]


@dataclass
class Case:
    """One record. line: its text, of a file of lines. fault: the field to be named where it is bad; None: it is good.
    messages: the conversation that a good one says; weights: of its messages. ids: its own (ids, mask).
    unreadable, unwritable: the column of Parquet that holds a date of no calendar, or what JSON cannot hold.
    """

    line: bytes = b""
    fault: str | None = None
    messages: list = field(default_factory=list)
    weights: list = field(default_factory=list)
    ids: tuple | None = None
    unwritable: str | None = None
    unreadable: str | None = None
    identity: str | None = None


def text(rng, odd):
    parts = [rng.choice(WORDS)]
    for _ in range(rng.choice([0, 0, 1, 2, 5])):
        parts.insert(rng.randint(0, len(parts)), rng.choice(ODD if odd and rng.random() < 0.6 else WORDS))
    return "".join(parts)


def talk(rng, odd, system=True):
    roles = ["system"] if system and rng.random() < 0.2 else []
    roles += ["user", "assistant"] * rng.choice([1, 1, 1, 2, 3])
    return [{"role": role, "content": text(rng, odd)} for role in roles]


def anything(rng, depth=0):
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 6:
        return [None, True, rng.randint(-(2**70), 2**70), rng.random(), text(rng, True), ""][kind]
    if kind < 7:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {text(rng, True): anything(rng, depth + 1) for _ in range(rng.randrange(4))}


def weights_of(messages):
    return [float(message["role"] == "assistant") for message in messages]


# Lines of JSON


def in_the_words_of_others(rng, form, messages):
    """Columns that hold the messages in a form of other trainers."""
    if form == 6:
        speakers = {"user": ["human", "user", "User"], "assistant": ["gpt", "chatgpt"], "system": ["system"]}
        turns = [{"from": rng.choice(speakers[m["role"]]), "value": m["content"]} for m in messages]
        return {"conversations": turns if rng.random() < 0.5 else json.dumps(turns)}
    if form == 7:
        return {"prompt": messages[:-1], "completion": messages[-1:]} if len(messages) == 2 else {"messages": messages}
    if form == 8:
        half = [len(message["content"]) // 2 for message in messages]
        parts = [
            [{"type": "text", "text": m["content"][:at]}, {"text": m["content"][at:]}]
            for m, at in zip(messages, half, strict=True)
        ]
        return {"messages": [m | {"content": part} for m, part in zip(messages, parts, strict=True)]}
    if form == 9 and len(messages) == 2:
        return {
            "instruction": messages[0]["content"],
            "input": rng.choice(["", None]),
            "output": messages[1]["content"],
        }
    return {"messages": messages}


def good_row(rng, number):
    """(columns, the case that is right for them)."""
    odd = rng.random() < 0.5
    messages = talk(rng, odd)
    case = Case(messages=messages, weights=weights_of(messages))
    form = rng.randrange(10)
    written = [dict(message) for message in messages]
    if form == 0 and len(messages) > 1:
        row = {}
        if written[0]["role"] == "system":
            row[rng.choice(["system", "system_prompt"])] = written.pop(0)["content"]
        pairs = [[a["content"], b["content"]] for a, b in zip(written[::2], written[1::2], strict=True)]
        row |= {"prompt": pairs[-1][0], "response": pairs[-1][1]}
        if len(pairs) > 1 or rng.random() < 0.2:
            row["history"] = pairs[:-1]
    elif form == 1 and messages[0]["role"] != "system":
        row = {"messages": written, "system": text(rng, odd)}
        messages.insert(0, {"role": "system", "content": row["system"]})
        case.weights.insert(0, 0.0)
    else:
        row = in_the_words_of_others(rng, form, written)
    if form in (2, 3) and "messages" in row:
        for message, place in zip(written, range(len(written)), strict=True):
            if message["role"] == "assistant":
                value = rng.choice([0, 1, True, False, 0.5, 2.0, 1.0, -0.5, -3, None])
                message[rng.choice(LOSS_NAMES)] = value
                case.weights[place] = 1.0 if value is None else float(value)
            elif rng.random() < 0.6:
                message["loss"] = rng.choice([0, True, 0.25, -0.5, None])
                case.weights[place] = float(message["loss"] or 0)
        if not any(case.weights):
            written[-1].pop(next(name for name in LOSS_NAMES if name in written[-1]))
            case.weights[-1] = 1.0
    if rng.random() < 0.1:
        written[0]["name"] = None
    if rng.random() < 0.5:
        row["id"] = rng.choice([f"r{number}", number, f"é\U0001f600{number}"])
        case.identity = str(row["id"])
    if rng.random() < 0.3:
        row["source"] = rng.choice(["web", "books", "s p a c e", "你好"])
    if rng.random() < 0.3:
        row[rng.choice(["note", "meta", "x y", "é"])] = anything(rng)
    return row, case


BAD_MESSAGES = [
    ("messages[0].role", {"role": "x" * 300_000, "content": "q"}),
    ("messages[0].role", {"role": None, "content": "q"}),
    ("messages[0].role", {"role": ["user"], "content": "q"}),
    ("messages[0].role", {"content": "q"}),
    ("messages[0].content", {"role": "user"}),
    ("messages[0].content[0].type", {"role": "user", "content": [{"type": "image", "url": "x"}]}),
    ("messages[0].content", {"role": "assistant", "content": " \n"}),
    ("messages[0]", "hello"),
    ("messages[0]", None),
    ("messages[0].tool_calls", {"role": "assistant", "content": "a", "tool_calls": 7}),
    ("messages[0].tool_calls[0].function", {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}),
    ("messages[0].loss", {"role": "assistant", "content": "a", "loss": "1"}),
    ("messages[0].weight", {"role": "assistant", "content": "a", "weight": -1e300}),
    ("messages[0].train", {"role": "user", "content": "a", "train": True}),
    ("messages[0].weight", {"role": "assistant", "content": "a", "loss_mask": 1, "weight": 1}),
    ("messages[0].mask", {"role": "assistant", "content": "a", "mask": [0]}),
    ("messages[0].reasoning_content", {"role": "user", "content": "a", "reasoning_content": "b"}),
]
BAD_KEYS = [
    ("messages", {"messages": []}),
    ("messages", {"messages": "text"}),
    ("messages", {"messages": None}),
    ("id", {"id": {}}),
    ("id", {"id": 1.5}),
    ("source", {"source": 7}),
    ("history", {"history": [["a", "b"]]}),
    ("system", {"system": ["x"]}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("images", {"images": ["x" * 300_000]}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"a": 1}}),
    ("weight", {"weight": 0.1}),
    ("tools", {"tools": 7}),
    ("tools[0].function", {"tools": [{"name": "x" * 300_000}]}),
    ("id", {"id": "x\ud800"}),
    ("source", {"source": "\udfff"}),
    ("meta.a[0]", {"meta": {"a": ["\ud83d"]}}),
    ("loss_mask", {"token_ids": [1, 2]}),
    ("token_ids[1]", {"token_ids": [1, 10**9], "loss_mask": [0, 1]}),
    ("loss_mask", {"token_ids": [1, 2], "loss_mask": [0]}),
]
BAD_LINES = [
    b"{", b"[1]", b"null", b'"text"', b"7", b"NaN", b"{} {}", b'{"prompt": "\xff", "response": "r"}', b"\x00", b" \t",
    b'{"prompt": "a", "response": "b", "x": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "response": "b", "x": ' + b"[" * 1490 + b"]" * 1490 + b"}",
    b'{"x":' * 50_000,
]  # fmt: skip


def json_case(rng, number):
    draw = rng.random()
    if draw < 0.04:
        return Case(line=rng.choice(BAD_LINES), fault="")
    row, case = good_row(rng, number)
    if draw < 0.1:
        place, message = rng.choice(BAD_MESSAGES)
        row, case = {"messages": [message, *talk(rng, False)[-2:]]}, Case(fault=place)
    elif draw < 0.17:
        place, columns = rng.choice(BAD_KEYS)
        row, case = {"messages": talk(rng, False, system=False)} | columns, Case(fault=place)
    elif draw < 0.2:
        ids = [rng.randrange(16, 270) for _ in range(rng.randint(2, 30))]
        mask = [0] + [rng.choice([0, 1, 1, 0.5, -0.5]) for _ in ids[1:-1]] + [1]
        row |= {"token_ids": ids, "loss_mask": mask}
        case.ids = (ids, mask)
    items = list(row.items())
    rng.shuffle(items)
    case.line = json.dumps(dict(items), ensure_ascii=rng.random() < 0.5 or case.fault is not None).encode()
    return case


# Rows of Parquet


def _raw(kind, width):
    """A column of any 32 or 64 bits read as a type of time: nanoseconds, and dates that Python has not."""

    def column(rng, count):
        span = rng.choice([10**6, 2 ** (width - 1) // 1001])  # Parquet keeps seconds as milliseconds
        numbers = [None if rng.random() < 0.1 else rng.randint(-span, span) for _ in range(count)]
        return pa.array(numbers, pa.int64() if width == 64 else pa.int32()).view(kind)

    return column


def _of(kind, draw):
    return lambda rng, count: pa.array([None if rng.random() < 0.1 else draw(rng) for _ in range(count)], kind)


_INFINITY = pa.scalar(float("inf"), pa.float32())
COLUMNS = [
    *(_raw(pa.timestamp(unit, zone), 64) for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC", "No/Where")),
    *(_raw(pa.duration(unit), 64) for unit in ("s", "ms", "us", "ns")),
    _raw(pa.date32(), 32),
    lambda rng, count: pa.array([rng.randrange(86_400 * 10**9) for _ in range(count)]).view(pa.time64("ns")),
    _of(pa.decimal128(30, 5), lambda rng: decimal.Decimal(rng.randint(-(10**20), 10**20)).scaleb(-5)),
    _of(pa.binary(), lambda rng: rng.randbytes(rng.randrange(20))),
    _of(pa.float32(), lambda rng: rng.choice([0.5, float("nan"), float("inf")])),
    _of(pa.uint64(), lambda rng: rng.randrange(2**64)),
    _of(pa.bool_(), lambda rng: rng.random() < 0.5),
    _of(pa.large_string(), lambda rng: text(rng, True)),
    _of(pa.list_(pa.float64()), lambda rng: [rng.choice([1.0, float("nan")]) for _ in range(rng.randrange(3))]),
    _of(pa.map_(pa.string(), pa.int8()), lambda rng: [(text(rng, True), 1)]),
    _of(pa.struct([("d", pa.date32()), ("b", pa.binary(2))]), lambda rng: {"d": datetime.date(2026, 1, 2), "b": b"ab"}),
    lambda rng, count: pa.array([rng.choice(WORDS) for _ in range(count)]).dictionary_encode(),
    lambda rng, count: pa.nulls(count),
]  # fmt: skip


def parquet_table(rng, count):
    """(a table of `count` records with columns of a few types, what is right for each)."""
    cases, odd = [], rng.random() < 0.5
    if rng.random() < 0.5:
        said = []
        for _ in range(count):
            messages, value, others = talk(rng, odd), rng.choice([None, 0.5, 1.0, -1.0]), rng.choice([None, None, 0.25])
            values = [value if m["role"] == "assistant" else others for m in messages]
            weights = [
                of_none if value is None else value for of_none, value in zip(weights_of(messages), values, strict=True)
            ]
            case = Case(messages=messages, weights=weights)
            said.append([m | {"loss": value} for m, value in zip(messages, values, strict=True)])
            if rng.random() < 0.1:
                said[-1][-1]["role"], case.fault = "human", f"messages[{len(messages) - 1}].role"
            cases.append(case)
        message = pa.struct([("role", pa.string()), ("content", pa.string()), ("loss", pa.float64())])
        columns = {"messages": pa.array(said, pa.list_(message))}
    else:
        for _ in range(count):
            messages = talk(rng, odd, system=False)[:2]
            cases.append(Case(messages=messages, weights=[0.0, 1.0]))
            cases[-1].fault = "response" if rng.random() < 0.1 else None
        answers = [None if case.fault else case.messages[1]["content"] for case in cases]
        columns = {
            "prompt": pa.array([case.messages[0]["content"] for case in cases]),
            "response": pa.array(answers, rng.choice([pa.string(), pa.large_string()])),
        }
    for number in range(rng.randrange(5)):
        name = f"c{number}"
        columns[name] = rng.choice(COLUMNS)(rng, count)
        kind = columns[name].type
        for place, case in enumerate(cases):
            value = columns[name][place]
            if pa.types.is_temporal(kind) and not pa.types.is_duration(kind) and value.is_valid:
                naive = value.cast(pa.timestamp(kind.unit)) if pa.types.is_timestamp(kind) else value
                beyond = naive.cast(pa.string()).as_py().startswith("<")  # no calendar has it
                case.unreadable = case.unreadable or (name if beyond else None)
            if value.is_valid and (pa.types.is_binary(kind) or pa.types.is_struct(kind) or value == _INFINITY):
                case.unwritable = case.unwritable or name
    return pa.table(columns), cases
