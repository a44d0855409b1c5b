"""Tool calls, tools, reasoning and weights of records: the one form that they are brought into, and what is refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idft.corpus.messages import trained_weight
from megatron_idft.corpus.records import read_records
from megatron_idft.errors import RecordError

FUNCTION = {"name": "add", "arguments": {"a": 3, "b": [4, None]}}
CALL = {"type": "function", "id": "c1", "function": FUNCTION}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "3 + 4?"}


def write(path, *rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def read(path, *messages, **columns):
    [record] = read_records(write(path, {"messages": [USER, *messages], **columns}))
    return record


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.jsonl"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": "Let me see."}])
@pytest.mark.parametrize("arguments", [FUNCTION["arguments"], json.dumps(FUNCTION["arguments"])])
def test_calls_come_out_in_one_form(file, content, arguments):
    call = {"id": "c1", "function": {**FUNCTION, "arguments": arguments}}
    result = {"role": "tool", "content": "7", "tool_call_id": "c1", "name": "add"}
    record = read(file, {"role": "assistant", "tool_calls": [call], **content}, result)
    said = content.get("content") or ""
    assert record.messages[1] == {"role": "assistant", "content": said, "tool_calls": [CALL]}
    assert record.messages[2] == result


@pytest.mark.parametrize("arguments", [{}, "", " ", "{}", None])
def test_a_call_without_arguments(file, arguments):
    record = read(file, {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": arguments}}]})
    assert record.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


def test_reasoning_alone_is_an_answer_and_nothing_is_none(file):
    record = read(file, {"role": "assistant", "content": None, "reasoning_content": "3, 4", "tool_calls": []})
    assert record.messages[1] == {"role": "assistant", "content": "", "reasoning_content": "3, 4"}
    record = read(file, {"role": "assistant", "content": "7", "reasoning_content": " ", "tool_calls": None})
    assert record.messages[1] == {"role": "assistant", "content": "7"}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_are_read_and_carried_through_as_they_came(file, tools):
    record = read(file, {"role": "assistant", "content": "7"}, tools=tools)
    assert record.tools == [TOOL] and record.extra == {"tools": tools}


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools(file, tools):
    assert read(file, {"role": "assistant", "content": "7"}, tools=tools).tools is None


def test_null_means_absent_in_the_structs_of_parquet(tmp_path):
    """Every row has every key there, in arguments too."""
    one = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    two = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "g", "arguments": {"b": "x"}}}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "integer"}}}}
    rows = [{"messages": [USER, one], "tools": [tool]}, {"messages": [USER, two], "tools": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_records(tmp_path / "a.parquet")
    calls = [record.messages[1]["tool_calls"][0]["function"] for record in (first, second)]
    assert calls == [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": "x"}}]
    assert first.tools == [tool] and second.tools is None
    assert "loss" not in first.messages[1] and "tool_calls" not in first.messages[0]


@pytest.mark.parametrize(
    "name", ["loss", "loss_mask", "step_loss_mask", "loss_weight", "weight", "train", "trainable", "training"]
)
def test_the_loss_by_the_names_of_other_trainers(file, name):
    users = {"role": "user", "content": "q", name: 0}
    write(file, {"messages": [users, answer() | {name: False}, USER, answer() | {name: 0.5}, USER, answer()]})
    [record] = read_records(file)
    assert [trained_weight(message) for message in record.messages] == [0, 0, 0, 0.5, 0, 1]
    assert record.messages[1] == answer(loss=False)


def test_weights(file):
    losses = [None, 0, 1, 2, 0.5, True, False, 3e38, 2**-126, -0.5, -3e38, -(2**-126)]
    weights = [1, 0, 1, 2, 0.5, 1, 0, 3e38, 2**-126, -0.5, -3e38, -(2**-126)]
    for role, of_none in (("assistant", 1), ("user", 0), ("system", 0), ("tool", 0)):
        record = read(file, *({"role": role, "content": "7", "loss": loss} for loss in losses))
        assert [trained_weight(message) for message in record.messages] == [0, of_none, *weights[1:]]


def test_the_weight_of_prompts_is_for_users_and_the_system_that_say_nothing_of_their_own(file):
    roles = ("system", "user", "assistant", "tool")
    record = read(file, *({"role": role, "content": "7", **own} for own in ({}, {"loss": 0}) for role in roles))
    assert [trained_weight(message, 0.2) for message in record.messages] == [0.2, 0.2, 0.2, 1, 0, 0, 0, 0, 0]


def answer(**fields):
    return {"role": "assistant", "content": "7", **fields}


def called(function, **fields):
    return answer(tool_calls=[{"function": function, **fields}])


# (the second message or columns of the record, field, why)
BAD = {
    "no content at all": (answer(content=None), "messages[1].content", "expected a string, found nothing"),
    "an empty list of calls": (answer(content="", tool_calls=[]), "messages[1].content", "empty: nothing to train on"),
    "null content of a user": ({"role": "user", "content": None}, "messages[1].content", "found nothing"),
    "calls as text": (answer(tool_calls="[]"), "messages[1].tool_calls", "expected a list, found a string"),
    "calls of a user": (
        {"role": "user", "content": "x", "tool_calls": [CALL]},
        "messages[1].tool_calls",
        "only assistant messages have tool calls",
    ),
    "a call as text": (answer(tool_calls=["add"]), "messages[1].tool_calls[0]", "expected an object"),
    "a flat call": (answer(tool_calls=[FUNCTION]), "messages[1].tool_calls[0].function", 'as in {"type": "function"'),
    "another type": (called(FUNCTION, type="code"), "messages[1].tool_calls[0].type", "found 'code'"),
    "a number as id": (called(FUNCTION, id=1), "messages[1].tool_calls[0].id", "expected a string, found 1"),
    "no name": (called({"arguments": {}}), "messages[1].tool_calls[0].function.name", "expected a name"),
    "an empty name": (called({"name": ""}), "messages[1].tool_calls[0].function.name", "found an empty string"),
    "arguments that are no JSON": (
        called({"name": "f", "arguments": "{a: 1}"}),
        "messages[1].tool_calls[0].function.arguments",
        "not JSON",
    ),
    "arguments as a JSON list": (
        called({"name": "f", "arguments": "[1]"}),
        "messages[1].tool_calls[0].function.arguments",
        "expected an object, or JSON text of one, found a list",
    ),
    "arguments as a number": (
        called({"name": "f", "arguments": 1}),
        "messages[1].tool_calls[0].function.arguments",
        "found 1",
    ),
    "deep arguments": (
        called({"name": "f", "arguments": "[" * 100_000}),
        "messages[1].tool_calls[0].function.arguments",
        "more than 100 levels",
    ),
    "NaN in arguments": (called({"name": "f", "arguments": '{"a": NaN}'}), "messages[1].tool_calls[0]", "NaN"),
    "a surrogate in arguments": (
        called({"name": "f", "arguments": {"a": "\ud800"}}),
        "messages[1].tool_calls[0].function.arguments.a",
        "lone surrogate",
    ),
    "reasoning as a list": (answer(reasoning_content=["x"]), "messages[1].reasoning_content", "found a list"),
    "reasoning of a user": (
        {"role": "user", "content": "x", "reasoning_content": "y"},
        "messages[1].reasoning_content",
        "only assistant messages",
    ),
    "a surrogate in reasoning": (answer(reasoning_content="\udfff"), "messages[1].reasoning_content", "surrogate"),
    "a call id that is a number": (
        {"role": "tool", "content": "x", "tool_call_id": 3},
        "messages[1].tool_call_id",
        "expected a string, found 3",
    ),
    "a tool's name that is a list": ({"role": "tool", "content": "x", "name": []}, "messages[1].name", "found a list"),
    "loss as text": (answer(loss="1"), "messages[1].loss", "expected 0, 1 or a weight"),
    "NaN as loss": (answer(loss=float("nan")), "messages[1].loss", "nan is no weight"),
    "infinite loss": (answer(loss=float("inf")), "messages[1].loss", "inf is no weight"),
    "huge loss": (answer(loss=10**400), "messages[1].loss", "is no weight"),
    "huge negative loss": (answer(loss=-(10**400)), "messages[1].loss", "is no weight"),
    "tiny loss": (answer(loss=1e-300), "messages[1].loss", "1e-300 is no weight"),
    "tiny negative loss": (answer(loss=-1e-300), "messages[1].loss", "-1e-300 is no weight"),
    "a weight as text": (answer(weight="1"), "messages[1].weight", "expected 0, 1 or a weight"),
    "a mask for tokens": (answer(loss_mask=[0, 1]), "messages[1].loss_mask", "found a list"),
    "a trained user, in a doubtful word": (USER | {"train": True}, "messages[1].train", "call it loss to train"),
    "two names of loss": (answer(loss_mask=1, weight=1), "messages[1].weight", "stands beside loss_mask"),
    "a mask of unknown sense": (answer(mask=0), "messages[1].mask", "write loss, 0 or 1"),
    "details of training": (answer(train_detail=[]), "messages[1].train_detail", "write loss, 0 or 1"),
    "a scale of the loss": (answer(loss_scale=1.0), "messages[1].loss_scale", "write loss, 0 or 1"),
    "a role of 300,000 letters": ({"role": "x" * 300_000, "content": "y"}, "messages[1].role", "x… is none of"),
    "arguments nested too deep": (
        called({"name": "f", "arguments": '{"a":' + "[" * 200 + "]" * 200 + "}"}),
        "messages[1].tool_calls[0].function.arguments",
        "more than 100 levels",
    ),
    "NaN as loss of a user": (USER | {"loss": float("nan")}, "messages[1].loss", "nan is no weight"),
    "tools as an object": ({"tools": TOOL}, "tools", "expected a list, found an object"),
    "tools that are no JSON": ({"tools": "[add]"}, "tools", "not JSON"),
    "tools as a JSON number": ({"tools": "3"}, "tools", "expected a list, found 3"),
    "a tool as text": ({"tools": ["add"]}, "tools[0]", "expected an object"),
    "a flat tool": ({"tools": [TOOL, {"name": "add"}]}, "tools[1].function", "expected an object as in"),
    "parameters as text": (
        {"tools": [{"function": {"name": "f", "parameters": "{}"}}]},
        "tools[0].function.parameters",
        "expected an object, found a string",
    ),
    "a description as a list": (
        {"tools": [{"function": {"name": "f", "description": []}}]},
        "tools[0].function.description",
        "found a list",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_field_is_named(file, name):
    given, field, why = BAD[name]
    good = {"messages": [USER, answer()]}
    bad = good | given if "tools" in given else {"messages": [USER, given]}
    errors = []
    write(file, good, bad, good)
    assert [record.line for record in read_records(file, on_error=errors.append)] == [1, 3]
    [error] = errors
    assert (error.file, error.line, error.field) == (str(file), 2, field) and why in error.message


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["{}", "[", "[1]"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["function", "name", "x"]), inner),
    max_leaves=5,
)
FUNCTIONS = ANYTHING | st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("name", "arguments", "parameters", "description"), ANYTHING)
)
CALLS = ANYTHING | st.lists(
    ANYTHING | st.fixed_dictionaries({}, optional={"type": ANYTHING, "id": ANYTHING, "function": FUNCTIONS}), max_size=2
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text(max_size=3) | ANYTHING},
    optional={
        "tool_calls": CALLS, "reasoning_content": ANYTHING, "loss": ANYTHING, "tool_call_id": ANYTHING, "name": ANYTHING
    },
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(messages=st.lists(MESSAGES, max_size=3), tools=CALLS)
def test_whatever_stands_in_a_record_is_read_or_named(tmp_path_factory, messages, tools):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    write(path, {"messages": messages, "tools": tools})
    try:
        [record] = read_records(path)
    except RecordError as error:
        assert error.field.startswith(("messages", "tools")) and error.line == 1
        return
    for message in record.messages:
        assert isinstance(message["content"], str)
        assert not trained_weight(message) or 2**-126 <= abs(trained_weight(message)) <= 3e38
        for call in message.get("tool_calls", []):
            assert call["type"] == "function" and call["function"]["name"]
            assert isinstance(call["function"]["arguments"], dict)
    for tool in record.tools or []:
        assert tool["function"]["name"]
    json.dumps([record.messages, record.tools], ensure_ascii=False).encode()
