"""Launch parameters of the Triton kernels, timed over row widths, against the table in use.

For each width, logits of about 512 MiB in bf16. Every combination of warps, 16-byte vectors per lane and (forward only)
stages runs through the backend's own launches; results do not depend on them. Medians of few calls: a combination that
leads by less than the spread has not won.
"""

import math
import statistics
from collections.abc import Callable, Iterator

import torch
from measure import Clock

COLUMNS = (1024, 4096, 16384, 32000, 65536, 131072, 152064)
WARPS = (1, 2, 4, 8, 16)
VECTORS = (1, 2, 4, 8)
STAGES = (1, 2, 3)
LOGITS_BYTES = 2**29
CALLS = 7


def sweep() -> int:
    from megatron_idft import resolve_objective
    from megatron_idft.loss import triton_backend as backend
    from megatron_idft.loss.shard import VocabShard

    in_use = backend.launch_parameters
    objective = resolve_objective("idft")
    device = torch.device("cuda")
    for columns in COLUMNS:
        tokens = LOGITS_BYTES // (2 * columns)
        logits = torch.randn(tokens, columns, dtype=torch.bfloat16, device=device)
        gradient = torch.empty_like(logits)
        labels = torch.randint(0, columns, (tokens,), device=device)
        upstream = torch.ones(tokens, device=device)
        shard = VocabShard(0, columns, None)

        def forward(logits=logits, labels=labels, shard=shard, columns=columns) -> torch.Tensor:
            return backend.shard_state(logits, labels, shard, columns, objective.extra_statistics)

        results = backend.token_results(forward().unsqueeze(0), labels, objective, columns, False)

        def backward(
            logits=logits,
            gradient=gradient,
            labels=labels,
            upstream=upstream,
            results=results,
            shard=shard,
            columns=columns,
        ) -> None:
            backend.write_gradient(logits, gradient, labels, upstream, results, shard, columns)

        copy = _median(lambda logits=logits, gradient=gradient: gradient.copy_(logits))
        print(f"\n[{tokens}, {columns}] bf16; copy {copy:.3f} ms", flush=True)
        for name, call, stages, bytes_over_copy in (("forward", forward, STAGES, 0.5), ("backward", backward, (1,), 1)):
            table = in_use(2 * columns)
            timed = {}
            for launch in {table, *_launches(backend.Launch, stages)}:
                backend.launch_parameters = lambda row_bytes, launch=launch: launch
                try:
                    timed[launch] = _median(call)
                except Exception as error:
                    print(f"  {name} {tuple(launch)}: {type(error).__name__}")
            backend.launch_parameters = in_use
            ranking = sorted(timed, key=timed.__getitem__)
            for launch in dict.fromkeys((*ranking[:3], table)):
                share = bytes_over_copy * copy / timed[launch]
                mark = "   in use" if launch == table else ""
                print(
                    f"  {name:9}{launch.warps:3} warps{launch.vectors:3} vectors{launch.stages:3} stages"
                    f"{timed[launch]:9.3f} ms, {100 * share:.0f} % of the copy's bandwidth{mark}",
                    flush=True,
                )
    return 0


def _launches(make: Callable, stages: tuple[int, ...]) -> Iterator:
    for warps in WARPS:
        for vectors in VECTORS:
            for count in stages:
                yield make(warps, vectors, count)


def _median(call: Callable[[], object]) -> float:
    call()
    values = []
    for _ in range(CALLS):
        torch.cuda._sleep(200_000)
        clock = Clock(torch.device("cuda"))
        call()
        clock.mark()
        values.append(clock.milliseconds()[0])
    return statistics.median(values) if values else math.nan
