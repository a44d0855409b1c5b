"""The decoding benchmark, run whole on a model of toy size: every variant decodes, the figures hang together."""

import json
import subprocess

from tests.launch import ROOT, forking_python

PROGRAM = ROOT / "tools" / "benchmarks" / "decoding.py"


def test_every_variant_is_measured(tmp_path):
    command = [forking_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(PROGRAM)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--shape", "smoke"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "decoding.json").read_text())
    variants = result["variants"]
    engine = ["engine 4 pairs", "engine 4 rows"]
    plain = "transformers.generate 4 rows, plain prompts"
    others = ["engine 4 pairs, cuDNN allowed", "engine 1 pairs", "no cache", "transformers.generate 4 rows"]
    assert list(variants) == [*engine, plain, *others] and result["failed"] == {}
    for row in variants.values():
        [(short, long)] = row["seconds"]
        assert short > 0 and long > 0
    four = variants["engine 4 pairs"]
    assert four["tokens_per_second_whole"] == 4 * 12 / four["seconds"][0][1]
    for prefills in (result["prefills"]["without cuDNN"], result["prefills"]["cuDNN allowed"]):
        assert len(set(map(tuple, prefills["shapes"]))) > 10, "shapes that have not been seen"
        assert len(prefills["first_seconds"]) == len(prefills["second_seconds"]) == 20
    assert result["bytes_per_second"] > 0 and result["flops_per_second"] > 0
    rates = {name: row["tokens_per_second_whole"] for name, row in variants.items()}
    *_, with_prompts, against_generate = result["goals"]
    assert with_prompts["value"] == rates["engine 4 pairs"] / rates["engine 4 rows"]
    assert against_generate["value"] == rates["engine 4 rows"] / rates[plain]
    assert [goal["hit"] for goal in result["goals"]] == [goal["value"] >= goal["goal"] for goal in result["goals"]]


def test_a_variant_that_fails_is_recorded_and_passed_over(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    from decoding import failures

    failed: dict[str, str] = {}
    with failures("engine 96 pairs", failed):
        raise RuntimeError("CUDA out of memory.\nmore of it")
    assert failed == {"engine 96 pairs": "CUDA out of memory."} and "FAILED" in capsys.readouterr().out


def test_goals_are_judged(monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    from decoding import judge

    rows = {"engine 32 pairs": {"tokens_per_second_whole": 1000.0}, "no cache": {"tokens_per_second_whole": 25.0}}
    [goal] = judge(rows, on_gpu=False, shape="tiny")
    assert not goal["hit"] and goal["value"] == 40
    rows["no cache"]["tokens_per_second_whole"] = 20.0
    assert judge(rows, on_gpu=False, shape="tiny")[0]["hit"]
    rows = {
        "engine 64 pairs": {"tokens_per_second_whole": 1.0, "share_of_floor": 0.4},
        "no cache": {"tokens_per_second_whole": 1.0},
    }
    assert [goal["hit"] for goal in judge(rows, on_gpu=True, shape="7b")] == [False]
