"""Records by index, texts of other engines, and what is read back from an output folder."""

import datetime
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_idft.corpus.ledger.ledger import Ledger
from megatron_idft.corpus.records import read_records
from megatron_idft.errors import InputError, RecordError, SettingsMismatch
from megatron_idft.hinted_decoding.input.provided import Origin, ProvidedText, ProvidedTexts
from megatron_idft.hinted_decoding.input.record_store import RecordStore, build_store, store_path
from megatron_idft.hinted_decoding.output.former_names import current_settings
from megatron_idft.hinted_decoding.output.merge import merge
from megatron_idft.hinted_decoding.output.outcomes import OUTCOME_SCHEMA, TURN
from megatron_idft.hinted_decoding.output.results import (
    begun_by_earlier_version,
    open_retry,
    read_outcomes,
    read_settings,
    retry_folders,
)
from megatron_idft.hinted_decoding.output.status import describe_status
from megatron_idft.hinted_decoding.report.summary import summarize
from megatron_idft.integration.offline.program import write_part
from tests.hinted_decoding.outcome_rows import realigned_rows


def lines(count: int) -> list[dict]:
    return [{"prompt": f"{i}?", "response": f"{i}!", "id": f"r{i}", "n": i, "deep": {"a": [i]}} for i in range(count)]


def texts(*found: str) -> list[ProvidedText]:
    return [ProvidedText(text) for text in found]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def store(folder: Path, data: list[str], limit: int | None = None, bad: str = "stop") -> RecordStore:
    path = store_path(folder, data, limit, bad)
    build_store(path, data, limit, bad)
    return RecordStore(path)


def test_records_by_index_are_the_records_that_are_read(tmp_path):
    data = [write(tmp_path / "a.jsonl", lines(600)), write(tmp_path / "b.jsonl", [{"prompt": "x", "response": "y"}])]
    found = store(tmp_path / "out", data)
    expected = list(read_records(data))
    assert len(found) == 601 and [found[i] for i in (600, 0, 255, 256, 511, 512)] == [
        expected[i] for i in (600, 0, 255, 256, 511, 512)
    ]
    assert list(found.ids()) == [record.id for record in expected]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    with pytest.raises(IndexError):
        found[601]


