"""Records from every file type, and what is said about the ones that cannot be read."""

import gzip
import json
import pickle
import random
import subprocess
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idft.corpus import records as module
from megatron_idft.corpus.records import ErrorLog, Record, read_records
from megatron_idft.errors import RecordError

GOOD = {"messages": [{"role": "user", "content": "你好 😀"}, {"role": "assistant", "content": "hé\u2028llo"}]}


def write(path, *lines):
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + b"\n"
    )
    return path


def zstd(path, data):
    with pa.CompressedOutputStream(str(path), "zstd") as out:
        out.write(data)
    return path


def without_place(record: Record):
    return record.messages, record.answer, record.source, record.extra


def test_both_forms_give_messages(tmp_path):
    file = write(
        tmp_path / "a.jsonl", GOOD, {"prompt": "q", "response": "r", "id": 7, "answer": 3.5, "source": "s", "x": [1]}
    )
    first, second = read_records(file)
    assert first == Record(GOOD["messages"], "a.jsonl:1", str(file), 1)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    assert second == Record(turns, "7", str(file), 2, answer=3.5, source="s", extra={"x": [1]})


def test_messages_win_over_prompt_which_is_carried_through(tmp_path):
    [record] = read_records(write(tmp_path / "a.jsonl", GOOD | {"prompt": "title"}))
    assert record.messages == GOOD["messages"] and record.extra == {"prompt": "title"}


def test_keys_of_messages_are_kept_and_nulls_are_absent(tmp_path):
    message = {"role": "user", "content": "q", "name": "Ada", "tool_calls": None}
    [record] = read_records(write(tmp_path / "a.jsonl", {"messages": [message]}))
    assert record.messages == [{"role": "user", "content": "q", "name": "Ada"}]


def test_default_ids_name_file_and_line_past_blank_lines_bom_and_crlf(tmp_path):
    text = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n  \n" + json.dumps(GOOD | {"id": ""}).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    assert [(r.id, r.line) for r in read_records(tmp_path / "a.jsonl")] == [("a.jsonl:1", 1), ("a.jsonl:4", 4)]


def test_files_of_one_name_give_different_ids(tmp_path):
    files = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        files.append(write(tmp_path / folder / "a.jsonl", GOOD))
    assert len({record.id for record in read_records(files)}) == 2


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries(
                    {"role": st.sampled_from(["user", "assistant"]), "content": st.text().map(lambda text: "x" + text)}
                ),
                min_size=1,
                max_size=3,
            ),
            "source": st.none() | st.text(),
            "score": st.integers(0, 9),
        }
    ),
    max_size=8,
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(rows=ROWS)
def test_every_file_type_gives_the_same_records(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("types")
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    (folder / "a.jsonl").write_bytes(data)
    half = len(data) // 2  # two members, as parallel compressors write them
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))
    zstd(folder / "a.jsonl.zst", data)
    schema = pa.schema(
        [
            ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())]))),
            ("source", pa.string()),
            ("score", pa.int64()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "a.parquet", row_group_size=3)
    plain = [without_place(record) for record in read_records(folder / "a.jsonl")]
    assert [messages for messages, *_ in plain] == [row["messages"] for row in rows]
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        records = list(read_records(folder / name))
        assert [without_place(record) for record in records] == plain
        assert [record.id for record in records] == [f"{name}:{i + 1}" for i in range(len(rows))]


def test_concatenated_zstd_frames_are_read_whole(tmp_path):
    zstd(tmp_path / "a", json.dumps(GOOD).encode() + b"\n")
    (tmp_path / "a.jsonl.zst").write_bytes((tmp_path / "a").read_bytes() * 3)
    assert len(list(read_records(tmp_path / "a.jsonl.zst"))) == 3


def bad_messages(*messages):
    return {"messages": list(messages)}


