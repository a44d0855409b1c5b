"""`score select`: records copied as they were, from and to every file type, or nothing left behind."""

import datetime
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_idft.cli import main
from megatron_idft.corpus.scored_folder import select_records
from megatron_idft.corpus.scores.rows import TOKEN_SCHEMA
from megatron_idft.errors import InputError, RecordError
from tests.corpus.scored_rows import row_of

# Odd on purpose: blanks, an escape, a number as id, nulls, keys in another order, a lone surrogate in a column.
LINES = [
    b'{"response": "b",  "prompt": "a", "id": 7, "note": null}\n',
    b'{"messages":[{"content":"q","role":"user"},{"role":"assistant","content":"\\u00e9","name":null}],"x":1e2}\r\n',
    b'{"prompt": "a", "response": "c", "y": "\\ud800"}\n',
    b'{"prompt": "a", "response": "d"}',
]


@pytest.fixture
def scored(tmp_path):
    """A folder of scores of the lines (file, line): phi_mean is 1 at the chosen ones, else 0."""

    def scored(file, count, chosen):
        rows = [
            row_of(i, [-1.0], [1.0], [3], file=str(file), line=i + 1, phi_mean=float(i + 1 in chosen))
            for i in range(count)
        ]
        parts = tmp_path / "scores" / "parts"
        parts.mkdir(parents=True, exist_ok=True)
        number = len(list(parts.iterdir()))
        pq.write_table(pa.Table.from_pylist(rows, TOKEN_SCHEMA), parts / f"chunk-{number:06d}.parquet")
        return parts.parent

    return scored


def select(folder, output, *files):
    return select_records(folder, "phi_mean > 0.5", list(map(str, files)), output)


def test_lines_keep_their_bytes(scored, tmp_path):
    plain, zipped = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_bytes(b"\xef\xbb\xbf" + b"".join(LINES))
    zipped.write_bytes(gzip.compress(b"".join(LINES)))
    scored(plain, 4, {1, 4})
    folder = scored(zipped, 4, {1, 2, 3})
    assert select(folder, tmp_path / "out.jsonl", plain, zipped) == {"scored": 8, "kept": 5, "unscored": 0}
    wanted = LINES[0] + LINES[3] + b"\n" + b"".join(LINES[:3])
    assert (tmp_path / "out.jsonl").read_bytes() == wanted
    select(folder, tmp_path / "out.jsonl.gz", plain, zipped)
    assert gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()) == wanted