def test_parquet_columns_that_json_has_not(tmp_path):
    rows = [{"prompt": "x", "response": "y", "when": datetime.date(2026, 1, 2)}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert store(tmp_path, [str(tmp_path / "a.parquet")])[0].extra == {"when": "2026-01-02"}
    pq.write_table(pa.Table.from_pylist([rows[0] | {"sha": b"\x00"}]), tmp_path / "b.parquet")
    with pytest.raises(RecordError, match=r"row 1, sha: cannot be written as JSON: a value of the type bytes; drop"):
        store(tmp_path, [str(tmp_path / "b.parquet")])


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    data = write(tmp_path / "a.jsonl", lines(3))
    first = store(tmp_path, [data]).fingerprint
    copy = write(tmp_path / "elsewhere" / "a.jsonl", lines(3))
    assert store(tmp_path / "other", [copy]).fingerprint == first
    assert store(tmp_path, [data], limit=2).fingerprint != first
    changed = lines(3)
    changed[1]["response"] = "2!"
    write(tmp_path / "a.jsonl", changed)
    assert store(tmp_path, [data]).fingerprint != first  # a copy of its own: the file is another one


def test_ids_that_occur_twice_and_bad_records(tmp_path):
    rows = [*lines(2), lines(1)[0], {"prompt": "x"}]
    data = [write(tmp_path / "a.jsonl", rows)]
    with pytest.raises(RecordError, match=r"line 3, id: 'r0' was the id of line 1 already"):
        store(tmp_path, data)
    assert list(store(tmp_path, data, bad="skip").ids()) == ["r0", "r1"]
    [errors] = tmp_path.glob("records-*/errors.jsonl")
    assert [json.loads(line)["line"] for line in errors.read_text().splitlines()] == [3, 4]
    with pytest.raises(InputError, match="no record"):
        store(tmp_path, [write(tmp_path / "empty.jsonl", [])])
    assert len(list(tmp_path.glob("*records-*"))) == 1  # nothing half


def test_a_damaged_copy_is_named(tmp_path):
    found = store_path(tmp_path, data := [write(tmp_path / "a.jsonl", lines(3))], None, "stop")
    store(tmp_path, data)
    (found / "records.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="delete it"):
        RecordStore(found)


def test_provided_texts_by_id_and_turn(tmp_path):
    rows = [
        {"id": 7, "response": "ä"},
        {"id": "b", "turn": 1, "responses": ["x", "y"]},
        {"id": "b", "turn": 0, "response": ""},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    found = ProvidedTexts(path, "rollouts", ["7", "b", "c"])
    assert found.get("7") == {None: texts("ä")} and found.get("c") == {}
    assert found.get("b") == {1: texts("x", "y"), 0: texts("")}
    assert len(found) == 2 and found.fingerprint == ProvidedTexts(path, "rollouts", None).fingerprint
    analyses = ProvidedTexts(write(tmp_path / "b.jsonl", [{"id": "b", "analysis": "z"}]), "analyses", ["b"])
    assert analyses.get("b") == {None: ProvidedText("z")} and analyses.fingerprint != found.fingerprint


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"id": "z", "response": "x"}, "line 2: no record has the id 'z'"),
        ({"id": "a", "response": "x"}, "line 2: 'a' stands in line 1 already"),
        ({"id": "b"}, "line 2: expected"),
        ({"id": "b", "responses": []}, "line 2: expected"),
        ({"id": "b", "responses": [1]}, "line 2: expected"),
        ({"id": True, "response": "x"}, "line 2: expected"),
        ({"id": "b", "response": "x", "turn": "0"}, "line 2: turn '0'"),
        ("no object", "line 2: expected"),
    ],
)
def test_provided_lines_that_are_wrong_are_named(tmp_path, row, what):
    path = write(tmp_path / "a.jsonl", [{"id": "a", "response": "x"}, row])
    with pytest.raises(InputError, match=what):
        ProvidedTexts(path, "rollouts", ["a", "b"])


ORIGIN = Origin("f" * 64, 600, ["a" * 64], {"temperature": 1.0, "top_p": 1.0, "top_k": 0})
MADE = {"tokenizer_fingerprint": ORIGIN.tokenizer, "prompt_sha256": "p"}


def test_provided_texts_with_ids_and_fingerprints(tmp_path):
    rows = [
        {"id": "a", "turn": 0, "responses": ["x", "y"], "token_ids": [[1, 2], [3]], "sampling": ORIGIN.sampling} | MADE,
        {"id": "b", "response": "z", "token_ids": [599]},
    ]
    found = ProvidedTexts(write(tmp_path / "a.jsonl", rows), "rollouts", None, ORIGIN)
    assert found.get("a") == {0: [ProvidedText("x", (1, 2), "p"), ProvidedText("y", (3,), "p")]}
    assert found.get("b") == {None: [ProvidedText("z", (599,))]} and found.unnamed == 1
    row = {"id": "a", "analysis": "x", "token_ids": [5], "template_sha256": "a" * 64} | MADE
    analyses = ProvidedTexts(write(tmp_path / "b.jsonl", [row]), "analyses", None, ORIGIN)
    assert analyses.get("a") == {None: ProvidedText("x", (5,), "p", "a" * 64)} and not analyses.unnamed


@pytest.mark.parametrize(
    ("kind", "row", "what"),
    [
        ("rollouts", {"tokenizer_fingerprint": "0" * 64}, "another tokenizer or chat template .* --tokenizer-model"),
        ("analyses", {"template_sha256": "0" * 64}, "another hint template"),
        ("rollouts", {"sampling": ORIGIN.sampling | {"temperature": 0.5}}, "'temperature': 0.5.*--rollout-temperature"),
        ("rollouts", {"token_ids": [1, -2]}, "token_ids: expected a list of token ids"),
        ("rollouts", {"token_ids": [True]}, "token_ids: expected a list of token ids"),
        ("rollouts", {"token_ids": [600]}, "600 is no token of this tokenizer"),
        ("rollouts", {"responses": ["x", "y"], "token_ids": [[1]]}, "one list of token ids for each response"),
    ],
)
def test_provided_lines_of_other_prompts_are_refused(tmp_path, kind, row, what):
    path = write(tmp_path / "a.jsonl", [{"id": "a", "response": "x", "analysis": "x"} | row])
    with pytest.raises(InputError, match=rf"--{kind} .*a.jsonl, line 1: .*{what}"):
        ProvidedTexts(path, kind, ["a"], ORIGIN)


