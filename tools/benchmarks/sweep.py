"""Launch parameters of the Triton kernels, timed over row widths, against the table in use.

For each width, logits of about 512 MiB in bf16. Every combination of warps, bytes per lane and block, and stages (in
forward only) runs through the backend's own launches; results do not depend on them. Medians of few calls: a
combination that leads by less than a few per cent has not won.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from measure import Clock

from megatron_idft import resolve_objective
from megatron_idft.loss import triton_backend
from megatron_idft.loss.shard import VocabShard


class Grid(NamedTuple):
    """What is tried; stages in forward only."""

    columns: tuple[int, ...]
    warps: tuple[int, ...]
    lane_bytes: tuple[int, ...]
    stages: tuple[int, ...]


ALL = Grid((1024, 4096, 16384, 32000, 65536, 131072, 152064), (1, 2, 4, 8, 16), (16, 32, 64, 128), (1, 2, 3))
# In a minute: around what is in use for the widest vocabularies.
NARROW = Grid((131072, 152064), (4, 8, 16), (64, 128), (1,))
LOGITS_BYTES = 2**29
CALLS = 7
SHOWN = 3


def sweep(smoke: bool = False, narrow: bool = False) -> int:
    """smoke: one tiny width on the CPU, interpreted, where times mean nothing."""
    grid = NARROW if narrow else ALL
    if smoke:
        sweep_width(2, 64, torch.device("cpu"), grid)
        return 0
    for columns in grid.columns:
        sweep_width(LOGITS_BYTES // (2 * columns), columns, torch.device("cuda"), grid)
    return 0


def sweep_width(tokens: int, columns: int, device: torch.device, grid: Grid) -> None:
    logits = torch.randn(tokens, columns, dtype=torch.bfloat16, device=device)
    gradient = torch.empty_like(logits)
    labels = torch.randint(0, columns, (tokens,), device=device)
    upstream = torch.ones(tokens, device=device)
    shard = VocabShard(0, columns, columns, None)

    def forward() -> torch.Tensor:
        return triton_backend.shard_state(logits, labels, shard, columns, frozenset())

    results = triton_backend.token_results(forward().unsqueeze(0), labels, resolve_objective("idft"), columns, False)

    def backward() -> None:
        triton_backend.write_gradient(logits, gradient, labels, upstream, results, shard, columns)

    copy_ms = median_ms(lambda: gradient.copy_(logits), device)
    print(f"\n[{tokens}, {columns}] bf16; copy {copy_ms:.3f} ms", flush=True)
    # The forward reads half of what a copy moves; the backward reads and writes as much.
    parts = (("forward", forward, grid.stages, copy_ms / 2), ("backward", backward, (1,), copy_ms))
    for name, call, stages, floor_ms in parts:
        in_use = triton_backend.launch_parameters(columns * logits.element_size())
        timed = time_launches(call, {in_use, *launches(grid, stages)}, device)
        ranking = sorted(timed, key=timed.__getitem__)
        for launch in dict.fromkeys((*ranking[:SHOWN], in_use)):
            print(
                f"  {name:9}{launch.warps:3} warps{launch.lane_bytes:4} bytes per lane{launch.stages:3} stages"
                f"{timed[launch]:9.3f} ms, {100 * floor_ms / timed[launch]:.0f} % of the copy's bandwidth"
                f"{'   in use' if launch == in_use else ''}",
                flush=True,
            )


def launches(grid: Grid, stages: tuple[int, ...]) -> Iterator[triton_backend.Launch]:
    for warps in grid.warps:
        for lane_bytes in grid.lane_bytes:
            for count in stages:
                yield triton_backend.Launch(warps, lane_bytes, count)


def time_launches(
    call: Callable[[], object], candidates: set[triton_backend.Launch], device: torch.device
) -> dict[triton_backend.Launch, float]:
    table = triton_backend.launch_parameters
    timed = {}
    try:
        for launch in candidates:
            triton_backend.launch_parameters = lambda row_bytes, launch=launch: launch
            timed[launch] = median_ms(call, device)
    finally:
        triton_backend.launch_parameters = table
    return timed


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    call()  # compiles
    values = []
    for _ in range(CALLS):
        if device.type == "cuda":
            torch.cuda._sleep(500_000)  # the device waits for Python, not the other way round
        clock = Clock(device)
        call()
        clock.mark()
        values.append(clock.milliseconds()[0])
    return statistics.median(values)
