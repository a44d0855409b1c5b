"""Time and peak memory of the reference loss on this machine's CPU, forward and backward.

Three variants on the same logits [tokens, vocab]:

    reference      vocab_parallel_loss(logits, labels, "idft", backend="reference")
    textbook       the formulas written down as they stand: softmax, log, entropy and gather as [T, V] tensors, autograd
    cross_entropy  torch.nn.functional.cross_entropy, which needs neither entropy nor weight: what the stock loss costs

Goals, set before the first run, for T = 2048, V = 32000, fp32: the reference is at least 2x faster than the textbook
and peaks at no more than 1/4 of its extra memory.

Time: one process, one untimed round, then the variants take turns; the median over the rounds counts. The time includes
the backward pass into logits.grad. Several threads on cores that others use wait for each other after every pass, which
measures the others: the load average is recorded, and --threads 1 is for such machines.

Memory: each variant in a fresh process. After the inputs exist and a call on a few tokens has loaded every library, the
kernel's high-water mark of resident memory is reset (/proc/self/clear_refs, Linux); "peak extra" is how far one forward
and backward then raise it above the resident memory before. It contains logits.grad, [T, V] in the logits' dtype, which
every variant must produce; "beyond the gradient" is the rest, the variant's own working memory.

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


def reference(logits: Tensor, labels: Tensor) -> Tensor:
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
    "reference": reference,
    "textbook": textbook,
    "cross_entropy": cross_entropy,
}


def make_inputs(tokens: int, vocab: int, dtype: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, vocab, generator=generator, dtype=DTYPES[dtype]).requires_grad_()
    return logits, torch.randint(0, vocab, (tokens,), generator=generator)


def measure_times(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of forward and backward by variant."""
    logits, labels = make_inputs(args.tokens, args.vocab, args.dtype)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for round_number in range(args.repeats + 1):
        for name, variant in VARIANTS.items():
            logits.grad = None
            start = time.perf_counter()
            variant(logits, labels).backward()
            if round_number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_peak(args: argparse.Namespace) -> int:
    """Bytes by which one forward and backward raise this process's peak resident memory."""
    variant = VARIANTS[args.peak_of]
    small_logits, small_labels = make_inputs(4, 16, args.dtype)
    variant(small_logits, small_labels).backward()
    logits, labels = make_inputs(args.tokens, args.vocab, args.dtype)
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
    gradient = args.tokens * args.vocab * DTYPES[args.dtype].itemsize
    print(f"T={args.tokens} V={args.vocab} {args.dtype}, {args.repeats} rounds")
    print(f"{torch.get_num_threads()} threads, load average {load_average:.1f} at the start")
    print(f"{'variant':15}{'ms':>9}{'peak extra MiB':>16}{'beyond the gradient MiB':>25}")
    for name in VARIANTS:
        beyond = peaks[name] - gradient
        print(f"{name:15}{times[name] * 1e3:9.1f}{peaks[name] / MIB:16.1f}{beyond / MIB:25.1f}")
    speedup = times["textbook"] / times["reference"]
    memory_ratio = peaks["reference"] / peaks["textbook"]
    floor = gradient / peaks["textbook"]
    goals = {"speedup": speedup >= MIN_SPEEDUP, "memory": memory_ratio <= MAX_MEMORY_RATIO}
    print(f"textbook / reference time        {speedup:6.2f}   goal >= {MIN_SPEEDUP}    {verdict(goals['speedup'])}")
    hit = verdict(goals["memory"])
    print(f"reference / textbook memory      {memory_ratio:6.3f}   goal <= {MAX_MEMORY_RATIO}   {hit}")
    print(f"  the gradient alone             {floor:6.3f}")
    print(f"reference / cross_entropy time   {times['reference'] / times['cross_entropy']:6.2f}   no goal")
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
        "gradient_bytes": gradient,
        "time_textbook_over_reference": speedup,
        "memory_reference_over_textbook": memory_ratio,
        "memory_gradient_alone_over_textbook": floor,
        "time_reference_over_cross_entropy": times["reference"] / times["cross_entropy"],
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