def test_provided_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "a"')
    with pytest.raises(InputError, match="not JSON"):
        ProvidedTexts(tmp_path / "a.jsonl", "analyses", None)
    for name in ("a.jsonl.gz", "b.jsonl"):
        with pytest.raises(InputError, match=r"unpack it|No such file"):
            ProvidedTexts(tmp_path / name, "analyses", None)


def outcome(index: int, status: str = "kept", text: str = "") -> dict:
    row = dict.fromkeys(OUTCOME_SCHEMA.names) | {"index": index, "id": f"r{index}", "file": "f", "line": index + 1}
    made = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{index}{text}"}]}
    made |= {"id": f"r{index}", "n": index} | ({"late": {"x": [1.5]}} if index == 5 else {}) | ({"empty": {}})
    failures = [{"stage": "rollout", "reason": "wrong"}, {"stage": "hinted", "reason": "leak"}]
    return row | {
        "status": status,
        "reason": None if status == "kept" else "why",
        "record": json.dumps(made) if status == "kept" else None,
        "turns": [{"candidates": None, "failures": failures, "stage": "rollout" if status == "kept" else None}],
    }


def fill(folder: Path, chunks: dict[int, list[dict]], num_chunks: int) -> None:
    with Ledger(folder, {"s": 1}, num_chunks) as ledger:
        while (chunk := ledger.claim()) is not None:
            if chunk in chunks:
                ledger.finish(chunk, partial(write_part, rows=chunks[chunk], schema=OUTCOME_SCHEMA))


@pytest.fixture
def finished(tmp_path) -> Path:
    folder = tmp_path / "out"
    rows = [outcome(i, {1: "dropped", 2: "error", 4: "error"}.get(i, "kept")) for i in range(6)]
    fill(folder, {0: rows[:2], 1: rows[2:4], 2: rows[4:]}, 3)
    return folder


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_merged_files_hold_the_kept_records_in_order(finished, tmp_path, name):
    counts = merge(finished, tmp_path / name)
    assert counts == {"kept": 3, "dropped": 1, "error": 2, "kept_turns": {"original": 3}}
    records = list(read_records(tmp_path / name))
    assert [record.id for record in records] == ["r0", "r3", "r5"]
    assert [record.messages[1]["content"] for record in records] == ["a0", "a3", "a5"]
    assert [record.extra["n"] for record in records] == [0, 3, 5] and records[2].extra["late"] == {"x": [1.5]}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_merge_refuses(finished, tmp_path):
    with pytest.raises(InputError, match="ends in"):
        merge(finished, tmp_path / "a.csv")
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(InputError, match="exists"):
        merge(finished, tmp_path / "a.jsonl")
    mixed = outcome(0) | {"record": json.dumps({"messages": [], "n": "text"})}
    fill(tmp_path / "mixed", {0: [outcome(1), mixed]}, 1)
    with pytest.raises(InputError, match=r"merge to \.jsonl"):
        merge(tmp_path / "mixed", tmp_path / "b.parquet")
    assert not (tmp_path / "b.parquet").exists()


def test_a_partial_merge_must_be_asked_for(tmp_path):
    fill(tmp_path / "out", {1: [outcome(2)]}, 2)
    with pytest.raises(InputError, match=r"1 of 2 chunks are not finished.*--partial"):
        merge(tmp_path / "out", tmp_path / "a.jsonl")
    assert merge(tmp_path / "out", tmp_path / "a.jsonl", partial=True)["kept"] == 1
    with pytest.raises(InputError, match="--retry-errors"):
        open_retry(tmp_path / "out")