BAD = {
    "cut JSON": (b'{"messages": [', "", "not JSON: "),
    "two objects": (b"{} {}", "", "not JSON: Extra data"),
    "invalid UTF-8": (b'{"prompt": "\xff", "response": "r"}', "", "not UTF-8: invalid start byte at byte 12"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "", "not UTF-8"),
    "deep nesting": (b"[" * 100_000, "", "not readable JSON"),
    "long integer": (b'{"x": ' + b"9" * 5000 + b"}", "", "not readable JSON"),
    "a list": ([1], "", "expected an object, found a list"),
    "null": (b"null", "", "expected an object, found nothing"),
    "no messages": ({"note": "x"}, "messages", "missing"),
    "no response": ({"prompt": "x"}, "response", "expected a string, found nothing"),
    "prompt is a number": ({"prompt": 1, "response": "r"}, "prompt", "expected a string, found 1"),
    "messages is text": ({"messages": "x"}, "messages", "not JSON"),
    "no message": (bad_messages(), "messages", "empty"),
    "message is text": (bad_messages("x"), r"messages\[0\]", "expected an object, found a string"),
    "no role": (bad_messages({"content": "x"}), r"messages\[0\].role", "missing"),
    "unknown role": (
        bad_messages(GOOD["messages"][0], {"role": "human", "content": "x"}),
        r"messages\[1\].role",
        "'human'",
    ),
    "role is a list": (bad_messages({"role": ["user"], "content": "x"}), r"messages\[0\].role", "none of system, user"),
    "no content": (bad_messages({"role": "user"}), r"messages\[0\].content", "expected a string, found nothing"),
    "content is an object": (
        bad_messages({"role": "user", "content": {"text": "x"}}),
        r"messages\[0\].content",
        "an object",
    ),
    "empty answer": (bad_messages({"role": "assistant", "content": " \n"}), r"messages\[0\].content", "empty"),
    "surrogate": (b'{"prompt": "\\ud800", "response": "r"}', "prompt", "lone surrogate"),
    "id is an object": (GOOD | {"id": {}}, "id", "expected a string or an integer"),
    "id is a boolean": (GOOD | {"id": True}, "id", "expected a string or an integer"),
    "source is a number": (GOOD | {"source": 3}, "source", "expected a string"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_and_nothing_else_is_lost(tmp_path, name):
    line, field, words = BAD[name]
    file = write(tmp_path / "a.jsonl", GOOD, b"", line, GOOD)
    place = rf"a\.jsonl, line 3{', ' + field if field else ''}: .*{words}"
    with pytest.raises(RecordError, match=place):
        list(read_records(file))
    errors = []
    assert [record.line for record in read_records(file, on_error=errors.append)] == [1, 4]
    assert [(e.file, e.line, e.field) for e in errors] == [(str(file), 3, field.replace("\\", ""))]
    assert errors[0].raw and len(errors[0].raw) <= 500


def test_the_error_log_holds_what_was_skipped(tmp_path):
    file = write(tmp_path / "a.jsonl", GOOD, [1], GOOD, b'{"prompt": "\xff' + b"x" * 2000, GOOD)
    with ErrorLog(tmp_path / "errors.jsonl") as log:
        assert not log.path.exists()
        assert [record.line for record in read_records(file, on_error=log)] == [1, 3, 5]
    entries = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    assert log.count == 2 and [entry["line"] for entry in entries] == [2, 4]
    assert all(
        set(entry) == {"file", "line", "field", "message", "raw"} and entry["file"] == str(file) for entry in entries
    )
    assert entries[1]["raw"].startswith('{"prompt": "\\xff') and len(entries[1]["raw"]) == 500


def test_errors_travel_between_processes():
    error = RecordError("a.parquet", 3, "id", "why", "raw")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "a.parquet, row 3, id: why" and copy.raw == "raw"


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_file_is_an_error_and_the_next_file_is_read(tmp_path, suffix, damage):
    data = b"".join(json.dumps(GOOD | {"id": f"{i}-{i * 7919 % 10007}"}).encode() + b"\n" for i in range(5000))
    file = tmp_path / f"a{suffix}"
    if suffix == ".jsonl.gz":
        file.write_bytes(gzip.compress(data))
    elif suffix == ".jsonl.zst":
        zstd(file, data)
    else:
        pq.write_table(pa.Table.from_pylist([json.loads(line) for line in data.splitlines()]), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"this is no such file at all" * 9)
    with pytest.raises(RecordError, match=r"damaged"):
        list(read_records(file))
    errors = []
    records = list(read_records([file, write(tmp_path / "b.jsonl", GOOD)], on_error=errors.append))
    assert [error.file for error in errors] == [str(file)] * len(errors) and 1 <= len(errors) <= 2
    assert "damaged" in str(errors[-1]) and records[-1].id == "b.jsonl:1"
    if damage == "truncated" and suffix != ".parquet":
        assert len(records) > 1000  # what could be read was


def test_an_endless_line_is_an_error_not_a_full_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 1 << 20)
    long = b'{"prompt": "' + b"x" * (5 << 20) + b'"}'
    errors = []
    file = write(tmp_path / "a.jsonl", GOOD, long, GOOD)
    assert [record.line for record in read_records(file, on_error=errors.append)] == [1, 3]
    assert errors[0].line == 2 and "longer than 1 MiB" in str(errors[0])


def test_a_parquet_row_that_is_not_utf8_is_named(tmp_path):
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    pq.write_table(pa.table({"prompt": strings, "response": pa.array(["r"] * 3)}), tmp_path / "a.parquet")
    errors = []
    assert [r.line for r in read_records(tmp_path / "a.parquet", on_error=errors.append)] == [1, 3]
    assert "row 2" in str(errors[0]) and "UTF-8" in str(errors[0])


def test_wrong_paths_are_told_before_anything_is_read(tmp_path):
    good = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(FileNotFoundError, match=r"b\.jsonl"):
        read_records([good, tmp_path / "b.jsonl"])
    with pytest.raises(ValueError, match=r"\.jsonl, \.jsonl\.gz"):
        read_records([good, write(tmp_path / "c.json", GOOD)])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_the_reader_is_a_stream(tmp_path, suffix):
    """30 MB of records, never more than a fraction of them in memory."""
    row = {"messages": [{"role": "user", "content": "x" * 3000}, {"role": "assistant", "content": "y" * 3000}]}
    line, count = json.dumps(row).encode() + b"\n", 5000
    file = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        with pq.ParquetWriter(file, pa.Table.from_pylist([row]).schema) as writer:
            for _ in range(count // 500):
                writer.write_table(pa.Table.from_pylist([row] * 500))
    elif suffix == ".jsonl.zst":
        zstd(file, line * count)
    else:
        file.write_bytes((line * count) if suffix == ".jsonl" else gzip.compress(line * count, 1))
    told = []
    tracemalloc.start()
    assert sum(1 for _ in read_records(file, on_bytes=told.append)) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6
    assert sum(told) == file.stat().st_size and all(n >= 0 for n in told)


def test_the_zstd_program_agrees(tmp_path):
    """A file of the reference program, where it is installed: its frames carry checksums and no content size."""
    try:
        data = subprocess.run(["zstd", "-c"], input=json.dumps(GOOD).encode(), capture_output=True, check=True).stdout
    except FileNotFoundError:
        return
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert [record.messages for record in read_records(tmp_path / "a.jsonl.zst")] == [GOOD["messages"]]


DEEP = b'{"prompt": "q", "response": "r", "x": ' + b"[" * 1490 + b"]" * 1490 + b"}"


@pytest.mark.parametrize(
    ("line", "field", "words"),
    [
        (b'{"prompt": "q", "response": "r", "id": "\\ud800"}', "id", "lone surrogate"),
        (b'{"prompt": "q", "response": "r", "source": "\\uDFFF"}', "source", "lone surrogate"),
        (b'{"prompt": "q", "response": "r", "x": [{"y": ["\\ud83d"]}]}', "x[0].y[0]", "lone surrogate"),
        (b'{"prompt": "q", "response": "r", "x": {"\\ud83d": 1}}', "x", "lone surrogate"),
        (DEEP, "", "nested more than 100 levels deep"),
        (json.dumps(bad_messages({"role": "x" * 300_000, "content": "y"})).encode(), "messages[0].role", "none of"),
        (json.dumps(GOOD | {"source": {"x" * 300_000: 1}}).encode(), "source", "expected a string"),
        (json.dumps(GOOD | {"history": "x"}).encode(), "history", "beside"),
    ],
)
def test_what_could_not_be_carried_on_is_refused_in_few_words(tmp_path, line, field, words):
    errors = []
    file = write(tmp_path / "a.jsonl", GOOD, line, GOOD | {"id": "\U0001f600"})
    assert [record.line for record in read_records(file, on_error=errors.append)] == [1, 3]
    assert [(error.line, error.field) for error in errors] == [(2, field)]
    assert words in str(errors[0]) and len(str(errors[0])) < 1500 and len(errors[0].raw) <= 500


def test_pairs_of_surrogates_and_brackets_in_texts_are_no_fault(tmp_path):
    line = b'{"prompt": "\\ud83d\\ude00 \\\\ud800 ' + b"[{" * 500 + b'", "response": "r"}'
    [record] = read_records(write(tmp_path / "a.jsonl", line))
    assert record.messages[0]["content"] == "\U0001f600 \\ud800 " + "[{" * 500


def unusual(count):
    numbers = pa.array(range(count), pa.int64())
    return pa.table(
        {
            "prompt": ["q"] * count,
            "response": ["r"] * count,
            "at": pa.array([1_764_308_707_123_456_789 + i for i in range(count)]).view(pa.timestamp("ns")),
            "zone": numbers.view(pa.timestamp("us", "Nowhere/Town")),
            "took": numbers.view(pa.duration("ns")),
            "price": numbers.cast(pa.decimal128(20, 1)),
            "raw": pa.array([b"\xff"] * count),
        }
    )


def test_parquet_columns_of_any_type_are_read(tmp_path):
    pq.write_table(unusual(300), tmp_path / "a.parquet")
    *_, last = read_records(tmp_path / "a.parquet")
    assert {key: str(value) for key, value in last.extra.items()} == {
        "at": "2025-11-28T05:45:07.123457088",
        "zone": "1970-01-01T00:00:00.000299+00:00",
        "took": "PT0.000000299S",
        "price": "299.0",
        "raw": "b'\\xff'",
    }


def test_a_date_that_no_calendar_has_is_named(tmp_path):
    days = pa.array([0, 2**31 - 1, 1], pa.int32()).view(pa.date32())
    pq.write_table(pa.table({"prompt": ["q"] * 3, "response": ["r"] * 3, "day": days}), tmp_path / "a.parquet")
    errors = []
    assert [record.line for record in read_records(tmp_path / "a.parquet", on_error=errors.append)] == [1, 3]
    assert [(error.line, error.field) for error in errors] == [(2, "day")] and "date32" in errors[0].message


def test_a_damaged_footer_ends_in_records_or_errors(tmp_path):
    """Whatever bytes of the footer are hit: records, errors that name the file, or both; never another exception."""
    good = tmp_path / "good.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD | {"id": str(i)} for i in range(50)]), good, row_group_size=10)
    data, rng = good.read_bytes(), random.Random(3)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    damaged = 0
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(rng.choice([1, 2, 8])):
            broken[-rng.randint(1, footer)] = rng.randrange(256)
        (tmp_path / "a.parquet").write_bytes(broken)
        errors = []
        for record in read_records(tmp_path / "a.parquet", on_error=errors.append):
            assert record.messages
        assert all(error.file.endswith("a.parquet") and len(str(error)) < 1500 for error in errors)
        damaged += bool(errors)
    assert damaged > 50
