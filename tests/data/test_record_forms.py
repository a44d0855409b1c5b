"""Records of every form through what tokenizes and keeps them: the same tokens, and the forms are said once."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_idft.corpus.copying import copy_records
from megatron_idft.data.packed.blocks import parse_block, read_blocks
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare
from megatron_idft.data.packed.preview import show_records
from megatron_idft.hinted_decoding.input.record_store import RecordStore, build_store
from tests.data.prepared_files import tokenized, write

PAIRS = [("hello", "world"), ("what is the capital\n\nof France", "Paris"), ("3 + 4", "7")]
NAMES = {
    "messages": "messages form (messages)",
    "messages as JSON text": "messages form (messages)",
    "parts": "messages form (messages)",
    "prompt-response": "prompt-response form (prompt, response)",
    "prompt-completion": "prompt-completion form (prompt, completion)",
    "ShareGPT": "ShareGPT form (conversations)",
    "Alpaca": "Alpaca form (instruction, input, output)",
}


def in_form(name, number, question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    instruction, _, about = question.partition("\n\n")
    columns = {
        "messages": {"messages": messages},
        "messages as JSON text": {"messages": json.dumps(messages)},
        "parts": {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]},
        "prompt-response": {"prompt": question, "response": answer},
        "prompt-completion": {"prompt": messages[:1], "completion": messages[1:]},
        "ShareGPT": {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        "Alpaca": {"instruction": instruction, "input": about, "output": answer},
    }[name]
    return columns | {"id": f"r{number}", "source": "web", "answer": answer, "note": number}


def file_of(folder, name, suffix="jsonl"):
    rows = [in_form(name, number, *pair) for number, pair in enumerate(PAIRS)]
    folder.mkdir(parents=True)
    if suffix == "jsonl":
        return write(folder / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def packs(tokenizer, file, output):
    prepared = prepare(PrepareSettings((str(file),), 64), tokenizer, output, workers=0, progress=False)
    return [
        output.with_name(f"{output.name}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".mask.bin")
    ], prepared


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_form_gives_the_same_packs_cache_and_store(tokenizer, tmp_path, suffix):
    found = {}
    for name in NAMES:
        folder = tmp_path / name
        file = file_of(folder, name, suffix)
        written, prepared = packs(tokenizer, file, folder / "packs")
        cache = tokenized(tokenizer, folder / "cache", file)
        build_store(folder / "store", [str(file)], None, "stop")
        store = RecordStore(folder / "store")
        ids = [(cache[i][0].tolist(), cache[i][1].tolist()) for i in range(len(cache))]
        found[name] = written, ids, store.fingerprint
        assert store.forms == [[str(file), NAMES[name].split(" form")[0], 3]]
        line = f"\n  {file.name}: 3 records in the {NAMES[name]}\n"
        assert prepared.report.count(line) == 1 and cache.report().count(line) == 1
    assert all(each == found["messages"] for each in found.values())
    assert np.count_nonzero(found["messages"][1][1][1]) > 1  # and something is trained


def test_forms_are_counted_by_file_and_bad_records_in_none(tokenizer, tmp_path):
    first = write(tmp_path / "a.jsonl", [in_form(name, 0, "hello", "world") for name in NAMES] + [{"text": "x"}])
    second = file_of(tmp_path / "more", "ShareGPT")
    settings = PrepareSettings((str(first), str(second)), 64, bad_records="skip", chunk_bytes=100)
    report = prepare(settings, tokenizer, tmp_path / "packs", workers=0, progress=False).report
    said = [line for line in report.splitlines() if " form (" in line]
    assert [line.split("jsonl: ")[1].split(" records")[0].split(" record")[0] for line in said] == [
        "3",
        "1",
        "1",
        "1",
        "1",
        "3",
    ]
    assert said[-1] == f"  {second}: 3 records in the ShareGPT form (conversations)"
    *samples, forms = show_records(settings, tokenizer, 2)
    assert len(samples) == 2 and len(forms.splitlines()) == 5
    assert forms.startswith("of the records looked at, a.jsonl: 3 records in the messages form (messages)\n")


def test_selected_records_keep_their_form(tmp_path):
    for suffix in ("jsonl", "parquet"):
        for name in NAMES:
            file = file_of(tmp_path / suffix / name, name, suffix)
            chosen = file.with_name(f"chosen.{suffix}")
            assert copy_records([(file, {1, 3})], chosen, f".{suffix}") == 2
            (block,) = read_blocks([str(chosen)], 1 << 20)
            records = [record for _, record in parse_block(block)]
            assert [record.id for record in records] == ["r0", "r2"]
            assert [record.form for record in records] == [NAMES[name].split(" form")[0]] * 2
            if suffix == "jsonl":
                lines = file.read_bytes().splitlines()
                assert chosen.read_bytes().splitlines() == [lines[0], lines[2]]


def test_a_store_of_the_first_forms_has_the_fingerprint_of_earlier_versions(tmp_path):
    """People go on with folders that were begun by these: this one is of the version before the other forms."""
    rows = [in_form("messages", 0, *PAIRS[0]), in_form("prompt-response", 1, *PAIRS[1]) | {"conversations": None}]
    file = write(tmp_path / "a.jsonl", [*rows, in_form("messages", 2, *PAIRS[2]) | {"prompt": "title", "input": "x"}])
    build_store(tmp_path / "store", [str(file)], None, "stop")
    assert RecordStore(tmp_path / "store").fingerprint == (
        "3-278b31b0b8897da94884d1c4b30526344455e3f8d76b78e2a040332eea3e9b00"
    )
