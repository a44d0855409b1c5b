"""The loss benchmark, run whole as far as a CPU can: interpreted on tiny shapes, and compiled ahead of time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_idft import resolve_objective
from megatron_idft.objective_table import OBJECTIVES
from tests.launch import ROOT

TOP_K = [name for name in OBJECTIVES if resolve_objective(name).kl_coefficient is not None]
PROGRAM = ROOT / "tools" / "benchmarks" / "loss.py"
STATUSES = {"measured", "wrong", "failed", "left out"}


def run(folder: Path, *flags: str) -> dict[str, Any]:
    # What the tests need for themselves must not reach a program that chooses its own mode; nor may it be forked, with
    # Triton imported in ours.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), "--out", str(folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "loss.json").read_text())


def names(result: dict[str, Any]) -> list[str]:
    return [case["name"] for case in result["cases"]]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("smoke")
    return run(folder, "--smoke", "--quick"), folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("compiled"), "--compile-only")


def test_every_implementation_is_measured_or_says_why_not(smoke):
    result, _ = smoke
    assert "Megatron" not in result["absent"], "the tests' own environment has it"
    for case in result["cases"]:
        for one in case["implementations"]:
            assert one["status"] in STATUSES
            if one["status"] != "measured":
                assert one["reason"]
            if one["ours"]:
                assert one["status"] == "measured", one
    for library in ("Liger", "Transformer Engine", "verl"):
        measured = any(library in one["name"] for case in result["cases"] for one in case["implementations"])
        assert measured or result["absent"][library]


def test_correctness_is_judged_before_time(smoke):
    result, _ = smoke
    for case in result["cases"]:
        for one in case["implementations"]:
            if one["status"] == "measured":
                assert one["value_error"] <= 1e-3
                assert one.get("gradient_error", 0.0) <= 1e-2


def test_goals_are_judged_on_each_case_they_are_about(smoke):
    result, _ = smoke
    kinds = {(goal["goal"].split(",")[0], goal["case"]) for goal in result["goals"]}
    for case in result["cases"]:
        if case["compared"] not in ("rivals", "objectives"):  # all of whom may be absent
            assert ("fastest", case["name"]) in kinds
        if case["compared"] != "statistics":
            assert ("objective", case["name"]) in kinds
        if case["compared"] == "objectives":
            assert ("top K", case["name"]) in kinds and len(case["implementations"]) == len(OBJECTIVES) + 1
        if case["full_time"]:
            assert ("ignored", case["name"]) in kinds


def test_collectives_of_one_rank(smoke):
    result, _ = smoke
    tensor_parallel = next(case for case in result["cases"] if case["tp"] == 8)
    calls = {one["name"]: one["collectives"] for one in tensor_parallel["implementations"]}
    sent = {one["name"]: one["bytes_sent"] for one in tensor_parallel["implementations"]}
    assert calls["triton idft, overwriting"] == calls["reference idft, overwriting"] == ["all_gather"]
    assert sent["triton idft, overwriting"] == 7 * tensor_parallel["tokens"] * 16
    assert calls["Megatron unfused"] == ["all_reduce"] * 3
    assert calls["Megatron native"] == ["all_reduce"] * 2


def test_table_and_picture_are_written(smoke):
    result, folder = smoke
    text = (folder / "loss.txt").read_text()
    assert all(name in text for name in names(result))
    assert "neither hits nor misses mean anything" in text
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_every_case_compiles_without_spills(compiled):
    assert len(names(compiled)) == len(set(names(compiled))) > 20
    kernels = compiled["kernels"]
    for case in compiled["cases"]:
        for one in case["implementations"]:
            used = [kernels[name]["kernel"] for name in one["kernels"]]
            whole = ["shard_state_kernel", "token_results_kernel", "gradient_kernel"]
            if one["formula"] in TOP_K:
                whole.append("store_columns_kernel")
            assert used == (whole[:2] if case["compared"] == "statistics" else whole)
    assert {kernel["spilled_bytes"] for kernel in kernels.values()} == {0}


def test_machine_code_moves_the_counted_bytes(compiled):
    """2 bytes per bf16 element in forward, 2 + 2 in backward; 16 at a time where rows lie on 16-byte boundaries."""
    itemsize = {"bfloat16": 2, "float16": 2, "float32": 4}
    loops = 0
    for kernel in compiled["kernels"].values():
        if "main_loop" not in kernel:
            assert kernel["kernel"] in ("token_results_kernel", "store_columns_kernel")
            continue
        loops += 1
        loop, width = kernel["main_loop"], itemsize[kernel["dtype"]]
        assert loop["bytes_read_per_element"] == width
        assert loop["bytes_written_per_element"] == (width if kernel["kernel"] == "gradient_kernel" else 0)
        assert 1.0 <= loop["exponentials_per_element"] <= 1.25
        assert loop["exchanges_between_lanes"] == 0
        aligned = all(columns * width % 16 == 0 for columns in kernel["columns"])
        assert (kernel["loads_of_16_bytes"] > 0) == aligned
    assert loops >= 8


def test_six_bytes_per_element_and_one_collective(compiled):
    for case in compiled["cases"]:
        for one in case["implementations"]:
            calls, numbers = ["all_gather"], 5 if one["formula"] == "deft" else 4
            sent = (case["tp"] - 1) * case["tokens"] * 4 * numbers
            if one["formula"] in TOP_K:  # 20 numbers a token, to and from, in a ring
                calls.append("all_reduce")
                sent += round(2 * (case["tp"] - 1) / case["tp"] * case["tokens"] * 20 * 4)
                assert 1 < one["token_bytes_over_idft"] <= 1.15
            assert one["collectives"] == (calls if case["tp"] > 1 else [])
            assert one["bytes_sent"] == sent
            if case["dtype"] == "bf16" and case["trained"] == 1 and case["compared"] != "statistics":
                assert one["forward_bytes_per_element"] + one["backward_bytes_per_element"] == 6
