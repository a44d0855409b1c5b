"""The stock trainer on the CPU: a resumed run is bitwise the undisturbed one, layouts reshard, recompute is exact.

Every run is the stock script behind the shim, in real gloo processes. What the layouts compute is tested in
test_layouts.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_idft.integration.platform import cpu
from tests.launch import ROOT, forked, forking_python
from tests.run_outputs import differences, load_checkpoint

HERE = Path(__file__).parent
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16"
    " --position-embedding-type rope --micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr 1e-3"
    " --lr-decay-style constant --eval-iters 1 --eval-interval 2 --log-interval 1 --vocab-size 127"
    " --make-vocab-size-divisible-by 64"
)
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
TP2 = "--tensor-model-parallel-size 2"


class Run:
    """One launch of the script: its output, the exact loss of every microbatch per rank, and what it saved."""

    def __init__(self, folder: Path, processes: int, *flags: str) -> None:
        self.folder = folder
        folder.mkdir()
        words = [word for group in (FLAGS, f"--trace {folder}", *flags) for word in group.split()]
        self.output = forked([HERE / "on_cpu.py", HERE / "stock_pretrain.py", *words], nproc=processes)

    def trace(self, after: int = 0) -> dict[str, list[dict]]:
        """Per rank, the microbatches of the iterations after the first `after`, evaluations at their end included."""
        traces = {
            path.name: [json.loads(line) for line in path.read_text().splitlines()]
            for path in self.folder.glob("rank*.jsonl")
        }
        return {name: [r for r in records if r["iteration"] >= after] for name, records in traces.items()}

    def mean_losses(self, after: int = 0, ranks: int = 1) -> dict[tuple[int, bool], float]:
        """Per iteration and mode, the mean of the microbatches' token means, over the first `ranks` that have any."""
        means: dict[tuple[int, bool], list[float]] = {}
        for _, records in sorted(self.trace(after).items())[:ranks]:
            for record in records:
                key = record["iteration"], record["training"]
                means.setdefault(key, []).append(record["loss"] / record["tokens"])
        return {key: sum(values) / len(values) for key, values in means.items()}

    def checkpoint_of(self, iteration: int, destination: Path) -> Path:
        """A checkpoint folder as it was when `iteration` had been saved."""
        name = f"iter_{iteration:07d}"
        shutil.copytree(self.folder / "saved" / name, destination / name)
        (destination / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        return destination

    def saved(self, iteration: int) -> dict[str, object]:
        return load_checkpoint(self.folder / "saved", iteration)


CASES = {
    "tensor and sequence parallel": f"{TP2} --sequence-parallel",
    "pipeline parallel, bf16": "--pipeline-model-parallel-size 2 --bf16",
    "distributed optimizer, bf16": "--use-distributed-optimizer --bf16 --dist-ckpt-optim-fully-reshardable",
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Runs with dropout that saved after iterations 2 and 4, made when first asked for."""
    made: dict[str, Run] = {}

    def run(case: str) -> Run:
        if case not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            made[case] = Run(folder, 2, CASES[case], f"--save {folder}/saved --save-interval 2")
        return made[case]

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bitwise_the_undisturbed_one(undisturbed, tmp_path, case):
    flags = CASES[case]
    whole = undisturbed(case)
    start = whole.checkpoint_of(2, tmp_path / "start")
    resumed = Run(tmp_path / "resumed", 2, flags, f"--load {start} --save {tmp_path}/resumed/saved --save-interval 2")
    expected = whole.trace(after=2)
    assert any(expected.values()) and resumed.trace() == expected
    assert "hidden_dropout .................................. 0.1" in whole.output
    before, after = whole.saved(4), resumed.saved(4)
    assert differences(before, after) == []
    assert sum(isinstance(value, torch.Tensor) for value in before.values()) >= 40
    # The comparison sees what it must: the weights moved, and so did the random states that dropout draws from.
    moved = differences(whole.saved(2), before)
    assert any("layers" in name for name in moved) and any("rng_tracker_states" in name for name in moved)
    assert any("exp_avg_sq" in name for name in moved)
    # Under sequence parallelism no activation is replicated, so the common stream rests.
    assert any("cuda_rng_state" in name for name in moved) == ("--sequence-parallel" not in flags)


def test_recompute_with_dropout_changes_nothing(undisturbed, tmp_path):
    flags = CASES["tensor and sequence parallel"]
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    assert Run(tmp_path / "run", 2, flags, recompute).trace() == undisturbed("tensor and sequence parallel").trace()


HYBRID = (
    "--hybrid-layer-pattern=*E*-/*- --mtp-num-layers 1 --num-experts 4 --moe-router-topk 2 --disable-bias-linear"
    " --moe-shared-expert-intermediate-size 32 --moe-aux-loss-coeff 0.01 --moe-router-load-balancing-type aux_loss"
    " --normalization RMSNorm --untie-embeddings-and-output-weights"
)


def test_hybrid_model_of_local_layers_with_experts_and_mtp(tmp_path):
    """Under sequence parallelism too, where a norm's weights see a part of the sequence per rank."""
    one = Run(tmp_path / "one", 1, HYBRID, NO_DROPOUT)
    expected = one.mean_losses()
    for dispatcher in ("alltoall", "allgather"):
        flags = f"{TP2} --sequence-parallel --moe-token-dispatcher-type {dispatcher}"
        got = Run(tmp_path / dispatcher, 2, HYBRID, NO_DROPOUT, flags).mean_losses()
        assert got == pytest.approx(expected, rel=1e-5), dispatcher
    assert expected[3, True] < expected[0, True]


def test_what_the_shim_promises_in_its_process():
    result = subprocess.run(
        [forking_python(), HERE / "cpu_checks.py"],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    assert "all checks passed" in result.stdout


def test_a_process_that_uses_a_gpu_is_left_alone(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        with pytest.raises(RuntimeError, match="already uses a GPU"):
            cpu.enable()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "apex", sys)
        with pytest.raises(RuntimeError, match="apex is already imported"):
            cpu.enable()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0" and torch.zeros.__module__ != cpu.__name__
    assert sys.modules.get("transformer_engine", torch) is not None and not hasattr(torch.zeros, "__wrapped__")


def test_only_missing_flags_are_added_and_named_in_one_line(capsys, monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setenv("RANK", "0")
    given = ["--num-layers", "2", "--distributed-backend=gloo", "--no-rope-fusion"]
    argv = cpu.add_flags(given, "script.py")
    assert argv[: len(given)] == given
    assert argv[len(given) :] == [
        "--use-cpu-initialization", "--transformer-impl", "local", "--no-gradient-accumulation-fusion",
        "--no-masked-softmax-fusion", "--no-persist-layer-norm", "--no-bias-gelu-fusion", "--no-bias-swiglu-fusion",
        "--no-bias-dropout-fusion",
    ]  # fmt: skip
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and line.startswith("script.py: ") and "CUDA_DEVICE_MAX_CONNECTIONS=1" in line
    assert cpu.add_flags(argv, "script.py") == argv and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "1")
    cpu.add_flags(given, "script.py")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ("--transformer-impl transformer_engine", "use local"),
        ("--transformer-impl=transformer_engine", "use local"),
        ("--distributed-backend nccl", "use gloo"),
        ("--fp8-format hybrid", "--bf16"),
        ("--use-flash-attn", "leave it out"),
        ("--sft --seq-length 16", "unpacked"),
        ("--moe-token-dispatcher-type flex", "allgather or alltoall"),
        ("--num-experts 4", "add --disable-bias-linear"),
        ("--use-megatron-fsdp", "--use-distributed-optimizer"),
        ("--profile", "leave it out"),
    ],
)
def test_flags_that_cannot_work_are_refused_with_the_remedy(flags, remedy):
    with pytest.raises(cpu.UnsupportedOnCPUError, match=r"script\.py: ") as refused:
        cpu.add_flags(flags.split(), "script.py")
    assert flags.replace("=", " ").split()[0] in str(refused.value) or "experts" in str(refused.value)
    assert remedy in str(refused.value)