def test_errors_are_replaced_by_what_retries_gave(finished, tmp_path):
    first, indices = open_retry(finished)
    assert (first, indices) == (finished / "retries" / "001", [2, 4]) == open_retry(finished)
    fill(first, {0: [outcome(2, text=" again")]}, 2)  # one of two chunks
    assert open_retry(finished) == (first, [2, 4])
    fill(first, {1: [outcome(4, "error")]}, 2)
    second, indices = open_retry(finished)
    assert (second.name, indices) == ("002", [4])
    # Later rows win, unless they are errors: of records that were errors alone.
    fill(second, {0: [outcome(4, text=" at last")]}, 1)
    rows = list(read_outcomes(finished))
    assert [row["status"] for row in rows] == ["kept", "dropped", "kept", "kept", "kept", "kept"]
    assert [json.loads(rows[i]["record"])["messages"][1]["content"] for i in (2, 4)] == ["a2 again", "a4 at last"]
    merged = merge(finished, tmp_path / "a.jsonl")
    assert {name: merged[name] for name in ("kept", "dropped", "error")} == {"kept": 5, "dropped": 1, "error": 0}
    assert open_retry(finished) is None and len(retry_folders(finished)) == 2


def test_a_folder_of_an_earlier_version_is_read(tmp_path):
    """Without what the schema did not have then, whatever the release of pyarrow."""
    new = {"failures", "hints"}
    turn = pa.struct([field for field in TURN if field.name not in new])
    schema = OUTCOME_SCHEMA.set(OUTCOME_SCHEMA.get_field_index("turns"), pa.field("turns", pa.list_(turn)))
    rows = [outcome(0, "dropped"), outcome(1, "dropped")]
    for row in rows:
        row["turns"] = [{name: value for name, value in one.items() if name not in new} for one in row["turns"]]
    with Ledger(tmp_path / "out", {"s": 1}, 1) as ledger:
        ledger.finish(ledger.claim(), partial(write_part, rows=rows, schema=schema))
    assert "2 dropped: why" in describe_status(tmp_path / "out")
    assert merge(tmp_path / "out", tmp_path / "a.jsonl")["dropped"] == 2
    numbers = summarize(read_outcomes(tmp_path / "out"), {}, "t")["corpus"]
    assert numbers["reasons"]["dropped"] == [{"name": "why", "count": 2}]
    assert numbers["failures"] == {"rollout": [], "hinted": [], "second_hint": [], "retry": []}


FORMER_CANDIDATE = {"slope": "beta", "hint_share_mean": "lambda_mean", "hint_share_min": "lambda_max"}


def with_shares_of_the_plain_stream(rows: list[dict]) -> pa.Table:
    """As versions wrote them that recorded lambda, the share of the plain stream."""
    for row in rows:
        for turn in row["turns"] or ():
            turn |= {"num_hinted_prompt_tokens": 30, "analysis_tokens": None, "analysis_text": "It is"}
            del turn["hints"]
            turn["mix_weight"] = [1 - share for share in turn.pop("hint_share")]
            for candidate in turn["candidates"]:
                for name, former in FORMER_CANDIDATE.items():
                    value = candidate.pop(name)
                    candidate[former] = value if value is None or name == "slope" else 1 - value
        if row["status"] == "kept":
            turns = [{"stage": "hinted", "beta": 3.0, "lambda_mean": 0.25, "lambda_max": 0.75}, {"stage": "original"}]
            row["record"] = json.dumps({"id": row["id"], "text": "ä λ", "realigned": {"turns": turns}})
    return pa.Table.from_pylist(rows)


