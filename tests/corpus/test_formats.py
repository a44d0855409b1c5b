"""The forms of records that people have: which messages each becomes, and what is refused, from JSON and Parquet."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idft.corpus.formats import FORMS, describe_forms
from megatron_idft.corpus.messages import trained_weight
from megatron_idft.corpus.records import read_records
from megatron_idft.errors import InputError, RecordError
from tests.corpus.record_forms import (
    ALPACA,
    BARE_TOOL,
    QA,
    READ,
    REFUSED,
    TALK,
    TOOL,
    assistant,
    system,
    text_part,
    turn,
    user,
)

SUFFIXES = ("jsonl", "parquet")
MIXED = {"a part that is text", "content as an object"}  # a column of Parquet has one type


def write(folder, suffix, *rows):
    file = folder / f"a.{suffix}"
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.concat_tables([pa.Table.from_pylist([row]) for row in rows], promote_options="default"), file)
    return file


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", READ)
def test_what_each_form_says(tmp_path, name, suffix):
    row, messages, form = READ[name]
    file = write(tmp_path, suffix, row | {"id": 7, "answer": "42", "source": "web", "note": {"x": 1}})
    [record] = read_records(file)
    assert (record.messages, record.form) == (messages, form)
    assert (record.id, record.answer, record.source) == ("7", "42", "web")
    assert record.extra["note"] == {"x": 1}
    own = next(each for each in FORMS if each.name == form)
    assert record.extra.keys().isdisjoint(own.keys)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [(name, suffix) for name in REFUSED for suffix in SUFFIXES if suffix == "jsonl" or name not in MIXED],
)
def test_what_is_refused_by_name(tmp_path, name, suffix):
    row, field, words = REFUSED[name]
    file = write(tmp_path, suffix, row, row)
    errors = []
    assert not list(read_records(file, on_error=errors.append))
    assert [(error.file, error.line, error.field) for error in errors] == [(str(file), 1, field), (str(file), 2, field)]
    assert words in errors[0].message and len(str(errors[0])) < 1500


def test_a_conversation_said_twice_is_not_carried_through(tmp_path):
    """`realign` writes other messages beside what is."""
    rows = [{"messages": QA} | TALK, {"prompt": "q", "response": "r", "completion": "r"}, TALK | ALPACA]
    for record in read_records(write(tmp_path, "jsonl", *rows)):
        assert record.messages == QA and not record.extra


def test_rows_of_every_form_in_one_file(tmp_path):
    """As a concatenation leaves them: in Parquet each row has the columns of all, most of them null."""
    rows = [{"messages": QA}, {"prompt": "q", "response": "r"}, {"prompt": "q", "completion": "r"}, TALK, ALPACA]
    for suffix in SUFFIXES:
        file = write(tmp_path, suffix, *rows, {"text": "x"})
        errors = []
        records = list(read_records(file, on_error=errors.append))
        assert [record.messages for record in records] == [QA] * 5
        assert [record.form for record in records] == [form.name for form in FORMS]
        assert not any(value for record in records for value in record.extra.values())
        assert [(error.line, error.field) for error in errors] == [(6, "text")]


def test_functions_without_the_object_around_them_are_tools_of_sharegpt_and_alpaca(tmp_path):
    for row in (TALK, ALPACA):
        for tools in ([BARE_TOOL], json.dumps([BARE_TOOL]), [TOOL]):
            [record] = read_records(write(tmp_path, "jsonl", row | {"tools": tools}))
            assert record.tools == [TOOL] and record.extra["tools"] == tools
    errors = []
    assert not list(
        read_records(write(tmp_path, "jsonl", {"messages": QA, "tools": [BARE_TOOL]}), on_error=errors.append)
    )
    assert errors[0].field == "tools[0].function"


def test_what_becomes_of_a_file_that_is_one_array(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([TALK], indent=1))
    with pytest.raises(InputError, match=r"jq -c '\.\[\]' .*a\.json > .*a\.jsonl"):
        list(read_records(tmp_path / "a.json"))
    for text in (json.dumps([TALK]), json.dumps([TALK], indent=1), json.dumps(TALK, indent=1)):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(RecordError, match=r"line 1: .*jq -c '\.\[\]' FILE"):
            list(read_records(tmp_path / "a.jsonl"))


def test_the_forms_are_said_by_file():
    assert describe_forms(
        [("x/a.jsonl", "Alpaca", 52_002), ("x/a.jsonl", "ShareGPT", 1), ("b.parquet", "messages", 3)]
    ) == [
        "a.jsonl: 52,002 records in the Alpaca form (instruction, input, output)",
        "a.jsonl: 1 record in the ShareGPT form (conversations)",
        "b.parquet: 3 records in the messages form (messages)",
    ]
    assert describe_forms([("x/a.jsonl", "messages", 1), ("y/a.jsonl", "messages", 1)])[1].startswith(
        "y/a.jsonl: 1 record "
    )
    many = [(f"{i}.jsonl", form, 2) for i in range(20) for form in ("messages", "Alpaca")]
    assert describe_forms(many) == [
        "20 files: 40 records in the messages form (messages)",
        "20 files: 40 records in the Alpaca form (instruction, input, output)",
    ]


TEXT = st.text(min_size=1, max_size=20).filter(lambda text: text.strip() and "\0" not in text)


def forms_of(start, exchanges):
    """One conversation in every form that can say it."""
    said = [(user(q), assistant(r)) for q, r in exchanges]
    messages = [*start, *(message for pair in said for message in pair)]
    turns = [turn({"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), m["content"]) for m in messages]
    parts = [m | {"content": [text_part(m["content"][:3]), text_part(m["content"][3:])]} for m in messages]
    columns = {"system": start[0]["content"]} if start else {}
    *earlier, (question, answer) = exchanges
    last = columns | {"history": [list(pair) for pair in earlier]}
    yield {"messages": messages}
    yield {"messages": json.dumps(messages)}
    yield {"messages": parts}
    yield {"messages": messages[len(start) :]} | columns
    yield {"conversations": turns}
    yield {"conversations": json.dumps(turns)}
    yield {"conversations": turns[len(start) :]} | columns
    yield {"prompt": question, "response": answer} | last
    yield {"prompt": question, "completion": answer} | last
    yield {
        "prompt": [m | {"loss": 1} if m["role"] == "assistant" else m for m in messages[:-1]],
        "completion": messages[-1:],
    }
    yield {"instruction": question, "input": "", "output": answer} | last
    instruction, _, about = question.partition("\n\n")
    if instruction.strip() and about.strip():
        yield {"instruction": instruction, "input": about, "output": answer} | last


@settings(deadline=None, max_examples=25)
@given(
    start=st.lists(TEXT.map(system), max_size=1),
    exchanges=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
    about=st.none() | TEXT,
)
def test_a_conversation_reads_back_equal_from_every_form(tmp_path_factory, start, exchanges, about):
    if about is not None:
        exchanges[-1] = (f"{exchanges[-1][0]}\n\n{about}", exchanges[-1][1])
    rows = list(forms_of(start, exchanges))
    expected = [(message["role"], message["content"]) for message in next(iter(rows))["messages"]]
    folder = tmp_path_factory.mktemp("forms")
    records = list(read_records(write(folder, "jsonl", *rows)))
    for row in rows:
        records += read_records(write(folder, "parquet", row))
    assert len(records) == 2 * len(rows)
    for record in records:
        assert [(message["role"], message["content"]) for message in record.messages] == expected
        assert [trained_weight(message) for message in record.messages] == [role == "assistant" for role, _ in expected]


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=4)
    | st.sampled_from(["{}", "[]", '[{"role": "user"}]']),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["from", "value", "role", "type"]), inner)
    ),
    max_leaves=4,
)
TURNS = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from(["human", "gpt", "function_call", "observation", "Alice"]) | ANYTHING,
        "value": TEXT | ANYTHING,
        "role": st.sampled_from(["user", "assistant"]) | ANYTHING,
        "content": st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": ANYTHING}))
        | TEXT,
        "weight": ANYTHING,
    },
)
KEYS = [key for form in FORMS for key in form.keys + form.beside] + [
    "text",
    "chosen",
    "rejected",
    "system",
    "mask",
    "tools",
]


@settings(deadline=None, max_examples=150)
@given(row=st.dictionaries(st.sampled_from(KEYS), TEXT | ANYTHING | st.lists(TURNS, max_size=3), max_size=4))
def test_whatever_stands_under_the_keys_of_forms_is_read_or_named(tmp_path_factory, row):
    errors = []
    records = list(read_records(write(tmp_path_factory.mktemp("any"), "jsonl", row), on_error=errors.append))
    assert len(records) + len(errors) == 1
    for record in records:
        assert all(isinstance(message["content"], str) for message in record.messages)
        assert record.form in {form.name for form in FORMS}
    assert all(error.field and len(str(error)) < 1500 for error in errors)
