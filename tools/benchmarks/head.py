"""Time and memory of the output head, from hidden states to loss and gradients, beside other libraries' heads.

    python tools/benchmarks/head.py --out RESULTS                 on a GPU: measures; a few minutes
    python tools/benchmarks/head.py --out RESULTS                 without one: the cases for a CPU
    python tools/benchmarks/head.py --out RESULTS --smoke         without one: the whole program, interpreted, tiny
    --quick measures the cases that goals are about.

Written to RESULTS: head.json with every figure, and what is printed as head.txt.

Each head is first compared with a float64 answer: the loss, rows of the hidden states' gradient and columns of the
weight's; one that disagrees is listed as wrong and not timed. Heads take turns, call by call. How a call is timed and
its memory counted: head_measure.py. Tensor parallelism is emulated: one rank's columns, and collectives that cost no
latency but are counted: emulated_group.py. Ours compute entropy and weight of every token for IDFT, always; others say
in their names whether they compute the entropy, and none has a weight.

The measure of speed is the time of the head's matrix products alone: two, three or four products of the same shape by
torch (cuBLAS) over the trained tokens, in the same turns. Of the default head the shares of products, loss kernels,
collectives and the rest of the device's time are printed, by torch's profiler.

Expected before the first run, for bf16 on an H200 (790 Tflop/s in products, 4.3 TB/s), at T = 8192, H = 4096, V =
131072: a product takes 11.1 ms, so three 33.4 and four 44.5.

    materialised, ours                  33.4 + 6 bytes an element, 1.5 ms               35 ms    2 GiB
    materialised, Megatron native       33.4 + 49 bytes an element, 12 ms               46 ms   12 GiB
    fused, chunks of 4096               33.4 + 14 bytes an element, 3 ms, + dW, 2 ms    38 ms  1.3 GiB
    fused, default (chunks of 1024)     33.4 + 3 ms + dW, 8 x 1 ms, half of it hidden   41 ms  0.4 GiB
    fused, chunks of 512                33.4 + 3 ms + dW, 16 x 1 ms                     46 ms  1/8 of the logits
    fused, recomputing                  44.5 + 5 ms                                     50 ms
    fused, frozen head                  22.3 + 3 ms                                     25 ms
    others                              Liger Triton 154 (its chunks have 256 tokens; published), Liger CuTe 35 and its
                                        tensor-parallel form 46 (published), verl 75, cut-cross-entropy 60, TRL 50

14 bytes: the products write fp32 logits (4, where bf16 ones are 2 and count as part of the product), two kernels read
them (8) and the second writes the gradient in bf16 (2). So 36 ms is a goal that the fp32 logits may miss, and the
materialised head may be the fastest of all where its logits fit.

On a CPU in fp32, where products take 9/10 of the time: as fast as materialised, and a tenth of the memory. In bf16 on a
processor with instructions for it the materialised head multiplies in bf16, ten times as fast as the fused one, whose
logits are fp32 sums that torch has for 32-bit factors only: there it must lose.

Goals, misses printed like hits. On a GPU, for T >= 2048 and every token trained:

    products    <= 1.10 of three products with chunks >= 3000 tokens
    memory      <= 1.30 of three products with at most 1/8 of the bf16 logits' memory, for T = 8192
    fastest     faster than every other library's head
    time        8192 x 4096 x 131072 in <= 36 ms on an H200, whatever tp divides it by
    frozen      <= 1.10 of two products
On a CPU:
    memory      <= 1/8 of what the materialised head needs
    time        no slower than the materialised head
"""

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))  # a checkout needs no installation

from loss import DTYPES, copied_output, describe_machine, print_goals  # noqa: E402

TIMED_CALLS = 7
WARM_UP = 2
CHUNKS = (512, 2048, 4096)
SHARES_OF = "fused"


class Case(NamedTuple):
    """One shape, with the project that publishes figures for it.

    width: H. columns: V/tp. trained: share of tokens that are not ignored. compared: "all" heads, or "rivals" (the
    default head, chunks of 4096, the materialised one and the other libraries).
    """

    name: str
    source: str
    tokens: int
    width: int
    columns: int
    tp: int = 1
    dtype: str = "bf16"
    trained: float = 1.0
    compared: str = "rivals"
    quick: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def _sweep(pairs: str) -> list[Case]:
    shapes = [tuple(map(int, pair.split("x"))) for pair in pairs.split()]
    return [Case(f"2048 x {width} x {columns}", "Liger's models", 2048, width, columns) for width, columns in shapes]