def test_a_folder_that_recorded_the_share_of_the_plain_stream_is_read_as_hint_shares(tmp_path):
    count = 30
    expected = pa.Table.from_pylist(list(realigned_rows(count, seed=3)), OUTCOME_SCHEMA).to_pylist()
    former = with_shares_of_the_plain_stream(list(realigned_rows(count, seed=3)))
    with Ledger(tmp_path / "out", {"s": 1}, 1) as ledger:
        ledger.finish(ledger.claim(), partial(pq.write_table, former))
    found = list(read_outcomes(tmp_path / "out"))
    tried = 0
    for row, wanted in zip(found, expected, strict=True):
        for turn, turn_wanted in zip(row["turns"] or (), wanted["turns"] or (), strict=True):
            np.testing.assert_allclose(turn["hint_share"], turn_wanted["hint_share"], atol=1e-6)
            assert "mix_weight" not in turn and "analysis_text" not in turn
            [hint] = turn["hints"]
            assert (hint["num_prompt_tokens"], hint["analysis_text"]) == (30, "It is")
            for one, one_wanted in zip(turn["candidates"], turn_wanted["candidates"], strict=True):
                assert not set(FORMER_CANDIDATE.values()) & set(one) and one["slope"] == one_wanted["slope"]
                for name in ("hint_share_mean", "hint_share_min"):
                    assert one[name] == pytest.approx(one_wanted[name], abs=1e-6)
                tried += one["slope"] is not None
    assert tried > 10
    means = [summarize(rows, {}, "t")["corpus"]["mixing"]["means"]["hint_share"] for rows in (found, expected)]
    assert means[0] == pytest.approx(means[1], abs=1e-6) and means[0]["value"] < 1
    kept = merge(tmp_path / "out", tmp_path / "a.jsonl")["kept"]
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    turn = {"stage": "hinted", "slope": 3.0, "hint_share_mean": 0.75, "hint_share_min": 0.25}
    assert len(records) == kept and all(record["text"] == "ä λ" for record in records)
    assert all(record["realigned"]["turns"] == [turn, {"stage": "original"}] for record in records)


def test_a_job_that_was_begun_under_the_former_names_goes_on_and_others_are_refused(tmp_path):
    retry = {"retries": 2, "beta_factor": 0.5, "after_retries": "original"}
    former = {"mixing": {"mode": "fixed", "value": 0.9}, "retry": retry, "seed": 1, "fallback": "retry"}
    now = {"mixing": {"mode": "fixed", "hint_share": 0.1}, "retry": {"retries": 2, "slope_factor": 0.5}, "seed": 1}
    now |= {"fallback": "original", "bare_below": 0.0}
    with Ledger(tmp_path / "fixed", former, 1):
        pass
    assert read_settings(tmp_path / "fixed") == now
    with Ledger(tmp_path / "fixed", now, 1, current=current_settings) as ledger:
        assert ledger.claim() == 0
    misread = now | {"mixing": {"mode": "fixed", "hint_share": 0.9}}
    with pytest.raises(SettingsMismatch, match=r"mixing\.hint_share: 0\.1 in the folder, 0\.9 now"):
        Ledger(tmp_path / "fixed", misread, 1, current=current_settings)
    prompt = {"sha256": "a", "marker": None}
    former = {"mixing": {"mode": "linear", "beta": 3.0}, "retry": None, "prompt": prompt, "analysis": {"top_k": 0}}
    with Ledger(tmp_path / "linear", former, 1):
        pass
    linear = {"mixing": {"mode": "linear", "slope": 3.0}, "retry": None, "prompts": [prompt]}
    linear |= {"analysis": {"top_k": 0, "marker": "require"}, "more_room": 0.0, "original_weight": 1.0}
    linear["bare_below"] = 0.0
    assert begun_by_earlier_version(tmp_path / "linear") == linear
    assert read_settings(tmp_path / "linear") == linear
    with Ledger(tmp_path / "linear", linear, 1, current=current_settings):
        pass
    with Ledger(tmp_path / "chain", {name: linear[name] for name in linear if name != "bare_below"}, 1):
        pass
    assert begun_by_earlier_version(tmp_path / "chain") == linear
    with Ledger(tmp_path / "now", linear, 1):
        pass
    assert begun_by_earlier_version(tmp_path / "now") is None


def test_status_says_what_became_of_the_records(finished):
    text = describe_status(finished)
    assert "3 of 3 chunks finished" in text and "records: 3 kept, 2 error, 1 dropped" in text
    assert "turns of kept records by stage: 3 rollout" in text and "2 error: why" in text
    assert "1 dropped: own response: wrong; hinted: leak" in text
    open_retry(finished)
    shutil.rmtree(finished / "parts")
    (finished / "parts").mkdir()
    assert "0 of 3 chunks" in describe_status(finished)
    with pytest.raises(InputError, match="no realigned records"):
        next(read_outcomes(finished))
