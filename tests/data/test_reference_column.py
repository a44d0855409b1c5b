"""The column of a reference model: every trained token gets its own number from scores of any origin, or an error."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_idft.cli import prepare as prepare_verb
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare
from megatron_idft.data.packed.records import tokenize_records
from megatron_idft.data.packed.store import PackedStore
from megatron_idft.data.reference.columns import ReferenceColumns
from megatron_idft.data.reference.settings import ReferenceSettings
from megatron_idft.errors import ArgumentError, InputError, RecordError, SettingsMismatch
from tests.data.prepared_files import corpus, files, write
from tests.data.reference_scores import TOP_K, entropy, foreign_rows, log_prob, tops, write_lines, write_scores

ROOT = Path(__file__).parents[2]
ALL = ReferenceColumns(entropy=True, top_k=3)


@pytest.fixture
def run(tokenizer, tmp_path):
    def run(file, scores, columns=ReferenceColumns(), output="packs", workers=0, keep_chunks=False, **options):  # noqa: B008
        options = {"seq_length": 128, "chunk_bytes": 20_000} | options
        files = [file] if isinstance(file, Path) else file
        reference = None if scores is None else ReferenceSettings(str(scores), columns)
        settings = PrepareSettings(tuple(map(str, files)), reference=reference, **options)
        return prepare(settings, tokenizer, tmp_path / output, workers=workers, keep_chunks=keep_chunks, progress=False)

    return run


@pytest.fixture(scope="module")
def scored(tokenizer, tmp_path_factory):
    """400 conversations, some longer than a sequence of 128, and their scores."""
    folder = tmp_path_factory.mktemp("scored")
    file = write(folder / "a.jsonl", corpus(400))
    return file, write_scores(folder / "scores", tokenizer, file)


def check(store, columns=ReferenceColumns(), exact=True):  # noqa: B008
    """Every token of every document has the formula's number where it is trained, and else 0."""
    tokens = 0
    for index in range(len(store)):
        pack = store.pack(index)
        assert set(pack.reference) == set(columns.shapes)
        for document in pack.documents():
            ids, mask = pack.ids[document], pack.mask[document].astype(bool)
            mask[0] = False
            places = np.arange(len(ids))
            wanted = {"log_prob": log_prob(ids, places), "entropy": entropy(ids, places)}
            wanted["top_ids"], wanted["top_log_prob"] = (top[:, : columns.top_k] for top in tops(ids, places))
            for name in columns.shapes:
                got = pack.reference[name][document]
                assert got.dtype == columns.dtype_of(name) and not got[~mask].any()
                np.testing.assert_allclose(got[mask], wanted[name][mask], rtol=0 if exact else 2**-11, err_msg=name)
            tokens += int(mask.sum())
    assert tokens == store.meta["counts"]["trained_tokens"] > 1000
    return tokens


@pytest.mark.parametrize("packing", [True, False])
def test_scores_of_score_reach_their_tokens_and_the_bytes_do_not_depend_on_processes(run, scored, tmp_path, packing):
    file, scores = scored
    columns = ReferenceColumns(entropy=True)
    done = run(file, scores, columns, output="0", packing=packing)
    check(done.store, columns)
    assert done.store.meta["counts"]["truncated"] > 0 and done.chunks > 3
    for workers in (1, 3):
        run(file, scores, columns, output=str(workers), workers=workers, packing=packing)
        assert files(tmp_path / str(workers)) == files(tmp_path / "0")
    reference = done.store.meta["reference"]
    assert reference["model"] == "Base-8B" and reference["recorded"]["checkpoint"] == "c0ffee"
    sums = sum(
        float(done.store.pack(index).reference["log_prob"].sum(dtype=np.float64)) for index in range(len(done.store))
    )
    mean = sums / done.store.meta["counts"]["trained_tokens"]
    assert reference["log_prob_mean"] == pytest.approx(mean, rel=1e-9)
    assert f"{mean:.4f}" in done.report and "Base-8B" in done.report
    again = run(file, scores, columns, output="0", packing=packing)
    assert again.chunks == 0 and again.report == done.report