# In the order of their value: a limit of time cuts the end. Letters are those of the list that they were chosen from.
CASES = [
    Case("8192 x 4096 x 131072, tp 1", "h: Liger, verl", 8192, 4096, 131072, compared="all", quick=True),
    Case("8192 x 4096 x 131072, tp 8", "h: Liger, verl", 8192, 4096, 16384, 8, compared="all", quick=True),
    Case(
        "8192 x 4096 x 131072, 30 % trained",
        "h: Liger, verl",
        8192,
        4096,
        131072,
        trained=0.3,
        compared="all",
        quick=True,
    ),
    Case("8192 x 4096 x 151936", "l: TRL", 8192, 4096, 151936),
    Case("8192 x 2304 x 256000", "k: cut-cross-entropy", 8192, 2304, 256000),
    Case("4096 x 7168 x 129280", "j: Megatron dev", 4096, 7168, 129280),
    Case("4096 x 7168 x 129280, tp 8", "j: Megatron dev", 4096, 7168, 16160, 8),
    Case("8192 x 4096 x 131072, tp 2", "h: Liger, verl", 8192, 4096, 65536, 2),
    Case("8192 x 4096 x 131072, tp 4", "h: Liger, verl", 8192, 4096, 32768, 4),
    Case("32768 x 4096 x 131072", "h: Liger, verl", 32768, 4096, 131072),
    Case("512 x 4096 x 131072", "h: Liger, verl", 512, 4096, 131072),
    Case("1024 x 4096 x 131072", "h: Liger, verl", 1024, 4096, 131072),
    Case("2048 x 4096 x 131072", "h: Liger, verl", 2048, 4096, 131072),
    Case("4096 x 4096 x 131072", "h: Liger, verl", 4096, 4096, 131072),
    Case("16384 x 4096 x 131072", "h: Liger, verl", 16384, 4096, 131072),
    *_sweep("4096x32000 4096x128256 3584x152064 5120x152064 8192x152064 2048x102400 7168x129280"),
]

CPU_CASES = [
    Case("4096 x 576 x 32000, fp32", "a CPU", 4096, 576, 32000, 1, "fp32", compared="all", quick=True),
    Case("4096 x 576 x 32000, fp32, 30 % trained", "a CPU", 4096, 576, 32000, 1, "fp32", 0.3, "all"),
    Case("4096 x 576 x 32000, bf16", "a CPU", 4096, 576, 32000, 1, "bf16", compared="all"),
]

RIVALS = ("fused", "fused, chunks of 4096", "materialised, overwriting")


