"""What the loss and its metrics cost besides the kernels: host time and launches per micro-batch.

    python tools/benchmarks/hook_overhead.py --out RESULTS [--smoke]

4096 tokens over 152064 columns in bf16, as one micro-batch of Qwen2.5-7B; --smoke: a few on the CPU, where times mean
nothing. The calls are those of the hook (integration/loss/hook.py): the loss with cross-entropy values, in
place; then `LossMetrics.add`, which is plain torch. Host time is what Python takes to queue the work while the device
sleeps, launches are what torch's profiler counts. What the host takes matters only where it has nothing queued ahead.

Goal: loss and metrics together take less than 1 % of the step of a 7B model at 40 % of a GPU's peak, on the host and on
the device. Expected: about 0.5 ms on the host for the loss, 2 ms for the metrics' 100 small launches, of 470 ms.

Written to RESULTS: hook_overhead.json.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout needs no installation

from measure import OutputLayer

from megatron_idft import idft, vocab_parallel_loss
from megatron_idft.integration.loss.metrics import LossMetrics

STEP_FLOPS_PER_TOKEN = 6 * 7.6e9
PEAK_FLOPS, SHARE_OF_PEAK = 989e12, 0.4  # dense bf16 of an H100 or H200
GOAL = 0.01
CALLS = 20


class MicroBatch:
    def __init__(self, tokens: int, columns: int, device: torch.device) -> None:
        self.columns = columns
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.logits = torch.randn(tokens, 1, columns, device=device, dtype=dtype)
        self.labels = torch.randint(0, columns, (tokens, 1), device=device)
        self.mask = torch.ones(tokens, 1, device=device)
        self.parameter = torch.zeros((), device=device, requires_grad=True)
        self.objective = idft()
        self.metrics = LossMetrics(device, end_of_turn_ids=(1, 2), gamma_limits=(0.1, 2.0), vocab_size=columns)
        self.out: Any = None

    def loss(self) -> None:
        logits = OutputLayer.apply(self.parameter, self.logits.detach)
        backend = "triton" if logits.is_cuda else "reference"
        self.out = vocab_parallel_loss(
            logits,
            self.labels,
            self.objective,
            vocab_size=self.columns,
            backend=backend,
            overwrite_logits=True,
            cross_entropy_values=True,
        )

    def backward(self) -> None:
        self.out.loss.sum().backward()

    def add(self) -> None:
        self.metrics.add(self.objective, self.labels, self.out, self.mask)


def measure(call: Callable[[], None], before: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Medians: ms on the host until queued, ms on the device; and launches of one call."""
    host, on_device = [], []
    for _ in range(CALLS):
        before()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(20_000_000)  # about 10 ms: the host never waits, the device never idles
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
        start = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - start))
        if device.type == "cuda":
            ended.record()
            torch.cuda.synchronize()
            on_device.append(began.elapsed_time(ended))
    before()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    launches = sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)
    figures = {"host_ms": statistics.median(host), "launches": float(launches)}
    return figures | ({"device_ms": statistics.median(on_device)} if on_device else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    device = torch.device("cpu" if args.smoke else "cuda")
    tokens, columns = (64, 512) if args.smoke else (4096, 152064)
    batch = MicroBatch(tokens, columns, device)
    parts: dict[str, dict[str, float]] = {}
    for name, call, before in (
        ("loss", batch.loss, lambda: None),
        ("backward", batch.backward, batch.loss),
        ("metrics", batch.add, lambda: None),
    ):
        parts[name] = part = measure(call, before, device)
        print(f"{name:10}" + "".join(f"{key} {value:.3f}   " for key, value in part.items()), flush=True)
    step_ms = 1e3 * STEP_FLOPS_PER_TOKEN * tokens / (PEAK_FLOPS * SHARE_OF_PEAK)
    goals = []
    for where in () if args.smoke else ("host_ms", "device_ms"):
        share = sum(part[where] for part in parts.values()) / step_ms
        goals.append({"name": f"{where}, share of a 7B step", "value": share, "goal": GOAL, "hit": share <= GOAL})
        print(f"{'hit ' if share <= GOAL else 'MISS'}  {where}: {share:.2%} of {step_ms:.0f} ms (goal {GOAL:.0%})")
    result = {
        "benchmark": "hook_overhead",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu: times mean nothing",
        "torch": torch.__version__,
        "tokens": tokens,
        "columns": columns,
        "step_ms": step_ms,
        "parts": parts,
        "goals": goals,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "hook_overhead.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
