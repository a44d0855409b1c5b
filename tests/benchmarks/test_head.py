"""The benchmark of the output head, run whole as far as a CPU can: interpreted on tiny shapes."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.launch import ROOT

PROGRAM = ROOT / "tools" / "benchmarks" / "head.py"
STATUSES = {"measured", "wrong", "failed", "left out"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What head.json and head.txt hold."""
    folder = tmp_path_factory.mktemp("head")
    # The program chooses its own mode of Triton.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), "--smoke", "--quick", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "head.json").read_text()), (folder / "head.txt").read_text()


def heads(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in case["heads"]}


def test_every_head_is_measured_or_says_why_not(smoke):
    result, _ = smoke
    assert "Megatron" not in result["absent"], "the tests' own environment has it"
    for case in result["cases"]:
        for one in case["heads"]:
            assert one["status"] in STATUSES
            assert one["status"] == "measured" or one["reason"]
            assert not one["ours"] or one["status"] == "measured", one
    for library in ("Liger", "cut-cross-entropy", "verl", "TRL"):
        found = any(library in name for case in result["cases"] for name in heads(case))
        assert found or result["absent"][library]


def test_correctness_is_judged_before_time(smoke):
    """Ours far closer than those whose logits are rounded; a head that computes something else is not timed."""
    result, _ = smoke
    for case in result["cases"]:
        for one in case["heads"]:
            if one["status"] == "measured":
                worst = max(one["hidden_error"], one.get("weight_error", 0.0))
                of_loss, of_gradient = (2e-3, 5e-3) if one["name"].startswith("fused") else (0.05, 0.05)
                assert one["loss_error"] <= of_loss and worst <= of_gradient
                assert one["total_ms"] > 0
            else:
                assert "total_ms" not in one


def test_a_head_that_computes_something_else_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import head
    import heads as implementations
    from emulated_group import EmulatedGroup
    from head_measure import HeadBench

    bench = HeadBench(24, 16, 40, torch.bfloat16, 0.5, EmulatedGroup(0, 1), torch.device("cpu"))
    fused = implementations.fused("fused", backend="reference")
    other = implementations.Head("other", "ce", fused.run)  # IDFT is no cross-entropy
    found = [head.check_head(bench, one, head.CASES[0]) for one in (fused, other)]
    assert [one["status"] for one in found] == ["measured", "wrong"]
    assert found[1]["loss_error"] > 0.05 and found[1]["reason"] == "disagrees with float64"


def test_collectives_of_one_rank(smoke):
    """One all-gather of the states for each block and one all-reduce of the hidden states' gradient."""
    result, _ = smoke
    case = next(case for case in result["cases"] if case["tp"] == 8)
    fused, kept = heads(case)["fused"], heads(case)["materialised, overwriting"]
    assert fused["collectives"] == ["all_gather", "all_reduce"] and kept["collectives"] == ["all_gather"]
    states, gradient = 7 * case["tokens"] * 16, 2 * 7 / 8 * case["tokens"] * case["width"] * 2
    assert fused["bytes_sent"] == states + gradient and kept["bytes_sent"] == states
    assert heads(case)["fused, chunks of 2"]["collectives"] == ["all_gather"] * 3 + ["all_reduce"]
    assert len(heads(case)["Megatron unfused, materialised"]["collectives"]) == 3


def test_shares_and_goals_are_printed(smoke):
    result, text = smoke
    for case in result["cases"]:
        assert case["name"] in text and set(case["products_ms"]) == {"2", "3", "4"}
        assert set(heads(case)["fused"]["shares_ms"]) == {"products", "loss", "collectives", "other"}
    kinds = {goal["goal"].split(",")[0] for goal in result["goals"]}
    assert {"frozen head / two", "fastest"} <= kinds
    assert "of its time: products" in text and "neither hits nor misses mean anything" in text


def test_goals_are_judged_where_they_are_about(smoke, monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    from head_report import judge

    case = smoke[0]["cases"][0] | {"tokens": 8192, "width": 4096, "columns": 131072}
    case["heads"] = [dict(one) for one in case["heads"]]
    chunked = heads(case)["fused, chunks of 2"]
    chunked |= {"chunk": 4096, "over_products": 1.09, "total_ms": 1e-3, "extra_over_logits": 0.2}

    def found(device: str, on_cpu: bool = False) -> dict[str, bool]:
        return {goal["goal"]: goal["hit"] for goal in judge([case], device, on_cpu)}

    on_h200 = found("NVIDIA H200")
    assert on_h200["products, fused, chunks of 2 / three"] and on_h200["time, fused, chunks of 2, ms x tp"]
    assert not on_h200["memory of 1/8: of no chunk"], "on tiny shapes it cannot be"
    chunked |= {"over_products": 1.2, "extra_over_logits": 0.1, "total_ms": 40.0}
    on_h200 = found("NVIDIA H200")
    assert not on_h200["products, fused, chunks of 2 / three"] and not on_h200["time, fused, chunks of 2, ms x tp"]
    assert on_h200["memory of 1/8, fused, chunks of 2 / three"]
    assert not any(goal.startswith("time") for goal in found("NVIDIA H100"))
    assert set(found("no GPU", on_cpu=True)) == {f"{what}, of the materialised head's" for what in ("memory", "time")}
