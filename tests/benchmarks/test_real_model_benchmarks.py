"""The benchmarks of scoring and of decoding beside transformers, run whole on toy sizes of SmolLM2's shape."""

import json
import subprocess

import pytest

from tests.launch import ROOT, forking_python

TOOLS = ROOT / "tools" / "benchmarks"


def run(program, *flags):
    command = [forking_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    words = [*command, str(TOOLS / program), *map(str, flags), "--rounds", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_scoring_is_measured_beside_the_same_batches_in_transformers(tmp_path):
    flags = ["--shape", "smollm2-smoke", "--records", 6, "--tokens-per-batch", 700, "--json", tmp_path / "r.json"]
    printed = run("scoring.py", *flags)
    result = json.loads((tmp_path / "r.json").read_text())
    variants = ["scoring", "transformers", "by hand"]
    assert result["weights"] == "random" and sum(result["batches"]) == 6 and len(result["batches"]) > 1
    assert 0 < result["response_tokens"] < result["tokens"]
    for kind in ("seconds", "cpu_seconds"):
        assert list(result[kind]) == variants and all(len(times) == 1 for times in result[kind].values())
    assert list(result["share_of_products"]) == variants and result["products_seconds"] > 0
    [goal] = result["goals"]
    assert goal["value"] == result["seconds"]["transformers"][0] / result["seconds"]["scoring"][0]
    assert ("hit " if goal["hit"] else "MISS") in printed and goal["hit"] == (goal["value"] >= 1.2)


def test_decoding_is_measured_row_for_row_beside_generate(tmp_path):
    run("decoding.py", "--shape", "smollm2-smoke", "--out", tmp_path, "--rows", 4)
    result = json.loads((tmp_path / "decoding.json").read_text())
    found = result["rows"]["4"]
    assert found.pop("products")["two_streams_bound"] > 0
    streams = found.pop("streams")
    assert all(len(values) == 1 and values[0] > 0 for values in streams.values()) and list(found) == [
        "greedy",
        "sampled",
        "cut",
        "pairs",
    ]
    for kind, figures in found.items():
        for name in ("engine", "generate"):
            [seconds] = figures["seconds"][name]
            rows = 8 if kind == "pairs" else 4
            assert figures["row_tokens_per_second"][name] == rows * result["new_tokens"] / seconds
            assert 0 < figures["step_ms"][name] < 1e3 * seconds
    assert found["greedy"]["equal_rows"] == 4, "the same model, the same prompts"
    single = [found[kind]["times_generate"] for kind in ("greedy", "sampled", "cut")]
    ends = result["natural_ends"]
    assert sum(ends["lengths"]) == ends["engine"]["tokens"] == ends["generate"]["tokens"]
    ended = [
        ends["generate"]["seconds"] / ends["engine"]["seconds"],
        ends["engine, pairs"]["tokens_per_second"] / ends["engine"]["tokens_per_second"],
    ]
    assert [goal["value"] for goal in result["goals"]] == [*single, *streams["step"], *streams["whole"], *ended]
    assert [goal["hit"] for goal in result["goals"]] == [goal["value"] >= goal["goal"] for goal in result["goals"]]


def test_a_narrow_model_is_scored(tmp_path):
    flags = ["--records", 4, "--longest", 40, "--hidden", 64, "--layers", 1, "--vocab", 256]
    run("scoring.py", *flags, "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["goal_hit"] == (result["share_of_forward"] >= 0.95)
    assert list(result["tokens_per_second"]) == ["scoring", "forward", "hugging_face"]


def test_the_loop_by_hand_finds_what_the_loop_finds(monkeypatch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(TOOLS))
    import numpy as np
    from real_model import SMOKE
    from real_scoring import batch, by_hand, keeping

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOKE)).eval()
    sequences = [np.arange(n) % 300 for n in (30, 21, 25)]
    masks = [np.arange(n) >= first for n, first in ((30, 12), (21, 9), (25, 20))]
    inputs = batch(sequences, masks, [0, 2, 1])
    for one, other in zip(keeping(model, *inputs), by_hand(model, *inputs), strict=True):
        assert len(one) == sum(mask.sum() for mask in masks)
        np.testing.assert_allclose(one, other, atol=1e-5)
