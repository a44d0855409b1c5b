"""The training steps that compare backends, run on the CPU with interpreted kernels."""

import json
import subprocess

import pytest

from tests.launch import ROOT, forking_python

PROGRAM = ROOT / "tools" / "benchmarks" / "training_steps.py"


def test_backends_and_the_stock_loss_train_alike(tmp_path):
    flags = ["--cpu", "--iterations", "3", "--losses", "ce", "--backends", "triton"]
    command = [forking_python(), str(PROGRAM), "--out", str(tmp_path), *flags]
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
    from training_steps import PACKS_TOLERANCE, Pair, compare

    def hit(first, second, pair):
        one, other = ({"lm_loss": losses, "median_step_ms": 1.0} for losses in (first, second))
        return compare(one, other, pair)["hit"]

    losses = Pair("stock", "ce triton")
    assert hit([8.0, 7.0], [8.0, 7.01], losses)
    assert not hit([8.0, 7.0], [8.002, 7.0], losses), "first step"
    assert not hit([8.0, 7.0], [8.0, 7.2], losses), "later steps"
    packs = Pair("records", "packs", PACKS_TOLERANCE, None)
    assert hit([8.0, 7.0], [8.004, 7.2], packs) and not hit([8.0, 7.0], [8.01, 7.0], packs)


def test_side_by_side_packs_are_their_records_and_a_cut_leaves_a_verdict(tmp_path):
    """The Triton kernels are tested above; here what is compared beside them, and what a cut leaves."""
    flags = ["--cpu", "--values", "--backends", "reference", "--at-once", "2"]
    command = [forking_python(), str(PROGRAM), "--out", str(tmp_path), *flags]
    done = subprocess.run(
        [*command, "--iterations", "2", "--limit", "240"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "training_values.json").read_text())
    assert set(result["runs"]) == set(result["planned"]) == {"stock", "idft reference", "records", "packs"}
    [(name, comparison)] = result["comparisons"].items()
    assert name == "records against packs" and comparison["first_step"] < 1e-6
    endless = ["--iterations", "1000000"]  # two steps may end within the second
    done = subprocess.run([*command, *endless, "--limit", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    runs = json.loads((tmp_path / "training_values.json").read_text())["runs"]
    assert len(runs) == 4 and all("stopped after 1 s" in run["failed"] for run in runs.values())
