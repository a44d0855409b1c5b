"""A few training steps of a small GPT through the real trainer: every loss and backend, for their time or their values.

    python tools/benchmarks/training_steps.py --out RESULTS [--cpu] [--iterations 10] [--losses ce idft]
    python tools/benchmarks/training_steps.py --out RESULTS --values [--engine FOLDER] [--limit SECONDS]

Each run is `python -m megatron_idft train` in a process of its own: the same data, seed and steps; Megatron's own loss
runs once more without --sft-loss ("stock"). Nothing goes through torch.compile: runs then start sooner, and what
differs between them is the loss alone. Layers are Megatron's local ones, but for the runs named "engine".

Without --values the runs follow each other, so that their times mean something. With --values all of them run side by
side: the losses and backends, and what nobody has run otherwise: one step over 16 conversations as records and the same
ones as packs, and, on Transformer Engine (--engine: where it is unpacked, if it is not installed), a step in FP8 and
under CUDA graphs.

On a GPU: 4 layers, hidden size 1024, bf16, 8192 tokens a step (with --values 2048) over a vocabulary of 131072. With
--cpu: 2 small layers, fp32, 128 tokens over 1024, and the Triton kernels interpreted, so that times mean nothing. The
data is made here. Its tokenizer is small, but every column of the vocabulary counts. A floor under the weights makes an
untrained model move under dft and idft too.

Expected: backends agree in the first step's loss (same weights, same logits) to 1e-4, relative, and over all steps to
1e-2 in bf16, where roundings part the runs slowly; packs and records in the first step to 1e-3 (other kernels sum in
another order); a step is shorter by what the benchmark of the loss says. Values differ by more: MISS, and exit code 1,
as for a run that fails or does not end in time.

Written to RESULTS: training_steps.json (with --values training_values.json), anew after every run, and each run's
output beside it.
"""

import argparse
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))  # a checkout needs no installation

from toy_tokenizer import train_tokenizer  # noqa: E402

from megatron_idft.objective_table import OBJECTIVES  # noqa: E402

LOSSES = ("ce", "dft", "idft", "entropy")  # by default: each takes two runs
BACKENDS = ("reference", "triton")
FIRST_STEP_TOLERANCE = 1e-4
ALL_STEPS_TOLERANCE = 1e-2
PACKS_TOLERANCE = 1e-3
CONVERSATIONS = 16  # of the runs on packs and on the same records

# No worker processes: what reads the data is not measured, and many runs share the machine.
COMMON = """
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0
    --hidden-dropout 0 --lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --num-workers 0 --log-interval 1
    --chat-template chatml --seed 1 --no-bias-swiglu-fusion --no-bias-dropout-fusion
"""
GPU = """
    --num-layers 4 --hidden-size 1024 --num-attention-heads 16 --make-vocab-size-divisible-by 131072 --bf16
"""
CPU = """
    --cpu --num-layers 2 --hidden-size 64 --num-attention-heads 4 --make-vocab-size-divisible-by 1024
"""
VOCABULARY = {"gpu": 131072, "cpu": 1024}
SEQ_LENGTH = {"gpu": 1024, "cpu": 64}
MICRO_BATCH = {"gpu": 8, "cpu": 2}
VALUES_MICRO_BATCH = 2  # a dozen models share the memory
SUMS = {"gpu": 120, "cpu": 4}  # that fill a sample
IDFT = "--sft-loss idft --sft-loss-weight-floor 0.05"


class Run(NamedTuple):
    """data: "samples", which fill the sequence, or "records" or "packs" of a few conversations, all in each step.

    engine: on Transformer Engine's layers.
    """

    name: str
    flags: str
    data: str = "samples"
    engine: bool = False


class Pair(NamedTuple):
    """Two runs whose losses are compared; all_steps None: in the first step alone."""

    first: str
    second: str
    first_step: float = FIRST_STEP_TOLERANCE
    all_steps: float | None = ALL_STEPS_TOLERANCE