def tiny(case: Case) -> Case:
    """The case for an interpreter: few tokens, short rows."""
    return case._replace(tokens=6, width=128, columns=max(case.columns // 1024, 8) // 8 * 8)


def main() -> int:
    args = parse_arguments()
    # Read when a kernel is defined, so before any of them is imported.
    os.environ["TRITON_INTERPRET"] = "1" if args.smoke else "0"
    if args.smoke:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if args.smoke or args.threads:
        torch.set_num_threads(args.threads or 1)
    on_gpu = torch.cuda.is_available() and not args.smoke
    cases = [case for case in (CASES if on_gpu or args.smoke else CPU_CASES) if case.quick or not args.quick]
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "benchmark": "head",
        "mode": "smoke: times mean nothing" if args.smoke else "measured",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine() if on_gpu else {**describe_machine(), **describe_processor()},
        "timed_calls": 1 if args.smoke else args.calls,
    }
    with copied_output() as printed:
        print(" | ".join(f"{name} {value}" for name, value in result["machine"].items()))
        failed = measure_all([tiny(case) for case in cases] if args.smoke else cases, args, result, on_gpu)
    save(result, args.out)
    (args.out / "head.txt").write_text(printed.getvalue())
    print(f"written: {args.out / 'head.json'}, {args.out / 'head.txt'}")
    return 1 if failed else 0


def describe_processor() -> dict[str, Any]:
    from reference_loss import cpu_model

    return {"cpu": cpu_model(), "threads": torch.get_num_threads(), "load_average": round(os.getloadavg()[0], 1)}


def save(result: dict[str, Any], folder: Path) -> None:
    (folder / "head.json").write_text(json.dumps(result, indent=1) + "\n")


def measure_all(cases: list[Case], args: argparse.Namespace, result: dict[str, Any], on_gpu: bool) -> bool:
    """Fill in result["cases"] and ["goals"]. Whether something of ours is wrong or was not measured."""
    import head_peers
    from emulated_group import emulated_groups
    from head_report import judge, print_case
    from heads import ours, torch_heads

    started = time.monotonic()
    groups = emulated_groups()
    others, result["absent"], versions = head_peers.load(args.peers, with_kernels=on_gpu or args.smoke)
    result["machine"] |= versions
    for library, reason in result["absent"].items():
        print(f"absent: {library} ({reason})")
    chunks = (2,) if args.smoke else CHUNKS if on_gpu else (128, 512)
    heads = ours(chunks, "triton" if args.smoke else "auto") + others + torch_heads()
    result["cases"] = []
    for case in cases:
        record = {**case._asdict(), "heads": []}
        result["cases"].append(record)
        if time.monotonic() - started > args.time_limit:
            record["not_measured"] = f"the time limit of {args.time_limit:.0f} s had passed"
            print(f"\n{case.name}: not measured, {record['not_measured']}")
            continue
        chosen = [head for head in heads if takes_part(head, case)]
        measure_case(case, chosen, record, groups[case.tp], on_gpu, result["timed_calls"])
        print_case(record)
        save(result, args.out)  # in case that this is stopped
        if on_gpu:
            torch.cuda.empty_cache()
    result["seconds"] = round(time.monotonic() - started, 1)
    result["goals"] = judge(result["cases"], result["machine"]["device"], on_cpu=not on_gpu and not args.smoke)
    print_goals(result["goals"])
    if args.smoke:
        print("  interpreted, on tiny shapes: neither hits nor misses mean anything")
    return any(
        "not_measured" in record or any(one["ours"] and one["status"] != "measured" for one in record["heads"])
        for record in result["cases"]
    )


def takes_part(head: Any, case: Case) -> bool:
    if head.chunk > case.tokens:
        return False
    return case.compared == "all" or not head.ours or head.name in RIVALS


def measure_case(case: Case, heads: list[Any], record: dict[str, Any], group: Any, on_gpu: bool, calls: int) -> None:
    from functools import partial

    from head_measure import HeadBench, in_turns

    device = torch.device("cuda" if on_gpu else "cpu")
    bench = HeadBench(case.tokens, case.width, case.columns, case.torch_dtype, case.trained, group, device)
    record |= {"trained_tokens": bench.trained, "logits_bytes": bench.logits_bytes}
    entries = {head.name: check_head(bench, head, case) for head in heads}
    record["heads"] = list(entries.values())
    timed = {head.name: partial(bench.time_call, head) for head in heads if entries[head.name]["status"] == "measured"}
    for count in (2, 3, 4):
        timed[f"{count} products"] = partial(bench.time_products, count, bench.trained)
    times, failed = in_turns(timed, calls, WARM_UP if on_gpu else min(calls - 1, 1))
    for name in failed:
        entries[name] |= {"status": "failed", "reason": "out of memory"}
    record["products_ms"] = {count: times[f"{count} products"].summary()["forward_ms"] for count in (2, 3, 4)}
    mine = times[SHARES_OF].summary()["total_ms"] if SHARES_OF in times else None
    for head in heads:
        if head.name in times:
            entry = entries[head.name]
            entry |= times[head.name].summary()
            entry["over_products"] = entry["total_ms"] / record["products_ms"][head.products]
            entry["over_three_products"] = entry["total_ms"] / record["products_ms"][3]
            if mine:
                entry["time_over_ours"] = entry["total_ms"] / mine
            if head.name == SHARES_OF:
                entry["shares_ms"] = bench.shares(head)


def check_head(bench: Any, head: Any, case: Case) -> dict[str, Any]:
    """The head's entry, with its errors and memory; whether it is to be timed."""
    entry = {name: getattr(head, name) for name in ("name", "formula", "ours", "kind", "chunk", "products")}
    entry["status"] = "measured"
    if case.tp > 1 and not head.tensor_parallel:
        return entry | {"status": "left out", "reason": "has no tensor parallelism"}
    try:
        entry |= bench.check(head)
    except Exception as error:
        # A peer that fails must not end the benchmark. If it took the device with it, the next call raises.
        entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return entry
    if not entry["right"]:
        entry |= {"status": "wrong", "reason": "disagrees with float64"}
    return entry


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out", type=Path, default=CHECKOUT / ".cache" / "head", help="folder for JSON and table; default %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="only the cases that goals are about")
    parser.add_argument("--smoke", action="store_true", help="interpret the kernels on the CPU, on tiny shapes")
    parser.add_argument("--calls", type=int, default=TIMED_CALLS, help="timed calls of each head; default %(default)s")
    parser.add_argument("--threads", type=int, help="torch threads; one gives steadier ratios on a busy machine")
    parser.add_argument("--time-limit", type=float, default=210, help="seconds after which no further case starts")
    parser.add_argument(
        "--peers",
        type=Path,
        default=CHECKOUT / ".cache" / "peers",
        help="folder of unpacked wheels of other libraries, as tests/run.sh and gpu.sh make it; default %(default)s",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
