"""`score`: a checkpoint that the trainer wrote, under any layout, in any number of launches; killed and resumed."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_idft.corpus.ledger.ledger import status_of
from megatron_idft.corpus.scored_folder import OWN_SAMPLES, read_own_samples
from tests.held_chunk import lines_of_one_that_waits
from tests.integration.scoring_probe import masks
from tests.launch import ROOT, forked, forking_python, start
from tests.tiny_corpora import additions, write_records
from tests.tiny_tokenizers import train_tokenizer

MODEL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 48 --max-position-embeddings 48
    --position-embedding-type rope --chat-template chatml
"""
PROBE = str(Path(__file__).with_name("scoring_probe.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Additions, a tokenizer, and a model that has learned to answer in their form."""
    folder = tmp_path_factory.mktemp("score")
    records = additions(60, [1, 2])
    for number, record in enumerate(records):
        record |= {"source": "even" if number % 2 == 0 else "odd", "kept": number}
    write_records(folder / "train.jsonl", records)
    train_tokenizer(folder)
    flags = f"{MODEL} --sft-data {folder / 'train.jsonl'} --tokenizer-model {folder / 'tokenizer.model'}"
    flags += f" --train-iters 60 --micro-batch-size 4 --global-batch-size 8 --lr 1e-2 --save {folder / 'model'}"
    forked(["-m", "megatron_idft", "train", *flags.split(), "--lr-decay-style", "constant"])
    return folder


def flags(folder: Path, output: Path | str, more: str = "") -> list[str]:
    words = f"{MODEL} --data {folder / 'train.jsonl'} --tokenizer-model {folder / 'tokenizer.model'}"
    return f"{words} --load {folder / 'model'} --output {output} {more}".split()


def score(folder: Path, output: Path, more: str = "", nproc: int = 1) -> list[dict]:
    forked(["-m", "megatron_idft", "score", *flags(folder, output, more)], nproc=nproc)
    return pq.read_table(output / "scores.parquet").to_pylist()


@pytest.fixture(scope="module")
def scored(folder) -> list[dict]:
    return score(folder, folder / "whole", "--per-token")


def test_statistics_are_those_of_the_whole_logits_under_every_layout(folder, tmp_path):
    layouts = {
        "one": (1, ""),
        "small batches": (1, "--tokens-per-batch 1"),
        "tp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        "pp": (2, "--pipeline-model-parallel-size 2 --tokens-per-batch 60"),
        "dp": (2, "--tokens-per-batch 100"),
    }
    found = {}
    for name, (nproc, more) in layouts.items():
        out = tmp_path / f"{name}.npz"
        forked([PROBE, out, *flags(folder, tmp_path, f"{more} --reference-top-k 5")], nproc=nproc)
        found[name] = np.load(out)
    keys = [key for key in found["one"].files if key.startswith("found")]
    assert len(keys) == 18
    for name, arrays in found.items():
        for key in keys:
            expected = found["one"][key.replace("found", "expected")]
            np.testing.assert_allclose(arrays[key], expected, rtol=1e-5, atol=5e-6, err_msg=f"{name}, {key}")
            read = masks()[int(key.removeprefix("found")) // 2][1:]
            masked = arrays[key.replace("found", "masked")]
            np.testing.assert_allclose(masked[read], expected[read], rtol=1e-5, atol=5e-6, err_msg=f"{name}, {key}")
            # Under sequence parallelism every place has its logits made.
            assert name == "tp" or np.isnan(masked[~read]).all(), f"{name}, {key}"
        for i, read in enumerate(mask[1:] for mask in masks()):
            whole, ids, top = (
                found["one"][f"whole{i}"][read],
                arrays[f"top{2 * i}"][read],
                arrays[f"top{2 * i + 1}"][read],
            )
            np.testing.assert_allclose(top, -np.sort(-whole, -1)[:, :5], rtol=1e-5, atol=5e-6, err_msg=f"{name}, {i}")
            np.testing.assert_allclose(top, np.take_along_axis(whole, ids, -1), rtol=1e-5, atol=5e-6)
        assert arrays["one_row"], f"{name}: local attention on the CPU needs no padding"


def test_every_record_is_there_once_in_order_with_its_statistics(folder, scored):
    assert [row["line"] for row in scored] == list(range(1, 61)) and [row["index"] for row in scored] == list(range(60))
    assert {row["source"] for row in scored} == {"even", "odd"} and {Path(row["file"]).name for row in scored} == {
        "train.jsonl"
    }
    for row in scored:
        phi = np.array(row["log_prob"], dtype=np.float64) + np.array(row["entropy"], dtype=np.float64)
        np.testing.assert_allclose(row["phi"], phi, atol=1e-6)
        assert row["num_tokens"] == len(phi) == len(row["tokens"])
        assert row["phi_mean"] == pytest.approx(phi.mean(), abs=1e-6)
        assert row["phi_std"] == pytest.approx(phi.std(), abs=1e-6)
        assert row["phi_sum"] == pytest.approx(phi.sum(), abs=1e-5)
        assert row["phi_below_1"] == (phi < -1).mean()
        worst = [token["phi"] for token in row["worst_tokens"]]
        assert worst == pytest.approx(sorted(phi)[:5], abs=1e-6)
        assert row["ends_turn"] and not row["truncated"] and row["template_markers"] == 0
        assert row["tokens"][-1] == "<|im_end|>"


def assert_same(rows: list[dict], expected: list[dict]) -> None:
    assert [row["id"] for row in rows] == [row["id"] for row in expected]
    for name in ("phi_mean", "phi_std", "log_prob_mean", "entropy_mean", "num_tokens"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], abs=1e-5), name


@pytest.mark.parametrize("nproc,more", [(2, "--tensor-model-parallel-size 2"), (1, "--chunk-records 7")])
def test_layout_and_chunks_do_not_change_the_scores(folder, scored, tmp_path, nproc, more):
    assert_same(score(folder, tmp_path / "again", more, nproc), scored)


def test_several_launches_one_of_them_killed(folder, scored, tmp_path):
    output = tmp_path / "shared"
    command = [forking_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += ["-m", "megatron_idft", "score", *flags(folder, output, "--chunk-records 1 --lease-seconds 3")]
    launches = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for _ in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while len(list(output.glob("parts/*.parquet"))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        subprocess.run(["pkill", "-9", "-g", str(launches[0].pid)], check=True)
        assert launches[1].wait(120) == 0
    finally:
        for launch in launches:
            if launch.poll() is None:
                launch.send_signal(signal.SIGKILL)
    assert_same(pq.read_table(output / "scores.parquet").to_pylist(), scored)
    assert len(list(output.glob("parts/*.parquet"))) == 60


def test_a_launch_says_that_it_waits_for_others(folder, scored, tmp_path):
    output, more = tmp_path / "out", "--chunk-records 20 --calibrate 4 --calibrate-max-tokens 4"
    score(folder, output, more)
    words = ["-m", "megatron_idft", "score", *flags(folder, output, more)]
    for ledger, shows in (
        (output, r"scoring:  \d+%.*, 40/60 records, [\d,]+/[\d,]+ tokens, waiting for chunks that others work on"),
        (output / OWN_SAMPLES, r"own samples:  50%.*, 4/8 answers, 0 tokens here, waiting for chunks that others"),
    ):
        lines = lines_of_one_that_waits(ledger, 1, words, "waiting for", tmp_path / "shown")
        assert any(re.match(shows, line) for line in lines), lines
        done = [line for line in lines if re.match(r"(scoring|own samples): 100%", line)]
        assert done and not any("waiting" in line for line in done)
    assert_same(pq.read_table(output / "scores.parquet").to_pylist(), scored)


def test_sigterm_gives_the_chunk_back_and_the_command_goes_on(folder, scored, tmp_path):
    output = tmp_path / "out"
    words = ["-m", "megatron_idft", "score", *flags(folder, output, "--chunk-records 1")]
    launch = start(words, subprocess.DEVNULL, subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(output.glob("parts/*.parquet"))) < 3:
        assert time.monotonic() < deadline and launch.poll() is None
        time.sleep(0.002)
    launch.send_signal(signal.SIGTERM)
    _, stderr = launch.communicate(timeout=60)
    assert launch.returncode == 143 and b"the same command goes on from there" in stderr
    state = status_of(output)
    assert 3 <= state.finished < 60 and not state.leased
    assert_same(score(folder, output, "--chunk-records 1"), scored)


def test_other_settings_are_refused_on_the_same_folder(folder, scored):
    with pytest.raises(AssertionError, match="chunk_records"):
        score(folder, folder / "whole", "--chunk-records 3")


def test_a_folder_that_an_earlier_version_began_goes_on(folder, scored, tmp_path):
    """It did not record whose scores they are, nor of which length; `tokens` says that they are the same."""
    output = Path(shutil.copytree(folder / "whole", tmp_path / "out"))
    manifest = json.loads((output / "manifest.json").read_text())
    for key in ("tokenizer", "seq_length", "last_turn_only", "checkpoint"):
        assert manifest["settings"].pop(key) is not None
    (output / "manifest.json").write_text(json.dumps(manifest))
    (output / "parts" / "chunk-000000.parquet").unlink()
    assert_same(score(folder, output), scored)
    with pytest.raises(AssertionError, match="reference_top_k"):
        score(folder, output, "--reference-top-k 3")


@pytest.fixture(scope="module")
def calibrated(folder) -> tuple[Path, str]:
    """The output folder of a launch with --calibrate, and what it printed."""
    output = folder / "calibrated"
    text = forked(
        ["-m", "megatron_idft", "score", *flags(folder, output, "--calibrate 60 --calibrate-max-tokens 24 --per-token")]
    )
    return output, text


def test_own_samples_have_mean_phi_0_and_the_report_and_selection_follow(scored, folder, calibrated, tmp_path):
    output, text = calibrated
    assert "own samples at temperature 1:" in text
    for temperature, low, high in ((1.0, -4, 4), (0.3, 4, np.inf)):
        rows = read_own_samples(output)[temperature]
        assert len(rows) == 60
        sums, tokens = (np.array([row[name] for row in rows]) for name in ("phi_sum", "num_tokens"))
        mean = sums.sum() / tokens.sum()
        error = np.sqrt(((sums - mean * tokens) ** 2).sum()) / tokens.sum()
        assert low < mean / error < high, (temperature, mean, error)
    assert "decode engine" in text
    verbs = [forking_python(), "-m", "megatron_idft", "score"]
    subprocess.run([*verbs, "report", output], check=True, cwd=ROOT)
    numbers = json.loads((output / "report.json").read_text())
    assert len(numbers["corpora"]) == 1 and len(numbers["nulls"]) == 2
    chosen = tmp_path / "chosen.jsonl"
    select = [*verbs, "select", output, "--data", folder / "train.jsonl", "--output", chosen, "--keep"]
    subprocess.run([*select, "phi_mean > 0.1 and source == 'even'"], check=True, cwd=ROOT)
    kept = [json.loads(line)["kept"] for line in chosen.read_text().splitlines()]
    assert kept == [row["index"] for row in scored if row["phi_mean"] > 0.1 and row["source"] == "even"]
    assert 0 < len(kept) < 30
    refused = subprocess.run(
        [*select[:-2], "--output", chosen, "--keep", "phi_mean > 0"], capture_output=True, cwd=ROOT
    )
    assert refused.returncode == 2
    status = subprocess.run([*verbs, "status", output], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "1 of 1 chunks finished" in status.stdout


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("--pipeline-model-parallel-size 2", "drop the pipeline flags and use --tensor-model-parallel-size"),
        ("--tensor-model-parallel-size 2 --sequence-parallel", "drop --sequence-parallel"),
    ],
)
def test_a_layout_that_cannot_decode_is_calibrated_by_another_launch(folder, calibrated, tmp_path, layout, reason):
    """As the refusal says: without --calibrate under the layout, then with it under another, on the same folder."""
    calibrate = "--calibrate 60 --calibrate-max-tokens 24"
    with pytest.raises(AssertionError, match=rf"{reason}.*Leave --calibrate out .*on the same --output"):
        score(folder, tmp_path, f"{calibrate} {layout}", nproc=2)
    assert not list(tmp_path.iterdir())
    score(folder, tmp_path, layout, nproc=2)
    [part] = (tmp_path / "parts").glob("*.parquet")
    written = part.stat().st_mtime_ns
    score(folder, tmp_path, f"{calibrate} --tensor-model-parallel-size 2", nproc=2)
    assert part.stat().st_mtime_ns == written
    own, again = ([row["token_ids"] for row in read_own_samples(path)[1.0]] for path in (calibrated[0], tmp_path))
    assert sum(a == b for a, b in zip(own, again, strict=True)) >= 58  # a draw may fall on a rounding difference


def test_foreign_text_is_told_from_the_models_own(folder, scored, tmp_path):
    """Answers exchanged between records, and a template that the model has never seen."""
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    words = [record["messages"][-1]["content"] for record in records]
    for record, word in zip(records, words[7:] + words[:7], strict=True):
        record["messages"][-1]["content"] = "is " + word[::-1]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    exchanged = tmp_path / "exchanged"
    data = ["--data", str(tmp_path / "train.jsonl")]
    forked(["-m", "megatron_idft", "score", *flags(folder, exchanged), *data])
    template = tmp_path / "template"
    forked(["-m", "megatron_idft", "score", *flags(folder, template), "--chat-template", "plain"])

    def phi(rows: list[dict]) -> tuple[float, float]:
        means = np.array([row["phi_mean"] for row in rows])
        return float(means.mean()), float(means.std() / len(means) ** 0.5)

    own = phi(scored)
    for output in (exchanged, template):
        mean, error = phi(pq.read_table(output / "scores.parquet").to_pylist())
        assert own[0] - mean > 4 * np.hypot(error, own[1]), (output, mean, own)


def test_a_malformed_record_is_named_and_loses_no_other(folder, scored, tmp_path):
    lines = (folder / "train.jsonl").read_text().splitlines()
    bad = tmp_path / "train.jsonl"
    bad.write_text("\n".join([*lines[:5], '{"messages": [{"role": "user"}]}', "{not json", *lines[5:]]) + "\n")
    words = [*flags(folder, tmp_path / "out"), "--data", str(bad)]
    with pytest.raises(AssertionError, match=r"train\.jsonl, line 6"):
        forked(["-m", "megatron_idft", "score", *words])
    forked(["-m", "megatron_idft", "score", *words, "--bad-records", "skip"])
    rows = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert [row["line"] for row in rows] == [*range(1, 6), *range(8, 63)]
    assert [row["phi_mean"] for row in rows] == pytest.approx([row["phi_mean"] for row in scored], abs=1e-5)


def test_dry_run_and_estimate_write_nothing(folder, tmp_path):
    output = tmp_path / "out"
    turns = [("user", "1 + 2?"), ("assistant", "3."), ("user", "3 + 4?"), ("assistant", "7.")]
    two = tmp_path / "two.jsonl"
    two.write_text(json.dumps({"conversations": [{"from": role, "value": text} for role, text in turns]}) + "\n")
    words = flags(folder, output, f"--dry-run --data {two}")
    text = forked(["-m", "megatron_idft", "score", *words])
    assert "⟦3.<|im_end|>⟧" in text and text.count("two.jsonl: 1 record in the ShareGPT form (conversations)") == 1
    text = forked(["-m", "megatron_idft", "score", *words, "--sft-last-turn-only"])
    assert "⟦3." not in text and "⟦7.<|im_end|>⟧" in text and "scored spans" in text
    words += ["--sft-prompt-weight", "0.2"]
    text = forked(["-m", "megatron_idft", "score", *words])
    assert "⟦3 + 4?<|im_end|>⟧" in text and "⟦7.<|im_end|>⟧" in text and "records that train messages" in text
    with pytest.raises(AssertionError, match="--calibrate: own samples are answers, and 1 records also train"):
        forked(["-m", "megatron_idft", "score", *words, "--calibrate", "2"])
    text = forked(["-m", "megatron_idft", "score", *flags(folder, output, "--estimate")])
    assert "tokens/s" in text and "standard error" in text
    assert not output.exists()


@pytest.mark.parametrize(
    ("drop", "more", "remedy"),
    [
        ("--load", "", "--hf-model DIR, or its checkpoint as --load"),
        ("--data", "", "pass the records as --sft-data"),
        ("--tokenizer-model", "", "pass --tokenizer-model"),
        ("", "--limit 0", "whole number from 1"),
    ],
)
def test_missing_flags_are_named(folder, tmp_path, drop, more, remedy):
    words = flags(folder, tmp_path / "out", more)
    if drop:
        at = words.index(drop)
        del words[at : at + 2]
    with pytest.raises(AssertionError, match=remedy):
        forked(["-m", "megatron_idft", "score", *words])
