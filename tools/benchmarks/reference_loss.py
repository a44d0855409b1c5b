"""Time and peak memory of the reference loss on this machine's CPU, forward and backward.

Four variants on the same logits [tokens, vocab]:

    overwriting    vocab_parallel_loss(..., "idft", backend="reference", overwrite_logits=True): what training runs
    copying        the same with overwrite_logits=False, for callers who keep their logits
    textbook       the formulas written down as they stand: softmax, log, entropy and gather as [T, V] tensors, autograd
    cross_entropy  torch.nn.functional.cross_entropy, which needs neither entropy nor weight: what the stock loss costs

Goals, set before the first run, for T = 2048, V = 32000, fp32: the loss is at least 2x faster than the textbook and
peaks at no more than 1/4 of its extra memory. They are judged for the overwriting variant and printed for the copying
one as well, whose gradient alone is 1/3 of the textbook's peak in fp32.

The logits are an intermediate result, as in a model: a stand-in for the output layer copies them from a stored tensor
before each call, outside the measurement, and drops the gradient that arrives. So every variant is measured from its
first read of the logits until their gradient is complete, and nothing else is: a real layer's matrix products would add
the same time and memory to each and blur the ratios.

Time: one process, one untimed round, then the variants take turns; the median over the rounds counts. Several threads
on cores that others use wait for each other after every pass, which measures the others: the load average is recorded,
and --threads 1 is for such machines.

Memory: each variant in a fresh process. After the logits exist and a call on a few tokens has loaded every library, the
kernel's high-water mark of resident memory is reset (/proc/self/clear_refs, Linux); "peak extra" is how far one forward
and backward then raise it above the resident memory before.

    python tools/benchmarks/reference_loss.py --json tools/benchmarks/results/reference_loss.json
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout needs no installation

from megatron_idft import vocab_parallel_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_SPEEDUP = 2.0
MAX_MEMORY_RATIO = 0.25
MIB = 2**20


def overwriting(logits: Tensor, labels: Tensor) -> Tensor:
    return vocab_parallel_loss(logits, labels, "idft", backend="reference", overwrite_logits=True).loss.sum()


def copying(logits: Tensor, labels: Tensor) -> Tensor:
    return vocab_parallel_loss(logits, labels, "idft", backend="reference").loss.sum()


def textbook(logits: Tensor, labels: Tensor) -> Tensor:
    probs = torch.softmax(logits.float(), dim=-1)
    log_probs = torch.log(probs)
    entropy = -(probs * log_probs).sum(dim=-1)
    log_prob = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    gamma = torch.exp(-(log_prob + entropy)).clamp(0.1, 2.0)
    weight = torch.exp(gamma * log_prob).detach()
    return -(weight * log_prob).sum()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


VARIANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "overwriting": overwriting,
    "copying": copying,
    "textbook": textbook,
    "cross_entropy": cross_entropy,
}


class OutputLayer(torch.autograd.Function):
    """Stands in for a model's output layer: makes the logits, consumes their gradient, costs nothing in backward."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(()), None


def make_inputs(tokens: int, vocab: int, dtype: str) -> tuple[Callable[[], Tensor], Tensor]:
    """A function that makes the logits anew, and the labels."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(tokens, vocab, generator=generator, dtype=DTYPES[dtype])
    parameter = torch.zeros((), dtype=DTYPES[dtype], requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    return lambda: OutputLayer.apply(parameter, values), labels


def measure_times(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of forward and backward by variant."""
    make_logits, labels = make_inputs(args.tokens, args.vocab, args.dtype)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for round_number in range(args.repeats + 1):
        for name, variant in VARIANTS.items():
            logits = make_logits()
            start = time.perf_counter()
            variant(logits, labels).backward()
            if round_number > 0:
                seconds[name].append(time.perf_counter() - start)
            del logits
    return {name: statistics.median(values) for name, values in seconds.items()}


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_peak(args: argparse.Namespace) -> int:
    """Bytes by which one forward and backward raise this process's peak resident memory."""
    variant = VARIANTS[args.peak_of]
    make_few, few_labels = make_inputs(4, 16, args.dtype)
    variant(make_few(), few_labels).backward()
    make_logits, labels = make_inputs(args.tokens, args.vocab, args.dtype)
    logits = make_logits()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    variant(logits, labels).backward()
    return resident_bytes("VmHWM") - before


def measure_peaks(args: argparse.Namespace) -> dict[str, int]:
    shape = ["--tokens", str(args.tokens), "--vocab", str(args.vocab), "--dtype", args.dtype]
    return {
        name: int(subprocess.check_output([sys.executable, __file__, *shape, "--peak-of", name], text=True))
        for name in VARIANTS
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def verdict(hit: bool) -> str:
    return "hit" if hit else "MISS"


def report(
    args: argparse.Namespace, times: dict[str, float], peaks: dict[str, int], load_average: float
) -> dict[str, Any]:
    speedups = {name: times["textbook"] / times[name] for name in VARIANTS}
    memory_ratios = {name: peaks[name] / peaks["textbook"] for name in VARIANTS}
    goals = {
        name: {"speedup": speedups[name] >= MIN_SPEEDUP, "memory": memory_ratios[name] <= MAX_MEMORY_RATIO}
        for name in ("overwriting", "copying")
    }
    print(f"T={args.tokens} V={args.vocab} {args.dtype}, {args.repeats} rounds")
    print(f"{torch.get_num_threads()} threads, load average {load_average:.1f} at the start")
    print(f"{'variant':15}{'ms':>9}{'times the textbook speed':>27}{'peak extra MiB':>17}{'share of textbook':>20}")
    for name in VARIANTS:
        speed, memory = f"{speedups[name]:.2f}", f"{memory_ratios[name]:.3f}"
        if name in goals:
            speed = f"{verdict(goals[name]['speedup'])} {speed}"
            memory = f"{verdict(goals[name]['memory'])} {memory}"
        print(f"{name:15}{times[name] * 1e3:9.1f}{speed:>27}{peaks[name] / MIB:17.1f}{memory:>20}")
    print(f"goals, judged for overwriting: >= {MIN_SPEEDUP} times the speed, <= {MAX_MEMORY_RATIO} of the memory")
    return {
        "benchmark": "reference_loss",
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": load_average,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokens": args.tokens,
        "vocab": args.vocab,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "median_seconds": times,
        "peak_extra_bytes": peaks,
        "logits_bytes": args.tokens * args.vocab * DTYPES[args.dtype].itemsize,
        "time_textbook_over_variant": speedups,
        "memory_variant_over_textbook": memory_ratios,
        "goals_hit": goals,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--threads", type=int, help="torch threads; one gives steadier ratios on a busy machine")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--peak-of", choices=VARIANTS, help="only measure this variant's peak, in bytes")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        print(measure_peak(args))
        return
    load_average = os.getloadavg()[0]
    result = report(args, measure_times(args), measure_peaks(args), load_average)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
