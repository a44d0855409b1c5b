"""How many responses a 7B decodes at once with 64 GiB for keys and values: in slots, as before, and in blocks.

    tools/benchmarks/rows_at_once.py [--gib 64] [--mean 800]

Nothing is decoded: the scheduler and the allocator of the decode engine run without tensors (inference/scheduler.py,
blocks.py), as fast as Python lets them, for responses whose lengths are drawn beforehand. The shape is Qwen2.5-7B's: 28
layers, 4 key-value heads of 128 numbers, bf16, so 57,344 bytes a token. Prompts as in decoding.py: 120 tokens without a
hint, 2,500 with one, of which the first 600 are instructions that all hints share. Responses have up to 8,192 tokens,
lengths from an exponential distribution of the given mean.

A slot had room for the longest prompt and the longest response, rounded up to 256 positions; a pair had two. That is a
calculation. In blocks as many begin as fit when they are half-written. What is printed is the mean over the steps while
more responses wait, the fewest in one of these steps, and how often a response gave way to older ones and was computed
again, of all that were decoded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout needs no installation

from megatron_idft.inference.blocks import BlockPool
from megatron_idft.inference.requests import DecodeSettings, Request, Sampling, Stopping
from megatron_idft.inference.scheduler import Response, Scheduler

LAYERS, KV_HEADS, HEAD_SIZE, ITEM_BYTES = 28, 4, 128, 2
BYTES_PER_TOKEN = 2 * LAYERS * KV_HEADS * HEAD_SIZE * ITEM_BYTES
PLAIN, HINTED, INSTRUCTIONS, LONGEST = 120, 2500, 600, 8192
SLOT_MULTIPLE = 256


class AtOnce(NamedTuple):
    """Responses at once: mean and fewest over steps while others wait; gave_way: of all, 1 for each time."""

    mean: float
    fewest: int
    gave_way: float


def in_slots(gib: float, hinted: bool) -> int:
    """Responses at once with slots of the longest prompt and response."""
    prompts = [PLAIN, HINTED] if hinted else [PLAIN]
    positions = sum(-(-(prompt + LONGEST) // SLOT_MULTIPLE) * SLOT_MULTIPLE for prompt in prompts)
    return int(gib * 2**30) // (positions * BYTES_PER_TOKEN)


def in_blocks(gib: float, hinted: bool, size: int, mean: float) -> AtOnce:
    """The same with blocks of `size` positions, by the engine's own scheduler and allocator."""
    rng = np.random.default_rng(0)
    held = PLAIN + mean / 2 + (HINTED - INSTRUCTIONS + mean / 2) * hinted  # positions of one, roughly
    rows = int(gib * 2**30 / BYTES_PER_TOKEN / held)  # --max-rows: those that fit half-written
    responses = 3 * rows
    lengths = np.minimum(rng.exponential(mean, responses).astype(int) + 1, LONGEST)
    instructions = rng.integers(0, 1 << 17, INSTRUCTIONS)
    settings = DecodeSettings(Sampling(), Stopping((), LONGEST))

    def request(number: int) -> Request:
        hint = np.concatenate([instructions, rng.integers(0, 1 << 17, HINTED - INSTRUCTIONS)]) if hinted else None
        return Request(str(number), rng.integers(0, 1 << 17, PLAIN), hint, settings=settings)

    pool = BlockPool(int(gib * 2**30) // (size * BYTES_PER_TOKEN), size)
    left = list(range(responses))[::-1]
    scheduler = Scheduler(
        pool, rows, lambda number, given: Response(number, given, settings, settings.stopping.max_tokens)
    )
    counts: list[int] = []
    while True:
        scheduler.grow()
        scheduler.admit(lambda: request(left.pop()) if left else None)
        pool.computed()
        running = list(scheduler.running)
        if not left:  # from here on the pool empties
            steps = np.array(counts[len(counts) // 4 :])  # the first rows all begin together
            return AtOnce(float(steps.mean()), int(steps.min()), scheduler.preempted / responses)
        counts.append(len(running))
        for response in running:
            response.tokens.append(0)
            scheduler.advance(response)
            if len(response.tokens) == lengths[int(response.request.id)]:
                scheduler.finish(response)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=64.0)
    parser.add_argument("--mean", type=float, default=800.0, help="tokens of a response")
    args = parser.parse_args()
    print(f"{args.gib:g} GiB, {BYTES_PER_TOKEN:,} bytes a token; responses of {args.mean:g} tokens in the mean")
    print(f"{'':24}{'slots':>8}{'blocks':>10}{'fewest':>8}{'times':>7}{'gave way':>10}")
    for hinted in (False, True):
        before = in_slots(args.gib, hinted)
        for size in (64, 256):
            found = in_blocks(args.gib, hinted, size, args.mean)
            name = f"{'pairs' if hinted else 'responses'}, blocks of {size}"
            print(
                f"{name:24}{before:8,}{found.mean:10,.0f}{found.fewest:8,}{found.mean / before:7.1f}"
                f"{found.gave_way:10.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
