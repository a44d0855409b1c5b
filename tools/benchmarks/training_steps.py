"""A few training steps of a small GPT with every loss and backend, through the real trainer; backends side by side.

    python tools/benchmarks/training_steps.py --out RESULTS [--cpu] [--iterations 10] [--losses ce idft]

Each run is `python -m megatron_idft train` in a process of its own: the same data, seed and steps; Megatron's own loss
runs once more without --sft-loss ("stock"). Layers are Megatron's local ones, and nothing goes through torch.compile:
runs then start sooner, and what differs between them is the loss alone.

On a GPU: 4 layers, hidden size 1024, bf16, 8192 tokens a step over a vocabulary of 131072. With --cpu: 2 small layers,
fp32, 128 tokens over 1024, and the Triton kernels interpreted, so that times mean nothing. The data is made here. Its
tokenizer is small, but every column of the vocabulary counts. A floor under the weights makes an untrained model move
under dft and idft too.

Expected: backends agree in the first step's loss (same weights, same logits) to 1e-4, relative, and over all steps to
1e-2 in bf16, where roundings part the runs slowly; a step is shorter by what the benchmark of the loss says. Values
differ by more: MISS, and exit code 1, as for a run that fails.

Written to RESULTS: training_steps.json, and the output of each run beside it.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from toy_tokenizer import train_tokenizer

CHECKOUT = Path(__file__).resolve().parents[2]
LOSSES = ("ce", "dft", "idft", "entropy")
BACKENDS = ("reference", "triton")
FIRST_STEP_TOLERANCE = 1e-4
ALL_STEPS_TOLERANCE = 1e-2

COMMON = """
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0
    --hidden-dropout 0 --lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --num-workers 0 --log-interval 1
    --chat-template chatml --seed 1 --no-bias-swiglu-fusion --no-bias-dropout-fusion
"""
GPU = """
    --num-layers 4 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024
    --micro-batch-size 8 --global-batch-size 8 --make-vocab-size-divisible-by 131072 --bf16
    --transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion
    --no-persist-layer-norm
"""
CPU = """
    --cpu --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 2 --global-batch-size 2 --make-vocab-size-divisible-by 1024
"""
VOCABULARY = {"gpu": 131072, "cpu": 1024}


def make_data(folder: Path, sums: int) -> None:
    """Conversations whose answers fill a sample, and a tokenizer for them."""
    chance = random.Random(1)
    lines = []
    for _ in range(64):
        terms = [(chance.randrange(100), chance.randrange(100)) for _ in range(sums)]
        answer = " ".join(f"{a} + {b} = {a + b}." for a, b in terms)
        messages = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer(folder)


def train(name: str, flags: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run the trainer; its losses and milliseconds by step, or the reason of its failure."""
    data = args.out / "training_data"
    words = f"{COMMON} {CPU if args.cpu else GPU} {flags} --train-iters {args.iterations}".split()
    words += ["--sft-data", str(data / "train.jsonl"), "--tokenizer-model", str(data / "tokenizer.model")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH")))),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment["TRITON_INTERPRET"] = "1" if args.cpu else "0"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += ["-m", "megatron_idft", "train", *words]
    started = time.monotonic()
    log = args.out / f"training_{name.replace(' ', '_')}.log"
    with open(log, "w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=args.out).returncode
    steps = re.findall(
        r"iteration +\d+/.*?elapsed time per iteration \(ms\): ([\d.]+).*?lm loss: ([\d.E+-]+)", log.read_text()
    )
    result: dict[str, Any] = {
        "exit_code": code,
        "seconds": round(time.monotonic() - started, 1),
        "lm_loss": [float(loss) for _, loss in steps],
        "step_ms": [float(ms) for ms, _ in steps],
    }
    if code or len(steps) != args.iterations:
        result["failed"] = f"exit code {code}, {len(steps)} of {args.iterations} steps; see {log.name}"
        print("".join(f"    {line}\n" for line in log.read_text().splitlines()[-25:]), end="")
    else:
        result["median_step_ms"] = statistics.median(result["step_ms"][2:] or result["step_ms"])
    return result


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Relative differences of the losses in the first and over all steps."""
    pairs = zip(first["lm_loss"], second["lm_loss"], strict=True)
    differences = [abs(one - other) / max(abs(other), 1e-6) for one, other in pairs]
    return {
        "first_step": differences[0],
        "all_steps": max(differences),
        "hit": differences[0] <= FIRST_STEP_TOLERANCE and max(differences) <= ALL_STEPS_TOLERANCE,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    args = parser.parse_args()
    args.out = args.out.resolve()
    (args.out / "training_data").mkdir(parents=True, exist_ok=True)
    make_data(args.out / "training_data", sums=4 if args.cpu else 120)
    vocabulary = VOCABULARY["cpu" if args.cpu else "gpu"]
    runs: dict[str, dict[str, Any]] = {}
    planned = {"stock": "--calculate-per-token-loss"}
    for loss in args.losses:
        floor = "--sft-loss-weight-floor 0.05" if loss != "ce" else ""
        for backend in args.backends:
            flags = f"--sft-loss {loss} --sft-loss-backend {backend} --sft-loss-vocab-size {vocabulary} {floor}"
            planned[f"{loss} {backend}"] = flags
    for name, flags in planned.items():
        runs[name] = run = train(name, flags, args)
        if "failed" in run:
            print(f"{name:20}FAILED: {run['failed']}", flush=True)
            continue
        print(
            f"{name:20}{run['median_step_ms']:9.1f} ms per step   lm loss {run['lm_loss'][0]:.5f} ->"
            f" {run['lm_loss'][-1]:.5f}   {run['seconds']:.0f} s in all",
            flush=True,
        )
    pairs = [("stock", f"ce {backend}") for backend in args.backends]
    pairs += [(f"{loss} reference", f"{loss} triton") for loss in args.losses]
    completed = {name for name, run in runs.items() if "failed" not in run}
    comparisons = {}
    for first, second in pairs:
        if {first, second} <= completed:
            comparisons[f"{first} against {second}"] = difference = compare(runs[first], runs[second])
            ratio = runs[first]["median_step_ms"] / runs[second]["median_step_ms"]
            difference["step_time_ratio"] = ratio
            print(
                f"{'hit ' if difference['hit'] else 'MISS'}  {first} against {second}: lm loss differs by"
                f" {difference['first_step']:.1e} in the first step (limit {FIRST_STEP_TOLERANCE:g}),"
                f" {difference['all_steps']:.1e} over all (limit {ALL_STEPS_TOLERANCE:g}); step time ratio {ratio:.2f}"
            )
    result = {"benchmark": "training_steps", "device": "cpu" if args.cpu else "gpu", "vocabulary": vocabulary}
    result |= {"runs": runs, "comparisons": comparisons}
    (args.out / "training_steps.json").write_text(json.dumps(result, indent=1) + "\n")
    failed = any("failed" in run for run in runs.values()) or not all(one["hit"] for one in comparisons.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