def test_packs_without_a_reference_are_what_they_were(run, scored, tmp_path):
    file, scores = scored
    plain = run(file, None, output="plain")
    run(file, scores, output="reference")
    without, beside = files(tmp_path / "plain"), files(tmp_path / "reference")
    differs = {name for name in beside if beside[name] != without.get(name)}
    assert differs == {".reference.bin", ".json", ".report.json", ".report.txt"} and plain.store.reference is None
    meta = json.loads(without[".json"])
    assert "reference" not in meta and "reference" not in meta["settings"]
    assert "reference" not in json.loads(without[".report.json"])
    assert not any(plain.store.pack(index).reference for index in range(len(plain.store)))


def test_records_are_found_by_their_text_wherever_they_stand_now(run, scored, tokenizer, tmp_path):
    """Selected, shuffled, twice there, in Parquet, with another source."""
    _, scores = scored
    rows = corpus(400)
    random.Random(1).shuffle(rows)
    kept = [row | {"source": "chosen"} for row in rows[:150]]
    lines = write(tmp_path / "chosen.jsonl", [*kept, *kept[:20]])
    pq.write_table(pa.Table.from_pylist(rows[150:200]), tmp_path / "table.parquet")
    done = run([lines, tmp_path / "table.parquet"], scores)
    check(done.store)
    assert done.store.meta["counts"]["records"] == 220


def test_weighted_records_and_brought_tokens_have_their_numbers(run, tokenizer, tmp_path):
    rows = corpus(40)
    rows[7]["messages"][1]["loss"] = 0.25
    texts = {"prompt": "hello", "response": "world"}
    for ids in ([5, 6, 7, 8], [5, 6, 9, 8]):  # of one text, each with its own tokens
        rows.append(texts | {"token_ids": ids, "loss_mask": [0, 1, 0.5, 1]})
    file = write(tmp_path / "a.jsonl", rows)
    done = run(file, write_scores(tmp_path / "scores", tokenizer, file))
    assert done.store.meta["weighted"] and done.store.meta["counts"]["pretokenized"] == 2
    check(done.store)


def test_float16_is_as_far_off_as_documented(run, scored, tokenizer, tmp_path):
    file, scores = scored
    check(
        run(file, scores, ReferenceColumns(entropy=True, dtype="float16")).store,
        ReferenceColumns(True, 0, "float16"),
        False,
    )
    exact, half = run(file, scores, output="exact").store, PackedStore(tmp_path / "packs")
    errors = []
    for index in range(len(exact)):
        wanted, got = (store.pack(index).reference["log_prob"].astype(np.float64) for store in (exact, half))
        errors.append(np.abs(got - wanted)[wanted < 0] / -wanted[wanted < 0])
    worst = np.concatenate(errors).max()
    assert 2**-12 < worst <= 2**-11
    assert (tmp_path / "packs.reference.bin").stat().st_size == 2 * half.meta["tokens"]
    one = write(tmp_path / "one.jsonl", [{"prompt": "a", "response": "b"}])
    tokens = exact_tokens(tokenizer, {"prompt": "a", "response": "b"})
    rows = [{"file": "one.jsonl", "line": 1, "token_ids": tokens, "log_prob": [-1e6] + [-1e-9] * (len(tokens) - 1)}]
    low = run(one, write_lines(tmp_path / "low.jsonl", rows), ReferenceColumns(dtype="float16"), output="low").store
    assert low.pack(0).reference["log_prob"].min() == -65504 and low.meta["reference"]["dtype"] == "float16"


def exact_tokens(tokenizer, row):
    """The trained ids of a record."""
    from megatron_idft.data.chat.conversations import encode_conversation

    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    ids, mask = encode_conversation(tokenizer, messages)
    return ids[mask == 1].tolist()


# ---- other engines


def as_parquet(folder, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / "theirs.parquet", row_group_size=len(rows))
    return folder / "theirs.parquet"


def as_nested_lines(folder, rows):
    for row in rows:
        for key in ("top_token_ids", "top_log_prob"):
            row[key] = [row[key][at : at + TOP_K] for at in range(0, len(row[key]), TOP_K)]
    return write_lines(folder / "theirs.jsonl", rows)


def by_order(folder, rows):
    """Without positions, and with the K of each token in another order."""
    for row in rows:
        del row["positions"]
        for key in ("top_token_ids", "top_log_prob"):
            row[key] = np.array(row[key]).reshape(-1, TOP_K)[:, ::-1].ravel().tolist()
    random.Random(2).shuffle(rows)
    return write_lines(folder / "theirs.jsonl", rows)