def plan(args: argparse.Namespace) -> tuple[list[Run], list[Pair]]:
    vocabulary = f"--sft-loss-vocab-size {VOCABULARY[args.device]}"
    runs = [Run("stock", "--calculate-per-token-loss")]
    pairs = []
    losses = ("ce", "idft") if args.values else args.losses
    for loss in losses:
        floor = "--sft-loss-weight-floor 0.05" if loss != "ce" else ""
        for backend in args.backends:
            if args.values and (loss, backend) == ("ce", "reference"):
                continue
            flags = f"--sft-loss {loss} --sft-loss-backend {backend} {vocabulary} {floor}"
            runs.append(Run(f"{loss} {backend}", flags))
    names = {run.name for run in runs}
    pairs += [Pair("stock", f"ce {backend}") for backend in args.backends]
    pairs += [Pair(f"{loss} reference", f"{loss} triton") for loss in losses]
    pairs = [pair for pair in pairs if {pair.first, pair.second} <= names]
    if not args.values:
        return runs, pairs
    idft = f"{IDFT} {vocabulary}"
    if args.engine is None:
        runs += [Run("records", idft, "records"), Run("packs", idft, "packs")]
        return runs, [*pairs, Pair("records", "packs", PACKS_TOLERANCE, None)]
    idft += " --te-rng-tracker"  # graphs switch it on: then all of them begin with the same weights
    graphs = f"{idft} --cuda-graph-impl"
    runs += [
        Run("engine", idft, engine=True),
        Run("engine records", idft, "records", engine=True),
        Run("engine packs", idft, "packs", engine=True),
        Run("engine fp8", f"{idft} --fp8-format hybrid", engine=True),
        Run("engine graphs", f"{graphs} local", engine=True),
        Run("engine whole graph", f"{graphs} full_iteration --no-check-for-nan-in-loss-and-grad", engine=True),
    ]
    pairs.append(Pair("engine records", "engine packs", PACKS_TOLERANCE, None))
    return runs, [*pairs, Pair("engine", "engine graphs"), Pair("engine", "engine whole graph")]


# ---------------------------------------------------------------------------------------------------------------- data


def make_full_conversations(folder: Path, sums: int) -> None:
    """64 conversations of so many sums, and a tokenizer for them."""
    write_conversations(folder / "train.jsonl", [sums] * 64, random.Random(1))
    train_tokenizer(folder)


def make_data(args: argparse.Namespace) -> None:
    """Conversations that fill a sample, and shorter ones as records and as packs; and a tokenizer for them."""
    folder, chance = args.data, random.Random(2)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call: prepare keeps what is there
    folder.mkdir(parents=True)
    full = SUMS[args.device]
    make_full_conversations(folder, full)
    if not args.values:
        return
    lengths = [chance.randint(1, full // 2) for _ in range(CONVERSATIONS)]
    write_conversations(folder / "short.jsonl", lengths, chance)
    words = f"--data {folder / 'short.jsonl'} --output {folder / 'packs'} --chat-template chatml --workers 1"
    words += f" --tokenizer-model {folder / 'tokenizer.model'} --seq-length {SEQ_LENGTH[args.device]} --no-progress"
    command = [sys.executable, "-m", "megatron_idft", "prepare", *words.split()]
    subprocess.run(command, check=True, env=environment(args, engine=False), stdout=subprocess.DEVNULL)


def write_conversations(file: Path, sums: list[int], chance: random.Random) -> None:
    lines = []
    for count in sums:
        terms = [(chance.randrange(100), chance.randrange(100)) for _ in range(count)]
        answer = " ".join(f"{a} + {b} = {a + b}." for a, b in terms)
        messages = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    file.write_text("\n".join(lines) + "\n")


def batch_flags(run: Run, args: argparse.Namespace) -> str:
    """Data and batch: a step of "records" and one of "packs" hold the same conversations, all of them."""
    if run.data == "records":
        return f"--sft-data {args.data / 'short.jsonl'} --micro-batch-size 1 --global-batch-size {CONVERSATIONS}"
    if run.data == "packs":
        count = json.loads((args.data / "packs.json").read_text())["packs"]
        return f"--sft-data {args.data / 'packs'} --micro-batch-size 1 --global-batch-size {count}"
    micro = VALUES_MICRO_BATCH if args.values else MICRO_BATCH[args.device]
    return f"--sft-data {args.data / 'train.jsonl'} --micro-batch-size {micro} --global-batch-size {micro}"


# ------------------------------------------------------------------------------------------------------------- running


def environment(args: argparse.Namespace, engine: bool) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(CHECKOUT), os.environ.get("PYTHONPATH"), str(args.engine) if engine and args.engine else None]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "NVTE_TORCH_COMPILE": "0",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1" if args.cpu else "0",
        # One process, as torchrun would start it: its agent would import torch once more for each run.
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }


def train(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Run the trainer; its losses and milliseconds by step, or the reason of its failure."""
    length = SEQ_LENGTH[args.device]
    words = f"{COMMON} {CPU if args.cpu else GPU} --seq-length {length} --max-position-embeddings {length}"
    words += "" if run.engine else " --transformer-impl local"
    words += f" --tokenizer-model {args.data / 'tokenizer.model'} --train-iters {args.iterations}"
    words += f" {run.flags} {batch_flags(run, args)}"
    command = [sys.executable, "-m", "megatron_idft", "train", *words.split()]
    started = time.monotonic()
    log = args.out / f"training_{run.name.replace(' ', '_')}.log"
    left = None if args.limit is None else max(args.limit - (started - args.started), 1)
    with open(log, "w") as file:
        try:
            env = environment(args, run.engine)
            code: int | str = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=args.out, timeout=left
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {args.limit:g} s in all"
    text = log.read_text()
    steps = re.findall(r"iteration +\d+/.*?elapsed time per iteration \(ms\): ([\d.]+).*?lm loss: ([\d.E+-]+)", text)
    result: dict[str, Any] = {
        "exit_code": code,
        "seconds": round(time.monotonic() - started, 1),
        "lm_loss": [float(loss) for _, loss in steps],
        "step_ms": [float(ms) for ms, _ in steps],
    }
    if code or len(steps) != args.iterations:
        result["failed"] = f"exit code {code}, {len(steps)} of {args.iterations} steps; see {log.name}"
        result["last_lines"] = text.splitlines()[-25:]
    else:
        result["median_step_ms"] = statistics.median(result["step_ms"][2:] or result["step_ms"])
    return result


def device(args: argparse.Namespace) -> str:
    """The card's name; without importing torch, which the trainings do."""
    if args.cpu:
        return "cpu"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def compare(first: dict[str, Any], second: dict[str, Any], pair: Pair) -> dict[str, Any]:
    """Relative differences of the losses in the first and over all steps."""
    both = zip(first["lm_loss"], second["lm_loss"], strict=True)
    differences = [abs(one - other) / max(abs(other), 1e-6) for one, other in both]
    hit = differences[0] <= pair.first_step
    if pair.all_steps is not None:
        hit = hit and max(differences) <= pair.all_steps
    return {
        "first_step": differences[0],
        "all_steps": max(differences),
        "limits": [pair.first_step, pair.all_steps],
        "step_time_ratio": first["median_step_ms"] / second["median_step_ms"],
        "hit": hit,
    }


def print_run(name: str, run: dict[str, Any]) -> None:
    if "failed" in run:
        print(f"{name:20}FAILED: {run['failed']}")
        print("".join(f"    {line}\n" for line in run["last_lines"]), end="", flush=True)
        return
    print(
        f"{name:20}{run['median_step_ms']:9.1f} ms per step   lm loss {run['lm_loss'][0]:.5f} ->"
        f" {run['lm_loss'][-1]:.5f}   {run['seconds']:.0f} s in all",
        flush=True,
    )


def print_comparison(pair: Pair, difference: dict[str, Any], args: argparse.Namespace) -> None:
    over_all = f", {difference['all_steps']:.1e} over all (limit {pair.all_steps:g})" if pair.all_steps else ""
    ratio = "" if args.values else f"; step time ratio {difference['step_time_ratio']:.2f}"
    print(
        f"{'hit ' if difference['hit'] else 'MISS'}  {pair.first} against {pair.second}: lm loss differs by"
        f" {difference['first_step']:.1e} in the first step (limit {pair.first_step:g}){over_all}{ratio}",
        flush=True,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--losses", nargs="+", choices=OBJECTIVES, default=list(LOSSES))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--values", action="store_true", help="everything side by side; times then mean nothing")
    parser.add_argument("--engine", type=Path, help="folder of Transformer Engine, or anything where it is installed")
    parser.add_argument("--at-once", type=int, default=16, help="processes at once with --values; default %(default)s")
    parser.add_argument("--limit", type=float, help="seconds after which runs are stopped and count as failed")
    args = parser.parse_args()
    args.started, args.device = time.monotonic(), "cpu" if args.cpu else "gpu"
    args.out = args.out.resolve()
    args.data = args.out / "training_data"
    return args


def main() -> int:
    args = parse_arguments()
    make_data(args)
    planned, pairs = plan(args)
    runs: dict[str, dict[str, Any]] = {}
    comparisons: dict[str, dict[str, Any]] = {}
    result = {"benchmark": "training_steps", "device": device(args), "vocabulary": VOCABULARY[args.device]}
    result |= {"side_by_side": args.values, "planned": [run.name for run in planned]}
    result |= {"runs": runs, "comparisons": comparisons}
    target = args.out / ("training_values.json" if args.values else "training_steps.json")
    with ThreadPoolExecutor(args.at_once if args.values else 1) as pool:
        pending = {pool.submit(train, run, args): run.name for run in planned}
        for future in as_completed(pending):
            name = pending[future]
            runs[name] = future.result()
            print_run(name, runs[name])
            good = {done for done, run in runs.items() if "failed" not in run}
            for pair in pairs:
                if name in pair[:2] and set(pair[:2]) <= good:
                    title = f"{pair.first} against {pair.second}"
                    comparisons[title] = compare(runs[pair.first], runs[pair.second], pair)
                    print_comparison(pair, comparisons[title], args)
            target.write_text(json.dumps(result, indent=1) + "\n")
    failed = any("failed" in run for run in runs.values()) or not all(one["hit"] for one in comparisons.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
