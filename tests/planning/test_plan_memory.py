"""The memory that `plan` predicts agrees with what real trainings allocate, counted: some of the benchmark's layouts.

All of its cases, with their figures, stand in tools/benchmarks/results/plan_memory_cpu.json.
"""

import json
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, forked
from tests.planning.plans import plans

sys.path.append(str(ROOT / "tools" / "benchmarks"))
from plan_memory import CASES, GOAL, compared, flags_of
from training_steps import make_full_conversations

MEASURED = (
    "TP 2 with sequence parallelism, bf16",
    "PP 2, two chunks each",
    "experts, EP 2",
    "full recompute",
    "fused head, TP 2 with sequence parallelism, bf16",
)
# Without these words the plan is far off: the comparison can fail.
TELLING = {
    "full recompute": ("--recompute-granularity", 6),
    "fused head, TP 2 with sequence parallelism, bf16": ("--sft-loss-head", 4),
}
# Two steps are enough to count, and two micro-batches for two stages.
SHORTER = ["--train-iters", "2", "--global-batch-size", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_full_conversations(folder, 40)
    return folder


@pytest.fixture(scope="module")
def predicted(tmp_path_factory, data):
    calls = {case: ["--gpus", str(CASES[case][0]), *flags_of(case, data), *SHORTER] for case in MEASURED}
    for case, (flag, words) in TELLING.items():
        at = calls[case].index(flag)
        calls[f"not {case}"] = calls[case][:at] + calls[case][at + words :]
    return dict(zip(calls, plans(tmp_path_factory.mktemp("plans"), *calls.values()), strict=True))


@pytest.mark.parametrize("case", MEASURED)
def test_memory_agrees_with_what_a_training_allocates(tmp_path, data, predicted, case):
    processes = CASES[case][0]
    probe = ROOT / "tools" / "benchmarks" / "memory_probe.py"
    forked([probe, tmp_path, *flags_of(case, data), *SHORTER], nproc=processes)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(processes)]
    plan = predicted[case]["plan"]
    for row in compared(plan, ranks):
        assert row["parameters"]["measured"] == row["parameters"]["predicted"]
        assert abs(row["error"]["states"]) < 0.005, row
        assert abs(row["error"]["peak"]) < GOAL and abs(row["error"]["total"]) < GOAL, row
    if case in TELLING:
        other = predicted[f"not {case}"]["plan"]
        assert abs(compared(other, ranks)[0]["error"]["peak"]) > 2 * GOAL