@pytest.mark.parametrize("form", [as_parquet, as_nested_lines, by_order])
def test_scores_of_another_engine_give_the_same_bytes(run, scored, tmp_path, form):
    file, scores = scored
    theirs = form(tmp_path, foreign_rows(scores))
    done = run(file, theirs, ALL, output="0")
    check(done.store, ALL)
    run(file, theirs, ALL, output="2", workers=2)
    assert files(tmp_path / "2") == files(tmp_path / "0")
    assert "theirs" in done.store.meta["reference"]["model"] and done.store.meta["reference"]["recorded"] == {}
    run(file, scores, output="ours")
    assert files(tmp_path / "ours")[".reference.bin"] == files(tmp_path / "0")[".reference.bin"]


def test_records_of_another_engine_are_known_by_their_id(run, tokenizer, tmp_path):
    rows = [{"prompt": "a", "response": f"b {number}", "id": f"r{number}"} for number in range(300)]
    file = write(tmp_path / "a.jsonl", rows)
    theirs = []
    for row in reversed(rows):
        ids = np.array(exact_tokens(tokenizer, row))
        theirs.append({"id": row["id"], "token_ids": ids.tolist(), "log_prob": log_prob(ids, 0 * ids).tolist()})
    store = run(file, write_lines(tmp_path / "theirs.jsonl", theirs)).store
    for index in range(len(store)):
        pack = store.pack(index)
        trained = pack.mask.astype(bool)
        assert np.array_equal(pack.reference["log_prob"][trained], log_prob(pack.ids[trained], 0 * pack.ids[trained]))


# ---- in the records


