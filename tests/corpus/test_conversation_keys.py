"""The keys of a record beside its messages: what makes the conversation, what is refused, what is carried through."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_idft.corpus.records import read_records
from megatron_idft.errors import RecordError

PAIR = {"prompt": "q", "response": "r"}
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
TALK = {"messages": TURNS}
SYSTEM = {"role": "system", "content": "be brief"}
EARLIER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
IDS = {"token_ids": [1, 2], "loss_mask": [0, 1]}

SERVED = {
    "system and prompt": (PAIR | {"system": "be brief"}, [SYSTEM, *TURNS]),
    "system and messages": (TALK | {"system": "be brief"}, [SYSTEM, *TURNS]),
    "system_prompt": (TALK | {"system_prompt": "be brief"}, [SYSTEM, *TURNS]),
    "the same system twice": ({"messages": [SYSTEM, *TURNS], "system": "be brief"}, [SYSTEM, *TURNS]),
    "both names of one system": (PAIR | {"system": "be brief", "system_prompt": "be brief"}, [SYSTEM, *TURNS]),
    "history": (PAIR | {"history": [["a", "b"]]}, [*EARLIER, *TURNS]),
    "system and history": (PAIR | {"history": [["a", "b"]], "system": "be brief"}, [SYSTEM, *EARLIER, *TURNS]),
    "nothing said": (PAIR | {"history": None, "system": "", "messages": None}, TURNS),
    "an empty history": (PAIR | {"history": []}, TURNS),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", SERVED)
def test_what_makes_the_conversation(tmp_path, name, suffix):
    row, messages = SERVED[name]
    file = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        file.write_text(json.dumps(row | {"note": "n"}))
    else:
        pq.write_table(pa.Table.from_pylist([row | {"note": "n"}]), file)
    [record] = read_records(file)
    assert record.messages == messages and record.extra.pop("note") == "n"
    assert not any(record.extra.values())


REFUSED = {
    "another system": ({"messages": [SYSTEM, *TURNS], "system": "be long"}, "system", "contradicts"),
    "two systems": (PAIR | {"system": "x", "system_prompt": "y"}, "system_prompt", "contradicts"),
    "a late system": ({"messages": [*TURNS, SYSTEM], "system": "x"}, "system", "contradicts"),
    "system as a list": (PAIR | {"system": ["x"]}, "system", "expected a string, found a list"),
    "history beside messages": (TALK | {"history": [["a", "b"]]}, "history", 'stands beside "messages"'),
    "history as text": (PAIR | {"history": "a b"}, "history", "expected a list of"),
    "a single in the history": (PAIR | {"history": [["a", "b"], ["c"]]}, "history[1]", "expected [question, answer]"),
    "messages as history": (PAIR | {"history": EARLIER}, "history[0]", "expected [question, answer]"),
    "an answer missing in the history": (PAIR | {"history": [["a", None]]}, "history[0][1]", "found nothing"),
    "functions": (TALK | {"functions": [{"name": "f"}]}, "functions", 'write them as "tools"'),
    "images": (TALK | {"images": ["x.png"]}, "images", "only text"),
    "an audio": (PAIR | {"audio": {"path": "x.wav"}}, "audio", "only text"),
    "template arguments": (
        TALK | {"chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs",
        "--chat",
    ),
    "thinking switched off": (TALK | {"enable_thinking": False}, "enable_thinking", "--chat-template"),
    "a weight": (TALK | {"weight": 0.1}, "weight", '"loss"'),
    "a weight of nothing": (TALK | {"sample_weight": 0}, "sample_weight", '"loss"'),
    "tools of another form": (TALK | {"tools": [{"name": "f"}]}, "tools[0].function", "expected an object as in"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name(tmp_path, name):
    row, field, why = REFUSED[name]
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(RecordError) as caught:
        list(read_records(tmp_path / "a.jsonl"))
    assert caught.value.field == field and why in caught.value.message


@pytest.mark.parametrize(
    "columns",
    [
        {"images": [], "functions": None, "chat_template_kwargs": {}, "audio": ""},
        {"weight": 1, "weights": [0.1], "label": "x"},
        {"weight": "70 kg"},
        IDS | {"images": ["x.png"], "chat_template_kwargs": {"a": 1}},  # nobody renders these
    ],
)
def test_what_is_carried_through(tmp_path, columns):
    (tmp_path / "a.jsonl").write_text(json.dumps(TALK | columns))
    [record] = read_records(tmp_path / "a.jsonl")
    assert record.messages == TURNS and record.extra == columns


def test_columns_of_parquet_that_other_rows_fill_are_no_reason_to_refuse(tmp_path):
    rows = [TALK | {"image": None, "chat_template_kwargs": {"enable_thinking": None}}]
    pq.write_table(
        pa.Table.from_pylist([*rows, TALK | {"image": {"bytes": None, "path": "x"}}]), tmp_path / "a.parquet"
    )
    errors = []
    assert [record.line for record in read_records(tmp_path / "a.parquet", on_error=errors.append)] == [1]
    assert [(error.line, error.field) for error in errors] == [(2, "image")]
