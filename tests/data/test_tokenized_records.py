"""Records tokenized into a cache: what is counted, when it is reused, and that no half of one is ever used."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_idft import files
from megatron_idft.data.chat.conversations import encode_conversation
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed import records as records_module
from megatron_idft.data.packed import tasks
from megatron_idft.data.packed.dataset import PackedDataset
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare
from megatron_idft.data.packed.record_index import read_index
from megatron_idft.data.packed.records import TokenizedRecords, open_tokenized_records, tokenize_records
from megatron_idft.errors import InputError, PrepareError, RecordError, TemplateError
from tests.data.chat_templates import REFUSED
from tests.data.prepared_files import files as files_of
from tests.data.prepared_files import tokenized, unpacked
from tests.data.tool_templates import QWEN25

ROOT = Path(__file__).parents[2]


def record(question="hello", answer="world"):
    return {"prompt": question, "response": answer}


def write(path, *rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


@pytest.fixture
def build(tokenizer, tmp_path):
    def build(*paths, seq_length=64, **options):
        used = options.pop("tokenizer", tokenizer)
        return tokenized(used, tmp_path / "cache", *paths, seq_length=seq_length, **options)

    return build


def contents(cache):
    return [(ids.tolist(), mask.tolist()) for ids, mask in (cache[i] for i in range(len(cache)))]


def tokens_of(tokenizer, row):
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    return encode_conversation(tokenizer, messages)


def test_the_cache_holds_every_record_in_order(build, tokenizer, tmp_path):
    rows = [record(f"question {i}", f"answer {i} 😀" * (1 + i % 3)) for i in range(1200)]  # several batches
    files = [write(tmp_path / "a.jsonl", *rows[:700]), write(tmp_path / "b.jsonl", *rows[700:])]
    cache = build(*files, seq_length=256)
    expected = [tokens_of(tokenizer, row) for row in rows]
    assert contents(cache) == [(ids.tolist(), mask.tolist()) for ids, mask in expected]
    assert cache.counts.records == cache.counts.kept == len(cache) == 1200
    assert cache.counts.tokens == sum(len(ids) for ids, _ in expected)
    assert cache.counts.trained_tokens == sum(int(mask.sum()) for _, mask in expected)
    assert cache.end_of_turn_ids == [tokenizer.special_ids["<|im_end|>"]]
    assert cache[3][0].dtype == np.int32 and cache[3][1].dtype == np.uint8
    with pytest.raises(IndexError):
        cache[1200]


def test_long_records_are_cut_and_counted(build, tokenizer, tmp_path):
    short, long, prompt_only = record(), record(answer="world " * 40), record("hello " * 60)
    file = write(tmp_path / "a.jsonl", short, long, prompt_only)
    ids, mask = tokens_of(tokenizer, long)
    cache = build(file, seq_length=40)
    assert len(ids) > 41 and len(cache[0][0]) < 41
    assert contents(cache)[1] == (ids[:41].tolist(), mask[:41].tolist())
    counts = cache.counts
    assert (counts.records, counts.kept, counts.truncated, counts.empty, counts.dropped) == (3, 2, 1, 1, 0)
    lost = int(mask[41:].sum()) + int(tokens_of(tokenizer, prompt_only)[1].sum())
    assert counts.lost_trained_tokens == lost and f"{lost:,}" in cache.report()
    assert counts.trained_tokens == sum(int(cache[i][1].sum()) for i in range(2))
    dropping = build(file, seq_length=40, truncation="drop")
    assert contents(dropping) == contents(cache)[:1]
    assert (dropping.counts.dropped, dropping.counts.truncated, dropping.counts.empty) == (2, 0, 0)
    with pytest.raises(
        RecordError, match=rf"a\.jsonl, line 2, messages: {len(ids)} tokens are more than seq_length \+ 1 = 41"
    ):
        build(file, seq_length=40, truncation="error")


def test_the_longest_record_that_fits_is_not_cut(build, tokenizer, tmp_path):
    n = len(tokens_of(tokenizer, record())[0])
    file = write(tmp_path / "a.jsonl", record())
    assert build(file, seq_length=n - 1, truncation="error").counts.truncated == 0
    assert build(file, seq_length=n - 2).counts.truncated == 1


def test_conversations_without_an_answer_are_empty(build, tmp_path):
    prompt = {"messages": [{"role": "user", "content": "hello"}]}
    cache = build(write(tmp_path / "a.jsonl", prompt, record()))
    assert (cache.counts.records, cache.counts.kept, cache.counts.empty) == (2, 1, 1)
    with pytest.raises(InputError, match=r"no record is left(.|\n)*empty, left out +1 "):
        build(write(tmp_path / "b.jsonl", prompt))
    assert not list((tmp_path / "cache").glob(".building*"))


def test_bad_records_stop_the_build_or_are_skipped_and_written_down(build, tokenizer, tmp_path):
    call = {"function": {"name": "add", "arguments": {}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [call]}]
    rows = [record(), b"{broken", record(answer="again"), {"messages": turns}, record() | {"tools": [call]}, record()]
    file = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(RecordError, match=r"a\.jsonl, line 2: not JSON"):
        build(file)
    assert not list((tmp_path / "cache").iterdir())
    cache = build(file, bad_records="skip")
    expected = [tokens_of(tokenizer, row) for row in (record(), record(answer="again"), record())]
    assert contents(cache) == [(ids.tolist(), mask.tolist()) for ids, mask in expected]
    assert (cache.counts.records, cache.counts.bad, cache.counts.kept) == (6, 3, 3)
    errors = [json.loads(line) for line in (cache.path / "records.errors.jsonl").read_text().splitlines()]
    assert [error["line"] for error in errors] == [2, 4, 5]
    assert "tool_calls" in errors[1]["message"] and "tools" in errors[2]["message"]
    assert str(cache.path / "records.errors.jsonl") in cache.report()


def test_a_template_that_proves_nothing_stops_the_build_even_when_skipping(build, sentencepiece_model, tmp_path):
    (tmp_path / "chat.jinja").write_text(REFUSED["drops earlier answers"][0])
    tokenizer = load_tokenizer(sentencepiece_model, str(tmp_path / "chat.jinja"))
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    file = write(tmp_path / "a.jsonl", record(), {"messages": turns})
    with pytest.raises(TemplateError, match=r"a\.jsonl, line 2: messages\[1\]: nothing of it stands"):
        build(file, tokenizer=tokenizer, bad_records="skip")


def messages_of(*contents, **fields):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    turns[-1] |= fields
    return {"messages": turns}


def test_tools_and_calls_reach_the_template_from_both_file_types(build, sentencepiece_model, tmp_path):
    (tmp_path / "chat.jinja").write_text(QWEN25)
    tokenizer = load_tokenizer(sentencepiece_model, str(tmp_path / "chat.jinja"))
    tool = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "integer"}}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    row = messages_of("3 + 4?", "", tool_calls=[call]) | {"tools": [tool]}
    expected = encode_conversation(tokenizer, row["messages"], tools=[tool])
    as_text = json.loads(json.dumps(row))
    as_text["tools"] = json.dumps([tool])
    as_text["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"a": 3}'
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([as_text, messages_of("3 + 4?", "7.")]), parquet)
    cache = build(write(tmp_path / "a.jsonl", row, as_text), parquet, tokenizer=tokenizer, seq_length=256)
    assert contents(cache)[:3] == [(expected[0].tolist(), expected[1].tolist())] * 3
    assert contents(cache)[3][1].count(1) == len("7.") + 1 and "add" not in tokenizer.decode(cache[3][0])
    prompts = [entry["prompt_hash"] for entry in cache.records()]
    responses = [entry["response_hash"] for entry in cache.records()]
    assert len(set(prompts[:3])) == 1 and prompts[3] != prompts[0]
    assert len(set(responses[:3])) == 1 and responses[3] != responses[0]


@pytest.mark.parametrize("weight", [0.5, -0.5])
def test_weights_are_kept_where_some_record_has_them(build, tokenizer, tmp_path, weight):
    plain, weighted = record(), messages_of("hello", "first", "again", "second", loss=weight)
    untrained = messages_of("hello", "first", "again", "second")
    untrained["messages"][1]["loss"] = 0
    file = write(tmp_path / "a.jsonl", plain, weighted, untrained, plain, weighted, plain)
    cache = build(file)
    assert (cache.counts.kept, cache.counts.weighted) == (6, 2) and "weighted records" in cache.report()
    as_mask = [bool((cache.pack(i).weights == cache[i][1]).all()) for i in range(6)]
    assert as_mask == [True, False, True, True, False, True]
    ids, mask = cache[1]
    for store, index in ((cache, 1), (cache, 4), (pickle.loads(pickle.dumps(cache)), 1)):
        weights = store.pack(index).weights
        assert weights.dtype == np.float32 and ((weights != 0) == mask).all()
        assert tokenizer.decode(ids[weights == 1]) == "first<|im_end|>"
        assert tokenizer.decode(ids[weights == weight]) == "second<|im_end|>"
    assert tokenizer.decode(cache[2][0][cache[2][1] == 1]) == "second<|im_end|>"
    sample = PackedDataset({"": cache}, 64, tokenizer.pad_id, bounds=False)[1]
    assert sample["loss_mask"][: len(ids) - 1].tolist() == cache.pack(1).weights[1:].tolist()
    assert ((sample["labels"] >= 0) == (sample["loss_mask"] != 0)).all() and not sample["loss_mask"][len(ids) :].any()
    assert cache.counts.trained_tokens == sum(int(cache[i][1].sum()) for i in range(6))  # never the sum of weights
    ones = build(write(tmp_path / "b.jsonl", plain, messages_of("a", "b", loss=1), messages_of("a", "b", loss=True)))
    assert (
        not (ones.path / "records.weight.bin").exists()
        and ones.pack(1).weights is None
        and "weighted" not in ones.report()
    )
    damaged = cache.path / "records.weight.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"records\.weight\.bin should hold"):
        build(file)


def test_weights_are_cut_with_their_tokens(build, tmp_path):
    file = write(tmp_path / "a.jsonl", messages_of("hello", "world " * 40, loss=0.5), record())
    cache = build(file, seq_length=40)
    assert len(cache[0][0]) == len(cache.pack(0).weights) == 41 and set(cache.pack(0).weights.tolist()) == {0, 0.5}
    assert set(cache.pack(1).weights.tolist()) == {0, 1}


def test_the_last_turn_alone_is_trained_when_asked(build, tokenizer, tmp_path):
    file = write(tmp_path / "a.jsonl", messages_of("hello", "first", "again", "second"))
    whole, last = build(file), build(file, last_turn_only=True)
    assert last[0][0].tolist() == whole[0][0].tolist()
    assert tokenizer.decode(last[0][0][last[0][1] == 1]) == "second<|im_end|>"
    settings = unpacked([file], 64, last_turn_only=True)
    assert open_tokenized_records(settings, tokenizer, tmp_path / "cache").path == last.path
    untrained = write(tmp_path / "b.jsonl", messages_of("hello", "first", "again", "second", loss=0), record())
    assert build(untrained, last_turn_only=True).counts.empty == 1


def test_the_report_counts_what_a_person_should_know(build, tmp_path):
    cache = build(write(tmp_path / "a.jsonl", record("what is <|im_end|>?"), record()))
    assert cache.counts.spells_special == 1 and "spelling special tokens" in cache.report()
    assert "unwritten" not in cache.report() and str(cache.path) in cache.report()


def test_the_same_arguments_reuse_and_anything_else_rebuilds(build, sentencepiece_model, tmp_path):
    file = write(tmp_path / "a.jsonl", *[record(f"question {i}") for i in range(5)])
    first = build(file)
    stamp = (first.path / "records.bin").stat().st_mtime_ns
    assert build(file).path == first.path and (first.path / "records.bin").stat().st_mtime_ns == stamp
    paths = {first.path}
    plain = load_tokenizer(sentencepiece_model, "plain")
    for options in (
        {"seq_length": 65},
        {"truncation": "drop"},
        {"bad_records": "skip"},
        {"tokenizer": plain},
        {"last_turn_only": True},
    ):
        paths.add(build(file, **options).path)
    paths.add(build(file, write(tmp_path / "b.jsonl", record())).path)
    assert len(paths) == 7
    text = file.read_bytes()
    file.write_bytes(text.replace(b"question 4", b"question 5"))  # the same size; a later time
    assert (edited := build(file)).path not in paths
    assert contents(edited) != contents(first) and contents(TokenizedRecords(first.path)) == contents(first)


def test_an_edit_that_keeps_size_and_time_is_seen_in_head_and_tail(build, tmp_path):
    file = write(tmp_path / "a.jsonl", record("question 1"))
    first, times = build(file), file.stat()
    file.write_bytes(file.read_bytes().replace(b"question 1", b"question 2"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert build(file).path != first.path


def test_an_edit_in_the_middle_is_seen_by_its_time(build, tmp_path, monkeypatch):

    monkeypatch.setattr(files, "_SAMPLE_BYTES", 8)
    file = write(tmp_path / "a.jsonl", record("question 1"))
    first, times = build(file), file.stat()
    file.write_bytes(file.read_bytes().replace(b"question 1", b"question 2"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert build(file).path != first.path


def test_other_ranks_open_what_one_rank_built(build, tokenizer, tmp_path):
    file = write(tmp_path / "a.jsonl", record())
    same = tokenizer, tmp_path / "cache"
    with pytest.raises(InputError, match="tokenize_records must finish first"):
        open_tokenized_records(unpacked([file], 64), *same)
    built = build(file)
    assert open_tokenized_records(unpacked([file], 64), *same).path == built.path
    with pytest.raises(InputError, match="tokenize_records must finish first"):
        open_tokenized_records(unpacked([file], 63), *same)


@pytest.mark.parametrize("name", [".bin", ".idx", ".mask.bin", ".packs.bin", ".sources.bin", ".json"])
def test_a_damaged_cache_is_refused(build, tmp_path, name):
    file = write(tmp_path / "a.jsonl", record())
    damaged = build(file).path / f"records{name}"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with pytest.raises(InputError, match=f"delete {damaged.parent} to tokenize"):
        build(file)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_length": 0}, "seq_length"),
        ({"truncation": "cut"}, "truncation"),
        ({"bad_records": "ignore"}, "bad_records"),
    ],
)
def test_wrong_settings_are_told(build, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        build(write(tmp_path / "a.jsonl", record()), **options)
    with pytest.raises(InputError, match="no record files"):
        build()


BUILD = """
import sys
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.records import tokenize_records
model, records, cache = sys.argv[1:]
tokenizer = load_tokenizer(model, "chatml")
settings = PrepareSettings((records,), 256, packing=False, chunk_bytes=1 << 18)
print(tokenize_records(settings, tokenizer, cache).counts.kept)
"""


def builder(model, records, cache):
    command = [sys.executable, "-c", BUILD, str(model), str(records), str(cache)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_nothing_that_is_used(build, sentencepiece_model, tokenizer, tmp_path):
    rows = [record(f"question {i}", "world " * 20) for i in range(20_000)]
    file, cache = write(tmp_path / "a.jsonl", *rows), tmp_path / "cache"
    process = builder(sentencepiece_model, file, cache)
    deadline = time.monotonic() + 60
    while not list(cache.glob(".building*/records.chunks/chunk-*.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(cache.glob(".building*")) and not list(cache.glob("tokens-*"))
    with pytest.raises(InputError, match="must finish first"):
        open_tokenized_records(unpacked([file], 256), tokenizer, cache)
    assert len(build(file, seq_length=256)) == 20_000
    assert [path.name.split("-")[0] for path in cache.iterdir()] == ["tokens"]  # the dead build is swept away


def test_concurrent_builders_agree(sentencepiece_model, tmp_path):
    file, cache = write(tmp_path / "a.jsonl", *[record(f"question {i}") for i in range(3000)]), tmp_path / "cache"
    builders = [builder(sentencepiece_model, file, cache) for _ in range(3)]
    results = [process.communicate(timeout=120) for process in builders]
    assert [process.returncode for process in builders] == [0, 0, 0], results
    assert {out.strip() for out, _ in results} == {"3000"} and len(list(cache.iterdir())) == 1
    assert any("records" in err and "/s" in err for _, err in results)  # progress, on stderr


def test_the_loser_of_a_race_takes_the_winners_cache(build, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", record())
    inner, winner = records_module.prepare, []

    def slow(*args, **kwargs):
        monkeypatch.setattr(records_module, "prepare", inner)
        winner.append(build(file))
        inner(*args, **kwargs)

    monkeypatch.setattr(records_module, "prepare", slow)
    assert build(file).path == winner[0].path and len(list((tmp_path / "cache").iterdir())) == 1


def test_building_holds_a_chunk_not_the_corpus(tokenizer, tmp_path):
    row = json.dumps(record("question", "world hello " * 150)).encode()
    few, many = write(tmp_path / "few.jsonl", *[row] * 100), write(tmp_path / "many.jsonl", *[row] * 800)
    peaks = []
    for number, file in enumerate((few, few, many)):  # the first loads what is loaded once
        tracemalloc.start()
        settings = unpacked([file], 2048, chunk_bytes=1 << 16)
        prepare(settings, tokenizer, tmp_path / f"{number}", workers=0, progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1], peaks


def test_processes_and_this_one_write_the_same_bytes(tokenizer, tmp_path):
    rows = [record(f"question {i}", f"answer {i}" * (1 + i % 7)) for i in range(400)]
    settings = unpacked([write(tmp_path / "a.jsonl", *rows)], 32, chunk_bytes=1 << 13)
    for workers in (0, 2):
        prepare(settings, tokenizer, tmp_path / f"{workers}", workers=workers, progress=False)
    assert files_of(tmp_path / "0") == files_of(tmp_path / "2")
    indices = [read_index(tmp_path / f"{workers}.records.parquet") for workers in (0, 2)]
    assert indices[0] == indices[1] and len(indices[0]) == 400


def test_a_file_that_changes_while_it_is_read_is_refused(build, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", *[record(f"question {i}") for i in range(50)])
    inner = tasks.answers

    def growing(*args):
        with open(file, "a") as grown:
            grown.write(json.dumps(record()) + "\n")
        return inner(*args)

    with monkeypatch.context() as patched:
        patched.setattr(tasks, "answers", growing)
        with pytest.raises(PrepareError, match="a file changed while it was read"):
            build(file)
    assert not list((tmp_path / "cache").iterdir()) and len(build(file)) == 51


def test_a_cache_speaks_of_the_files_by_the_names_of_this_launch(build, tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x.jsonl", record(name))
    first = build(tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl")
    monkeypatch.chdir(tmp_path)
    again = build("a/x.jsonl", "b/x.jsonl")
    assert again.path == first.path
    assert [row["file"] for row in again.records()] == ["a/x.jsonl", "b/x.jsonl"]
    assert [row["id"] for row in again.records()] == ["a/x.jsonl:1", "b/x.jsonl:1"]
    assert pickle.loads(pickle.dumps(again)).origins(1) == [("b/x.jsonl", 1)]


@pytest.mark.parametrize("suffix", [".json", ".report.json", ".records.parquet"])
def test_a_cache_without_a_file_says_what_to_delete(build, tmp_path, suffix):
    file = write(tmp_path / "a.jsonl", record())
    cache = build(file)
    (cache.path / f"records{suffix}").unlink()
    with pytest.raises(InputError, match=f"delete {cache.path} to tokenize"):
        again = build(file)
        again.report()
        again.records()


def test_where_every_record_is_bad_the_first_is_named(build, tmp_path):
    with pytest.raises(InputError, match=r"a\.jsonl: no record is left.*every one is bad.*line 1: not JSON") as error:
        build(write(tmp_path / "a.jsonl", b"{", b"{"), bad_records="skip")
    assert ".building" not in str(error.value)
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(InputError, match="the files hold none"):
        build(tmp_path / "b.jsonl")


def test_records_are_packed_when_asked(tokenizer, tmp_path):
    rows = [record(f"question {i}") for i in range(30)]
    file = write(tmp_path / "a.jsonl", *rows)
    settings = PrepareSettings((str(file),), 64)
    store = tokenize_records(settings, tokenizer, tmp_path / "cache", progress=False)
    assert len(store) < 30 and sum(len(store.pack(i).starts) for i in range(len(store))) == 30
    assert "best-fit decreasing" in store.report()
    assert store.path != tokenized(tokenizer, tmp_path / "cache", file).path