@pytest.mark.parametrize("length", ["all", "trained"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_records_bring_their_own_numbers(run, scored, tokenizer, tmp_path, length, suffix):
    file, scores = scored
    cache = {row["line"]: row for row in foreign_rows(scores)}
    plain = run(file, None, output="plain", seq_length=4096, packing=False).store  # uncut
    rows = []
    for index, row in enumerate(corpus(400)):
        if index + 1 not in cache:
            continue
        pack = plain.pack(index)
        places = np.arange(len(pack.ids))
        values = log_prob(pack.ids, places).tolist()
        values[0] = None
        trained = np.flatnonzero(pack.mask)
        own = {"reference_log_prob": values, "reference_entropy": entropy(pack.ids, places).tolist()}
        own["reference_token_ids"] = pack.ids.tolist()
        if length == "trained":
            own = {key: [value[at] for at in trained.tolist()] for key, value in own.items()}
        rows.append(row | own)
    path = tmp_path / f"own{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(path, rows)
    columns = ReferenceColumns(entropy=True)
    done = run(path, "records", columns, output="0")
    check(done.store, columns)
    assert done.store.meta["counts"]["truncated"] > 0
    run(path, "records", columns, output="2", workers=2)
    assert files(tmp_path / "2") == files(tmp_path / "0")


# ---- what is refused


def spoiled(scores, tmp_path, change):
    """The lines of another engine, with one row changed."""
    rows = foreign_rows(scores)
    change(rows[2])
    return write_lines(tmp_path / "theirs.jsonl", rows)


REFUSED = [
    (lambda row: row["log_prob"].__setitem__(1, 0.5), "log_prob of .*0.5 at position .* no log-probability"),
    (lambda row: row["log_prob"].__setitem__(0, float("nan")), "nan at position"),
    (lambda row: row["log_prob"].__setitem__(0, float("-inf")), "-inf at position"),
    (lambda row: row["log_prob"].__setitem__(0, None), "nan at position"),
    (lambda row: row["entropy"].__setitem__(0, -1.0), "entropy of .*no entropy"),
    (lambda row: row.pop("entropy"), "entropy of .*missing, but --sft-reference-entropy asks"),
    (
        lambda row: row["token_ids"].__setitem__(2, 1),
        "token_ids of .*the scores have token 1 at .*another tokenizer",
    ),
    (lambda row: row["positions"].__setitem__(-1, row["positions"][-1] + 5), "1 of .* trained tokens have no score"),
    (lambda row: row["positions"].__setitem__(1, 0), "rising positions"),
    (lambda row: row.update(line=4711), "no row has file 'a.jsonl' and line 3, or the id"),
    (lambda row: row.pop("line"), r"theirs\.jsonl, line 3, file: does not say whose"),
    (lambda row: row.pop("token_ids"), r"theirs\.jsonl, line 3, token_ids: missing"),
    (lambda row: row["log_prob"].pop(), r"theirs\.jsonl, line 3, log_prob: as many numbers"),
    (lambda row: row.update(log_prob="high"), r"theirs\.jsonl, line 3, log_prob: expected a list of numbers"),
    (lambda row: row["top_log_prob"].pop(), "top_log_prob of .*expected K of both for each"),
    (lambda row: row["top_log_prob"].__setitem__(0, -0.0), "add up to more than 1"),
    (lambda row: row["top_token_ids"].__setitem__(0, row["top_token_ids"][1]), "come twice"),
    (
        lambda row: (row.pop("top_log_prob"), row.pop("top_token_ids")),
        "0 a token, fewer than",
    ),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_a_number_that_is_missing_or_cannot_be_right_names_its_record(run, scored, tmp_path, change, reason):
    file, scores = scored
    theirs = spoiled(scores, tmp_path, change)
    with pytest.raises(RecordError, match=reason) as refused:
        run(file, theirs, ALL)
    if "theirs" not in reason:
        assert "a.jsonl, line 3, " in str(refused.value)
        assert [path for path in tmp_path.iterdir() if path.name.startswith("packs")] == []
        skipped = run(file, theirs, ALL, bad_records="skip")
        assert skipped.store.meta["counts"]["bad"] == 1
        check(skipped.store, ALL)


def test_a_record_whose_text_has_changed_since_has_no_score(run, scored, tokenizer, tmp_path):
    _, scores = scored
    rows = corpus(400)
    rows[5]["messages"][0]["content"] = rows[5]["messages"][0]["content"][::-1]  # as long, and of no trained token
    with pytest.raises(RecordError, match=r"b\.jsonl, line 6, log_prob of .*no conversation with this text was scored"):
        run(write(tmp_path / "b.jsonl", rows), scores)
    rows[2] = rows[9] = b"{broken"
    skipped = run(write(tmp_path / "b.jsonl", rows), scores, bad_records="skip", chunk_bytes=1 << 20)
    errors = [json.loads(line) for line in (tmp_path / "packs.errors.jsonl").read_text().splitlines()]
    assert [error["line"] for error in errors] == [3, 6, 10] and skipped.store.meta["counts"]["bad"] == 3


def test_scores_of_another_tokenizer_length_mask_or_program_are_refused(run, scored, tokenizer, tmp_path):
    file, scores = scored
    other = write_scores(tmp_path / "other", tokenizer, file, recorded={"tokenizer": "f" * 64})
    with pytest.raises(InputError, match=r"other: these scores were made with another tokenizer .* ffffffffffffffff…"):
        run(file, other)
    older = write_scores(tmp_path / "older", tokenizer, file)
    manifest = json.loads((older / "manifest.json").read_text())
    for key in ("tokenizer", "seq_length", "last_turn_only", "checkpoint"):
        del manifest["settings"][key]
    (older / "manifest.json").write_text(json.dumps(manifest))
    check(run(file, older, output="older-packs").store)  # it does not say: its tokens do
    short = write_scores(tmp_path / "short", tokenizer, file, seq_length=100)
    with pytest.raises(RecordError, match="they were cut at a shorter --seq-length; score again with this one"):
        run(file, short)
    check(run(file, scores, output="shorter", seq_length=64).store)  # the other way is no fault
    last = write_scores(tmp_path / "last", tokenizer, file, last_turn_only=True)
    with pytest.raises(RecordError, match="with --sft-last-turn-only"):
        run(file, last)
    run(file, scores, output="last-packs", last_turn_only=True)
    with pytest.raises(InputError, match=r"\d+ of \d+ chunks are scored. Start the same `score`"):
        run(file, write_scores(tmp_path / "begun", tokenizer, file, finished=False))
    with pytest.raises(InputError, match=r"holds the 0 most probable .* --reference-top-k 3"):
        run(file, scores, ALL)
    for name, reason in (("nowhere", "no such file or folder"), ("", "holds no manifest.json")):
        with pytest.raises(InputError, match=reason):
            run(file, tmp_path / name)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(RecordError, match=r"broken\.parquet, row 1: damaged Parquet file"):
        run(file, tmp_path / "broken.parquet")
    realigned = write_scores(tmp_path / "realigned", tokenizer, file, recorded={"tokens": None})
    manifest = json.loads((realigned / "manifest.json").read_text())
    del manifest["settings"]["tokens"]
    (realigned / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="belongs to another program than `score`"):
        run(file, realigned)
    with pytest.raises(InputError, match="must be one of"):
        ReferenceSettings("x", ReferenceColumns(dtype="bfloat16"))


def test_another_reference_is_refused_for_the_same_output(run, scored, tokenizer, tmp_path):
    file, scores = scored
    other = write_scores(tmp_path / "other", tokenizer, file, recorded={"model": "/models/other"})
    run(file, scores)
    for columns, where, difference in (
        (ReferenceColumns(), other, "reference: "),
        (ReferenceColumns(entropy=True), scores, "reference: "),
        (ReferenceColumns(), None, "reference: "),
    ):
        with pytest.raises(SettingsMismatch, match=difference):
            run(file, where, columns)
    moved = Path(shutil.copytree(scores, tmp_path / "moved"))
    assert run(file, moved).chunks == 0, "copied scores are the same"


def test_the_cache_of_records_follows_the_reference(scored, tokenizer, tmp_path):
    file, scores = scored
    made = []
    for reference in (None, ReferenceSettings(str(scores)), ReferenceSettings(str(scores), ReferenceColumns(True))):
        for packing in (False, True):
            settings = PrepareSettings((str(file),), 128, packing=packing, reference=reference)
            records = tokenize_records(settings, tokenizer, tmp_path / "cache", progress=False)
            made.append(records.path)
            if reference is not None:
                check(records, reference.columns)
    assert len(set(made)) == 6


PREPARE = """
import sys
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare
from megatron_idft.data.reference.columns import ReferenceColumns
from megatron_idft.data.reference.settings import ReferenceSettings
model, records, scores, output = sys.argv[1:]
reference = ReferenceSettings(scores, ReferenceColumns(entropy=True, top_k=3))
settings = PrepareSettings((records,), 128, chunk_bytes=20_000, reference=reference)
prepare(settings, load_tokenizer(model, "chatml"), output, workers=2, progress=False)
"""


def test_killed_again_and_again_it_ends_with_the_same_bytes(run, sentencepiece_model, tokenizer, tmp_path):
    file = write(tmp_path / "a.jsonl", corpus(1500))
    theirs = write_lines(tmp_path / "theirs.jsonl", foreign_rows(write_scores(tmp_path / "scores", tokenizer, file)))
    run(file, theirs, ALL, output="undisturbed")
    chunks, rng = tmp_path / "killed.chunks", random.Random(0)
    moments = [
        lambda: any((chunks / "reference").glob("chunk-*.parquet")),
        lambda: len(list(chunks.glob("chunk-*.json"))) >= 3,
        lambda: any(chunks.glob("assembling-*")),
    ]
    for moment in moments:
        words = map(str, (sentencepiece_model, file, theirs, tmp_path / "killed"))
        process = subprocess.Popen([sys.executable, "-c", PREPARE, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not moment():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    run(file, theirs, ALL, output="killed")
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed") and not chunks.exists()


def test_the_verb_takes_both_spellings(scored, sentencepiece_model, tmp_path, capsys):
    file, scores = scored
    words = f"--data {file} --tokenizer-model {sentencepiece_model} --chat-template chatml --seq-length 128 --workers 0"
    words = [*words.split(), "--no-progress", "--output"]
    assert prepare_verb.main([*words, f"{tmp_path}/a", "--reference", str(scores), "--reference-entropy"]) == 0
    assert "reference model's mean log q" in capsys.readouterr().out
    check(PackedStore(tmp_path / "a"), ReferenceColumns(entropy=True))
    assert prepare_verb.main([*words, f"{tmp_path}/b", "--sft-reference", str(scores)]) == 0
    check(PackedStore(tmp_path / "b"))
    with pytest.raises(ArgumentError, match="name its SCORES"):
        prepare_verb.main([*words, f"{tmp_path}/c", "--sft-reference-entropy"])