def unusual_table(count=600):
    """A column of each kind that JSON has not, and that Python cannot hold."""
    times = pa.array(range(count), pa.int64())
    stamps = pa.array([1_764_308_707_123_456_789 + i for i in range(count)], pa.int64())
    return pa.table(
        {
            "prompt": [f"q{i}" for i in range(count)],
            "response": pa.array(["r"] * count, pa.large_string()),
            "id": pa.array(range(count), pa.uint8() if count < 256 else pa.uint16()),
            "at": stamps.view(pa.timestamp("ns")),
            "zone": stamps.view(pa.timestamp("ns", "Europe/Berlin")),
            "took": times.view(pa.duration("ns")),
            "clock": times.view(pa.time64("ns")),
            "price": pa.array([f"{i}.50" for i in range(count)]).cast(pa.decimal128(9, 2)),
            "day": pa.array([datetime.date(2026, 1, 1)] * count),
            "score": pa.array([float("nan"), 1.5] * (count // 2)),
            "nested": pa.array([[{"at": stamps[i].as_py(), "n": None}] for i in range(count)]).cast(
                pa.list_(pa.struct([("at", pa.timestamp("ns")), ("n", pa.int8())]))
            ),
            "raw": pa.array([b"\xff"] * count, pa.binary()),
        }
    )


def test_parquet_keeps_values_and_types(scored, tmp_path):
    table = unusual_table().replace_schema_metadata({"huggingface": "{}"})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    folder = scored(tmp_path / "a.parquet", 600, {1, 300, 600})
    select(folder, tmp_path / "out.parquet", tmp_path / "a.parquet")
    chosen = pq.read_table(tmp_path / "out.parquet")
    assert chosen.schema.equals(pq.read_schema(tmp_path / "a.parquet"), check_metadata=True)
    assert chosen.drop("score").equals(table.take([0, 299, 599]).drop("score"))  # NaN equals nothing


def test_parquet_becomes_strict_json_where_lines_are_asked_for(scored, tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(unusual_table().drop("raw"), file)
    folder = scored(file, 600, {2, 1})
    select(folder, tmp_path / "out.jsonl", file)
    first, second = (
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()
    )
    assert first == {
        "prompt": "q0", "response": "r", "id": 0, "at": "2025-11-28T05:45:07.123456789",
        "zone": "2025-11-28T05:45:07.123456789+00:00", "took": "PT0S", "clock": "00:00:00", "price": "0.50",
        "day": "2026-01-01", "score": None, "nested": [{"at": "2025-11-28T05:45:07.123456789", "n": None}],
    }  # fmt: skip
    assert second["took"] == "PT0.000000001S"
    assert second["clock"] == "00:00:00.000000001"
    assert second["score"] == 1.5


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_selection_that_fails_leaves_nothing(scored, tmp_path):
    pq.write_table(unusual_table(), tmp_path / "a.parquet")
    pq.write_table(unusual_table().drop("raw"), tmp_path / "other.parquet")
    (tmp_path / "b.jsonl").write_bytes(LINES[0])
    folder = scored(tmp_path / "a.parquet", 600, {5})
    before = left(tmp_path)
    with pytest.raises(RecordError, match=r"a\.parquet, row 5, raw: cannot be written as JSON: .*bytes.*\.parquet"):
        select(folder, tmp_path / "out.jsonl", tmp_path / "a.parquet")
    for files, output, words in (
        (["b.jsonl"], "out.jsonl", r"no score of any record of \S+b\.jsonl: .* such as \S+a\.parquet"),
        (["a.parquet", "b.jsonl"], "out.parquet", r"ends in \.jsonl"),
        (["a.parquet", "other.parquet"], "out.parquet", "different columns"),
        (["a.parquet"], "out.csv", "name a file that ends in"),
        (["a.parquet"], "b.jsonl", "exists"),
    ):
        with pytest.raises(InputError, match=words):
            select(folder, tmp_path / output, *(tmp_path / file for file in files))
    damaged = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(damaged[:-50] + b"\xff" * 42 + damaged[-8:])
    for output in ("out.jsonl", "out.parquet"):
        with pytest.raises(InputError, match=r"a\.parquet: damaged Parquet file"):
            select(folder, tmp_path / output, tmp_path / "a.parquet")
    assert left(tmp_path) == before


def test_the_command_says_what_it_kept(scored, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"".join(LINES))
    folder = scored(tmp_path / "a.jsonl", 4, {2})
    command = ["score", "select", str(folder), "--keep", "phi_mean > 0", "--data", str(tmp_path / "a.jsonl")]
    assert main([*command, "--output", str(tmp_path / "new" / "out.jsonl")]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"scored": 4, "kept": 1, "unscored": 0} and not said.err
    assert (tmp_path / "new" / "out.jsonl").read_bytes() == LINES[1]
    assert main([*command, "--output", str(tmp_path / "new" / "out.jsonl")]) == 2


def test_records_without_a_score_are_told(scored, tmp_path, capsys):
    """Those behind `score --limit`, those between others, of lines and of Parquet; blank lines are no records."""
    lines, rows, more = tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.jsonl"
    lines.write_bytes(LINES[0] + b"\n" + b"no record\n" + LINES[1] + LINES[2])
    pq.write_table(unusual_table(6), rows)
    more.write_bytes(LINES[0])
    scored(lines, 1, {1})
    folder = scored(rows, 4, set())
    command = ["score", "select", str(folder), "--keep", "phi_mean > 0", "--output", str(tmp_path / "out.jsonl")]
    assert main([*command, "--data", *map(str, (lines, rows, more))]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"scored": 5, "kept": 1, "unscored": 3 + 2 + 1}
    assert "6 records of --sft-data have no score" in said.err and "left out" in said.err
    assert (tmp_path / "out.jsonl").read_bytes() == LINES[0]


def test_a_refused_expression_ends_in_a_line_for_a_person(scored, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(LINES[0])
    command = ["score", "select", str(scored(tmp_path / "a.jsonl", 1, {1})), "--data", str(tmp_path / "a.jsonl")]
    assert main([*command, "--output", str(tmp_path / "out.jsonl"), "--keep", "phi_meen > 0"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("selection, column 1: no column 'phi_meen'; did you mean 'phi_mean'?")
