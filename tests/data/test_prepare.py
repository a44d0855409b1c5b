"""`prepare`: every document once with its exact tokens, the same bytes whatever happens, and what is refused."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_idft.data.chat.conversations import encode_conversation
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare
from megatron_idft.data.packed.store import PackedStore
from megatron_idft.errors import InputError, RecordError, SettingsMismatch
from tests.data.prepared_files import corpus, files, write

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tokenizer, tmp_path):
    def run(*paths, output="packs", tokenizer=tokenizer, workers=1, keep_chunks=False, **options):
        options = {"seq_length": 128, "chunk_bytes": 20_000} | options
        settings = PrepareSettings(tuple(map(str, paths)), **options)
        return prepare(settings, tokenizer, tmp_path / output, workers=workers, keep_chunks=keep_chunks, progress=False)

    return run


def documents(store):
    """(line, source) -> (ids, loss) of every document, which must be there once."""
    found = {}
    for index in range(len(store)):
        pack = store.pack(index)
        loss = pack.mask if pack.weights is None else pack.weights
        assert pack.starts[0] == 0 and pack.ids.dtype == np.int32 and pack.mask.dtype == np.uint8
        places = zip(pack.documents(), store.origins(index), pack.sources.tolist(), strict=True)
        for tokens, (file, line), source in places:
            key = Path(file).name, line, store.meta["sources"][source]
            assert key not in found
            found[key] = pack.ids[tokens].tolist(), loss[tokens].tolist()
    return found


def expected(tokenizer, rows, limit, name="a.jsonl"):
    encoded = [encode_conversation(tokenizer, row["messages"]) for row in rows]
    return {
        (name, line, row.get("source", name)): (ids[:limit].tolist(), mask[:limit].tolist())
        for line, (row, (ids, mask)) in enumerate(zip(rows, encoded, strict=True), 1)
        if mask[1:limit].any()
    }


@pytest.fixture(scope="module")
def huggingface(huggingface_folder):
    from megatron_idft.data.chat.template import BUILTIN_TEMPLATES

    return lambda kind: load_tokenizer(huggingface_folder(kind, BUILTIN_TEMPLATES["chatml"], eos_token="<|im_end|>"))


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level", "metaspace"])
def test_every_document_is_there_once_with_its_exact_ids_and_mask(kind, run, tokenizer, huggingface, tmp_path):
    tokenizer = tokenizer if kind == "sentencepiece" else huggingface(kind)
    rows = corpus(500)
    done = run(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer)
    wanted = expected(tokenizer, rows, 129)
    assert documents(done.store) == wanted
    assert done.chunks > 3 and done.tokens == sum(len(ids) for ids, _ in wanted.values())
    for index in range(len(done.store)):
        pack = done.store.pack(index)
        assert len(pack.ids) - len(pack.starts) <= 128
    counts = done.store.meta["counts"]
    assert counts["records"] == 500 and counts["kept"] == len(wanted) == done.store.meta["documents"]
    assert counts["trained_tokens"] == sum(sum(mask[1:]) for _, mask in wanted.values())
    assert counts["truncated"] > 0 and counts["empty"] + counts["kept"] == 500
    assert not (tmp_path / "packs.chunks").exists()


def test_the_bytes_depend_neither_on_processes_nor_on_chunks(run, tmp_path):
    file = write(tmp_path / "a.jsonl", corpus(600))
    first = run(file, output="1")
    assert first.chunks > 3
    for name, options in {"2": {"workers": 2}, "3": {"workers": 3}, "whole": {"chunk_bytes": 1 << 30}}.items():
        run(file, output=name, **options)
        assert files(tmp_path / name) == files(tmp_path / "1")
    assert files(tmp_path / "1").keys() >= {".bin", ".idx", ".mask.bin", ".json", ".report.txt"}
    mixed = run(file, output="seed", seed=5)
    assert documents(mixed.store) == documents(first.store)
    assert files(tmp_path / "seed")[".bin"] != files(tmp_path / "1")[".bin"]


def test_compressed_files_and_parquet_give_the_same_documents(run, tokenizer, tmp_path):
    rows = corpus(300)
    lines = write(tmp_path / "a.jsonl", rows).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf\n" + lines))  # a blank line first
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=70)
    done = run(tmp_path / "b.jsonl.gz", tmp_path / "c.parquet", workers=2, output="both")
    zipped, table = (expected(tokenizer, rows, 129, name) for name in ("b.jsonl.gz", "c.parquet"))
    zipped = {(name, line + 1, source): value for (name, line, source), value in zipped.items()}
    assert documents(done.store) == zipped | table and done.chunks > 5
    assert done.store.meta["sources"] == ["web", "books"] or done.store.meta["sources"] == ["books", "web"]
    few = run(tmp_path / "b.jsonl.gz", tmp_path / "c.parquet", output="few", limit=310)
    assert few.store.meta["counts"]["records"] == 310
    assert [line for name, line, _ in documents(few.store) if name == "c.parquet" and line > 10] == []


def test_megatrons_indexed_dataset_reads_the_packs(run, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    store = run(write(tmp_path / "a.jsonl", corpus(200))).store
    for mmap in (True, False):
        theirs = IndexedDataset(str(tmp_path / "packs"), mmap=mmap)
        assert len(theirs) == len(store) and theirs.document_indices.tolist() == list(range(len(store) + 1))
        for index in range(len(store)):
            assert np.array_equal(theirs[index], store.pack(index).ids)
        assert theirs.sequence_lengths.tolist() == [len(store.pack(i).ids) for i in range(len(store))]
        assert np.array_equal(theirs.get(1, offset=2, length=3), store.pack(1).ids[2:5])


def test_weights_and_brought_tokens_are_kept(run, tokenizer, tmp_path):
    rows = corpus(50)
    rows[7]["messages"][1]["loss"] = 0.25
    ids, mask = [5, 6, 7, 8], [0, 1, 0, 1]
    rows[9] |= {"token_ids": ids, "loss_mask": mask}
    done = run(write(tmp_path / "a.jsonl", rows), chunk_bytes=2000)
    found = documents(done.store)
    del rows[7]["messages"][1]["loss"]
    wanted = expected(tokenizer, rows, 129)
    seventh = next(key for key in wanted if key[1] == 8)
    ninth = next(key for key in wanted if key[1] == 10)
    assert found.pop(ninth) == (ids, mask) and wanted.pop(ninth)
    found_ids, weights = found.pop(seventh)
    wanted_ids, wanted_mask = wanted.pop(seventh)
    spans = 1 if len(rows[7]["messages"]) == 2 else 2
    assert found_ids == wanted_ids and [w > 0 for w in weights] == [m > 0 for m in wanted_mask]
    assert set(weights) == ({0.0, 0.25} if spans == 1 else {0.0, 0.25, 1.0})
    assert found == wanted
    one, again = done.store.pack(0), done.store.pack(0)
    assert np.shares_memory(one.weights, again.weights), "a view: a stage that needs no weights reads none"
    assert done.store.meta["weighted"] and not (tmp_path / "packs.mask.bin").exists()
    assert done.store.meta["counts"]["weighted"] == done.store.meta["counts"]["pretokenized"] == 1
    last = run(write(tmp_path / "b.jsonl", corpus(50)), output="last", last_turn_only=True)
    spans = [np.diff(np.array(mask), prepend=0).tolist().count(1) for _, mask in documents(last.store).values()]
    assert set(spans) == {1} and any(len(row["messages"]) == 4 for row in corpus(50))


def test_long_documents_are_cut_dropped_or_refused(run, tokenizer, tmp_path):
    rows = corpus(100)
    file = write(tmp_path / "a.jsonl", rows)
    whole = expected(tokenizer, rows, None)
    long = [line for (_, line, _), (ids, _) in whole.items() if len(ids) > 65]
    assert 5 < len(long) < 95
    dropped = run(file, output="drop", seq_length=64, truncation="drop")
    assert documents(dropped.store) == {key: value for key, value in whole.items() if len(value[0]) <= 65}
    assert dropped.store.meta["counts"]["dropped"] == len(long) and f"{len(long):,}" in dropped.report
    with pytest.raises(RecordError, match=rf"a\.jsonl, line {long[0]}, messages: \d+ tokens are more than seq_length"):
        run(file, output="error", seq_length=64, truncation="error", workers=2, chunk_bytes=2000)


def test_padding_of_documents_has_room_in_the_packs(run, tmp_path):
    store = run(write(tmp_path / "a.jsonl", corpus(200)), pad_multiple=8).store
    for index in range(len(store)):
        sizes = np.array([tokens.stop - tokens.start - 1 for tokens in store.pack(index).documents()])
        assert int((-(-sizes // 8) * 8).sum()) <= 128
    with pytest.raises(InputError, match="seq_length 128 is no multiple of pad_multiple 24"):
        run(tmp_path / "a.jsonl", pad_multiple=24)


def test_what_was_skipped_before_stops_a_run_that_is_to_stop(run, tmp_path):
    rows = corpus(400)
    rows[0] = b"{broken"
    file = write(tmp_path / "a.jsonl", rows)
    prepared = run(file, bad_records="skip", chunk_bytes=4000, keep_chunks=True)
    assert prepared.store.meta["counts"]["bad"] == 1
    (tmp_path / "packs.json").unlink()  # as if it had been killed before the last file
    with pytest.raises(RecordError, match=r"a\.jsonl, line 1: not JSON"):
        run(file, chunk_bytes=4000)


def test_the_first_bad_record_is_named_and_skipping_goes_on_from_there(run, tokenizer, tmp_path):
    rows = corpus(400)
    rows[350], rows[251] = b"{broken", {"messages": [{"role": "nobody", "content": "x"}]}
    rows[90] = {"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}]}
    file = write(tmp_path / "a.jsonl", rows)
    for workers in (1, 3):
        with pytest.raises(RecordError, match=r"a\.jsonl, line 91, messages: .*function_call"):
            run(file, workers=workers, chunk_bytes=4000)
    finished = len(list((tmp_path / "packs.chunks").glob("chunk-*.json")))
    assert finished > 0 and not (tmp_path / "packs.json").exists()
    with pytest.raises(InputError, match="is not finished"):
        PackedStore(tmp_path / "packs")
    done = run(file, bad_records="skip", chunk_bytes=4000)
    assert done.resumed_chunks == finished and done.store.meta["counts"]["bad"] == 3
    errors = [json.loads(line) for line in (tmp_path / "packs.errors.jsonl").read_text().splitlines()]
    assert [error["line"] for error in errors] == [91, 252, 351] and "nobody" in errors[1]["raw"]
    assert str(tmp_path / "packs.errors.jsonl") in done.report
    run(file, output="afresh", bad_records="skip")
    assert files(tmp_path / "packs") == files(tmp_path / "afresh")
    with pytest.raises(InputError, match=r"no record is left(.|\n)*bad, skipped +1\n"):
        run(write(tmp_path / "b.jsonl", [b"{"]), output="none", bad_records="skip")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_refused_input_leaves_nothing_in_the_way_of_the_mended_one(run, tmp_path, workers):
    rows = corpus(20)
    with pytest.raises(RecordError, match="line 1, text"):
        run(write(tmp_path / "a.jsonl", [{"text": "x"}, *rows]), workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert run(write(tmp_path / "a.jsonl", rows), workers=workers).store.meta["documents"] == 20
    with pytest.raises(RecordError):  # but what is finished is kept
        run(write(tmp_path / "b.jsonl", [*corpus(100), {"text": "x"}]), output="b", chunk_bytes=2000, workers=workers)
    assert (tmp_path / "b.chunks").exists()


def test_a_damaged_file_is_named(run, tmp_path):
    whole = gzip.compress(write(tmp_path / "a.jsonl", corpus(300)).read_bytes())
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordError, match=r"b\.jsonl\.gz, line \d+: damaged or truncated"):
        run(tmp_path / "b.jsonl.gz")
    assert run(tmp_path / "b.jsonl.gz", bad_records="skip").store.meta["counts"]["bad"] == 1


def test_other_settings_are_refused_by_name(run, huggingface, tmp_path):
    file = write(tmp_path / "a.jsonl", corpus(60))
    done = run(file, keep_chunks=True)
    again = run(file, keep_chunks=True)
    assert again.chunks == 0 and again.report == done.report and (tmp_path / "packs.chunks").exists()
    run(file)
    assert not (tmp_path / "packs.chunks").exists()
    with pytest.raises(
        SettingsMismatch, match=r"packs\.json.*other settings:\n  seq_length: 128 in the folder, 256 now"
    ):
        run(file, seq_length=256)
    with pytest.raises(SettingsMismatch, match="tokenizer: "):
        run(file, tokenizer=huggingface("byte-level"))
    stopped = write(tmp_path / "b.jsonl", [*corpus(60), b"{"])
    with pytest.raises(RecordError):
        run(stopped, output="unfinished", chunk_bytes=4000)
    with pytest.raises(SettingsMismatch, match=r"unfinished\.chunks(.|\n)*truncation: \"truncate\" in the folder"):
        run(stopped, output="unfinished", chunk_bytes=4000, truncation="drop")
    write(stopped, corpus(60))
    with pytest.raises(SettingsMismatch, match="sources"):
        run(stopped, output="unfinished")
    (tmp_path / "theirs.bin").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"theirs\.bin is there, but no theirs\.json"):
        run(file, output="theirs")
    with pytest.raises(FileNotFoundError, match="nothing"):
        run(tmp_path / "nothing.jsonl", output="x")


def test_training_with_another_tokenizer_or_length_is_refused(run, tokenizer, sentencepiece_model, tmp_path):
    store = run(write(tmp_path / "a.jsonl", corpus(40)), pad_multiple=4).store
    store.require(tokenizer, 128)
    store.require(tokenizer, 128, pad_multiple=2)
    with pytest.raises(InputError, match=r"(?s)tokenizer or chat template: fingerprint .*--chat-template"):
        store.require(load_tokenizer(sentencepiece_model, "plain"), 128)
    with pytest.raises(InputError, match="the sequence length: 128 in the packs, 256 now"):
        store.require(tokenizer, 256)
    with pytest.raises(InputError, match="a multiple of 4 in the packs, of 8 now"):
        store.require(tokenizer, 128, pad_multiple=8)
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again.pack(0).ids, store.pack(0).ids) and len(again) == len(store)
    with pytest.raises(IndexError):
        store.pack(len(store))
    for suffix in (".bin", ".idx", ".mask.bin", ".starts.bin", ".records.bin"):
        path = tmp_path / f"packs{suffix}"
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(InputError, match=f"packs{suffix} should hold"):
            PackedStore(tmp_path / "packs")
        path.write_bytes(content)
    meta = json.loads((tmp_path / "packs.json").read_text())
    for values, words in (({"format": 99}, "format 99"), ({"kind": "?"}, "another program")):
        (tmp_path / "packs.json").write_text(json.dumps(meta | values))
        with pytest.raises(InputError, match=words):
            PackedStore(tmp_path / "packs")


def test_memory_does_not_grow_with_the_corpus(run, tmp_path):
    row = json.dumps({"prompt": "what is this", "response": "hello world " * 60}).encode()
    file = write(tmp_path / "a.jsonl", [row] * 400)
    few = [run(file, output=f"few-{again}", chunk_bytes=100_000) for again in range(3)]
    many = run(write(tmp_path / "b.jsonl", [row] * 4000), output="many", chunk_bytes=100_000)
    whole = [run(tmp_path / "b.jsonl", output=f"whole-{again}", chunk_bytes=1 << 30) for again in range(2)]
    assert many.chunks >= 7 * few[0].chunks
    # More than half of what a process holds are pages of its libraries, which the kernel takes away and brings back as
    # it likes: a run may show less than another, never more. What grows, grows in each.
    least, most = (max(done.peak_worker_bytes for done in runs) for runs in (few, whole))
    assert many.peak_worker_bytes < least + (5 << 20), (few, many)
    assert most > least + (10 << 20)  # so the measure measures


def test_the_report_says_what_was_met(run, tmp_path):
    rows = corpus(300)
    done = run(write(tmp_path / "a.jsonl", rows))
    numbers = json.loads((tmp_path / "packs.report.json").read_text())
    assert sum(row["records"] for row in numbers["lengths"]) == 300
    assert sum(row["documents"] for row in numbers["per_source"].values()) == done.store.meta["documents"]
    assert numbers["per_source"]["web"]["records"] == sum(row["source"] == "web" for row in rows)
    tokens = done.store.meta["tokens"] - done.store.meta["documents"]
    assert numbers["efficiency"] == pytest.approx(tokens / (128 * len(done.store)))
    compared = numbers["compared"]
    assert compared["best_fit_decreasing"] == numbers["efficiency"] >= compared["first_fit"]
    assert compared["one_record_per_pack"] == pytest.approx(tokens / (128 * done.store.meta["documents"]))
    for words in ("records read", "trained tokens", "best-fit", "web", "by source"):
        assert words in done.report


def test_the_command_shows_samples_and_ends_as_it_should(sentencepiece_model, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "hello", "response": "world"}] * 30)
    words = (
        f"--data {file} --output {tmp_path}/out/packs --tokenizer-model {sentencepiece_model} --chat-template chatml"
    )

    def command(*more, tool=("-m", "megatron_idft", "prepare")):
        line = [sys.executable, *tool, *words.split(), "--seq-length", "64", "--workers", "1", *more]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)

    dry = command("--dry-run")
    assert dry.returncode == 0 and not (tmp_path / "out").exists()
    assert dry.stdout.count("⟦world<|im_end|>⟧") == 3 and "line 2" in dry.stdout, dry
    done = command("--show", "2", tool=("tools/prepare_data.py",))
    assert done.returncode == 0 and "pack 1:" in done.stdout and "pack 2:" not in done.stdout, done
    assert "⟦world<|im_end|>⟧" in done.stdout and "records read" in done.stdout and "tokens/s" in done.stderr
    refused = command("--seq-length", "32")
    assert refused.returncode == 2 and "seq_length: 64 in the folder, 32 now" in refused.stderr
    unknown = command("--data", "nowhere.jsonl")
    assert unknown.returncode == 2 and "nowhere.jsonl" in unknown.stderr


def test_processes_import_neither_torch_nor_transformers():
    imported = "megatron_idft.data.packed.encoding_process"
    code = f"import sys, {imported}; print(*{{'torch', 'transformers', 'megatron'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and done.stdout.strip() == ""
