"""The training steps that compare backends, run on the CPU with interpreted kernels."""

import json
import subprocess
import sys

import pytest

from launch import ROOT

PROGRAM = ROOT / "tools" / "benchmarks" / "training_steps.py"


def test_backends_and_the_stock_loss_train_alike(tmp_path):
    flags = ["--cpu", "--iterations", "3", "--losses", "ce", "--backends", "triton"]
    command = [sys.executable, str(PROGRAM), "--out", str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "training_steps.json").read_text())
    assert set(result["runs"]) == {"stock", "ce triton"}
    for run in result["runs"].values():
        assert len(run["lm_loss"]) == 3
        assert run["lm_loss"][0] > run["lm_loss"][-1], "it learns"
    comparison = result["comparisons"]["stock against ce triton"]
    assert comparison["hit"] and comparison["all_steps"] < 1e-5
    assert "backend triton" in (tmp_path / "training_ce_triton.log").read_text()


def test_a_difference_is_a_miss(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    from training_steps import compare

    assert compare({"lm_loss": [8.0, 7.0]}, {"lm_loss": [8.0, 7.01]})["hit"]
    assert not compare({"lm_loss": [8.0, 7.0]}, {"lm_loss": [8.002, 7.0]})["hit"], "first step"
    assert not compare({"lm_loss": [8.0, 7.0]}, {"lm_loss": [8.0, 7.2]})["hit"], "later steps"
