"""Time, memory and collectives of the vocab-parallel loss on one GPU, beside other libraries in the same run.

    python tools/benchmarks/loss.py --out RESULTS                 on a GPU: measures; a few minutes
    python tools/benchmarks/loss.py --out RESULTS                 without one: compiles for sm_90 and counts, no times
    python tools/benchmarks/loss.py --out RESULTS --smoke         without one: the whole program, interpreted, tiny
    python tools/benchmarks/loss.py --sweep                       launch parameters against those in use
    --quick measures four cases.

Written to RESULTS: loss.json with every figure, loss.png, and what is printed as loss.txt.

Each implementation is first compared with float64 on rows of the very logits that are then timed; one that disagrees is
listed as wrong and not timed. Implementations take turns, call by call. How a call is timed: measure.py. Tensor
parallelism is emulated: one rank's columns, and collectives that cost no latency but are counted: emulated_group.py.

The measure of speed is the counted bytes per logit element (implementations.py, peers.py) over the time, as a share of
the bandwidth of a device-to-device copy of the same logits, read and written, measured in the same turns.

Expected before the first run, for bf16. Bytes per element, forward + backward:

    triton, overwriting or copying       2 + 4 = 6     every objective, statistics included
    the same with 30 % of rows trained   0.6 + 2.6 = 3.2
    Transformer Engine, overwriting      2 + 4 = 6     copying: 4 + 4 = 8
    Liger vocab-parallel                 8 + 14 = 22
    Megatron native                      about 32 + 17 = 49     unfused: 38 + 14 = 52
    reference                            46 + 44 = 90

So at T = 8192, V = 131072, on a device that copies at 4.3 TB/s: forward 0.50 ms, backward 1.00 ms, 1.50 ms in all,
halved with each doubling of tp until launches show; Transformer Engine 1.0 (copying 1.3) times that if its kernels
reach the same bandwidth, Liger 3.7, Megatron native 8 and unfused 9 times. A read alone may run faster than a copy.

Goals, judged for the overwriting Triton backend, misses printed like hits:

    bandwidth   >= 90 % of the copy's in forward and in backward, where V/tp >= 16384 and the logits have >= 256 MiB
    fastest     faster than every other library in every case, forward + backward
    objective   time of IDFT / time of cross-entropy <= 1.02; of every other objective / of IDFT <= 1.01
    top K       counted bytes of objectives with a divergence to a reference's 20 tokens / of IDFT <= 1.15
    ignored     with 30 % of the rows trained <= 0.6 of the full time
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))  # a checkout needs no installation

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TIMED_CALLS = 15
MIB = 2**20

OURS = "triton idft, overwriting"
OURS_CE = "triton ce, overwriting"
OURS_STATISTICS = "triton log_prob+entropy"

MIN_SHARE_OF_COPY = 0.90
MIN_COLUMNS, MIN_LOGITS_BYTES = 16384, 256 * MIB
MAX_IDFT_OVER_CE = 1.02
MAX_OVER_IDFT = 1.01
MAX_TOP_K_BYTES = 1.15
MAX_TRAINED_30_OVER_FULL = 0.6


class Case(NamedTuple):
    """One shape, with the project that publishes figures for it.

    columns: V/tp. trained: share of tokens that are not ignored. compared: "all" implementations of a loss, "rivals"
    (the Triton backend and the fastest other libraries), "statistics" (log_prob and entropy, forward only), or
    "objectives" (every named one in the Triton backend).
    full_time: the case with every row trained that this one is compared with.
    """

    name: str
    source: str
    tokens: int
    columns: int
    tp: int = 1
    dtype: str = "bf16"
    trained: float = 1.0
    compared: str = "rivals"
    quick: bool = False
    full_time: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


CASES = [
    Case("8192 x 131072, tp 1", "Liger", 8192, 131072, 1, compared="all", quick=True),
    Case("8192 x 131072, tp 2", "Liger", 8192, 65536, 2, compared="all"),
    Case("8192 x 131072, tp 4", "Liger", 8192, 32768, 4, compared="all"),
    Case("8192 x 131072, tp 8", "Liger", 8192, 16384, 8, compared="all", quick=True),
    Case(
        "8192 x 131072, 30 % trained", "Liger", 8192, 131072, trained=0.3, full_time="8192 x 131072, tp 1", quick=True
    ),
    Case("8192 x 151936, log_prob and entropy", "TRL", 8192, 151936, compared="statistics", quick=True),
    Case("8192 x 151936, every objective", "Qwen2.5", 8192, 151936, compared="objectives", quick=True),
    Case("8192 x 151936, tp 8, every objective", "Qwen2.5", 8192, 18992, 8, compared="objectives"),
    Case("8192 x 152064, tp 1", "Qwen2.5", 8192, 152064, 1),
    Case("8192 x 152064, tp 2", "Qwen2.5", 8192, 76032, 2),
    Case("8192 x 152064, tp 4", "Qwen2.5", 8192, 38016, 4),
    Case("8192 x 152064, tp 8", "Qwen2.5", 8192, 19008, 8),
    Case("8192 x 131072, tp 2, fp32", "Liger", 8192, 65536, 2, "fp32"),
    Case("8192 x 131072, tp 2, fp16", "Liger", 8192, 65536, 2, "fp16"),
    Case("8192 x 50257", "GPT-2: rows at odd addresses", 8192, 50257),
    Case("8192 x 248320, tp 4", "SkyRL", 8192, 62080, 4),
    Case("4096 x 248320", "SpecForge", 4096, 248320),
    Case("32768 x 32000", "Automodel", 32768, 32000),
    Case("32768 x 32000, 30 % trained", "Automodel", 32768, 32000, trained=0.3, full_time="32768 x 32000"),
    Case("32768 x 4096", "quack", 32768, 4096),
    Case("32768 x 16384", "quack", 32768, 16384),
    Case("32768 x 65536", "quack", 32768, 65536),
    Case("8192 x 262144", "quack", 8192, 262144),
    Case("1024 x 131072", "few tokens", 1024, 131072),
    Case("128 x 131072", "few tokens", 128, 131072),
]

FORMULAS = {"all": ("ce", "idft"), "rivals": ("ce", "idft"), "statistics": ("statistics",)}
# Left out of "rivals": many times slower than the others, and torch.compile takes seconds per shape.
NO_RIVALS = ("Megatron", "reference", "torch")


def tiny(case: Case) -> Case:
    """The case for an interpreter: few tokens, a two-thousandth of the columns, odd where it was odd."""
    columns = max(case.columns // 2048, 1)
    return case._replace(tokens=8, columns=columns // 8 * 8 + 8 if case.columns % 8 == 0 else columns // 2 * 2 + 1)


def main() -> int:
    args = parse_arguments()
    cases = [case for case in CASES if case.quick or not args.quick]
    # Read when a kernel is defined, so before any of them is imported.
    os.environ["TRITON_INTERPRET"] = "1" if args.smoke else "0"
    if args.smoke:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        torch.set_num_threads(1)
    if args.sweep:
        from sweep import sweep

        return sweep(args.smoke, narrow=args.sweep == "narrow")
    measuring = args.smoke or (torch.cuda.is_available() and not args.compile_only)
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "benchmark": "loss",
        "mode": "smoke: times mean nothing" if args.smoke else "measured" if measuring else "ahead of time",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "timed_calls": 1 if args.smoke else TIMED_CALLS,
    }
    with copied_output() as printed:
        print(" | ".join(f"{name} {value}" for name, value in result["machine"].items()))
        if measuring:
            failed = measure_all([tiny(case) for case in cases] if args.smoke else cases, args, result)
        else:
            from ahead_of_time import compile_all

            failed = compile_all(cases, result)
    save(result, args.out)
    (args.out / "loss.txt").write_text(printed.getvalue())
    if measuring:
        from picture import draw

        draw(result, args.out / "loss.png")
    print(f"written: {', '.join(str(path) for path in sorted(args.out.glob('loss.*')))}")
    return 1 if failed else 0


def save(result: dict[str, Any], folder: Path) -> None:
    (folder / "loss.json").write_text(json.dumps(result, indent=1) + "\n")


def measure_all(cases: list[Case], args: argparse.Namespace, result: dict[str, Any]) -> bool:
    """Fill in result["cases"] and ["goals"]. Whether something of ours is wrong or was not measured."""
    import peers
    from emulated_group import emulated_groups
    from implementations import ours, plain_torch
    from objectives import every_objective

    started = time.monotonic()
    others, result["absent"], versions = peers.load(args.peers)
    result["machine"] |= versions
    for library, reason in result["absent"].items():
        print(f"absent: {library} ({reason})")
    implementations = ours() + every_objective() + others + plain_torch()
    groups = emulated_groups()
    device = torch.device("cpu" if args.smoke else "cuda")
    result["cases"] = []
    for case in cases:
        record = {**case._asdict(), "implementations": []}
        result["cases"].append(record)
        if time.monotonic() - started > args.time_limit:
            record["not_measured"] = f"the time limit of {args.time_limit:.0f} s had passed"
            print(f"\n{case.name}: not measured, {record['not_measured']}")
            continue
        chosen = [one for one in implementations if takes_part(one, case)]
        measure_case(case, chosen, record, groups[case.tp], device, result["timed_calls"])
        print_case(record)
        save(result, args.out)  # in case that this is stopped
        if device.type == "cuda":
            torch.cuda.empty_cache()
    result["seconds"] = round(time.monotonic() - started, 1)
    result["goals"] = judge(result["cases"])
    print_goals(result["goals"])
    if args.smoke:
        print("  interpreted, on tiny shapes: neither hits nor misses mean anything")
    return any(
        "not_measured" in record
        or any(one["ours"] and one["status"] != "measured" for one in record["implementations"])
        for record in result["cases"]
    )


def takes_part(implementation: Any, case: Case) -> bool:
    if case.compared == "objectives":
        return implementation.ours and implementation.name == f"triton {implementation.formula}, overwriting"
    left_out = case.compared == "rivals" and implementation.name.startswith(NO_RIVALS)
    return implementation.formula in FORMULAS[case.compared] and not left_out


def measure_case(
    case: Case, implementations: list[Any], record: dict[str, Any], group: Any, device: torch.device, calls: int
) -> None:
    from measure import WARM_UP, Bench, Times
    from objectives import top_k_bytes

    dtype = case.torch_dtype
    bench = Bench(case.tokens, case.columns, dtype, case.trained, group, device)
    record["trained_exactly"] = bench.trained
    records: dict[str, dict[str, Any]] = {}
    for one in implementations:
        records[one.name] = entry = {"name": one.name, "formula": one.formula, "ours": one.ours, "status": "measured"}
        record["implementations"].append(entry)
        if dtype not in one.dtypes:
            entry |= {"status": "left out", "reason": f"does not take {case.dtype}"}
            continue
        try:
            entry |= bench.check(one)
        except Exception as error:
            # A peer that fails must not end the benchmark. If it took the device with it, the next call raises.
            entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            continue
        if not entry["right"]:
            entry |= {"status": "wrong", "reason": "disagrees with float64"}
    timed = [one for one in implementations if records[one.name]["status"] == "measured"]
    times = {one.name: Times() for one in timed}
    copy_times, read_times = Times(), Times()
    warm_up = WARM_UP if device.type == "cuda" else 0
    for turn in range(warm_up + calls):
        if turn == warm_up:
            times = {one.name: Times() for one in timed}
            copy_times, read_times = Times(), Times()
        bench.time_copy(copy_times)
        bench.time_read(read_times)
        for one in list(timed):
            try:
                bench.time_call(one, times[one.name])
            except torch.cuda.OutOfMemoryError as error:
                records[one.name] |= {"status": "failed", "reason": str(error).splitlines()[0]}
                timed.remove(one)
                torch.cuda.empty_cache()
    elements = case.tokens * case.columns
    logits_bytes = elements * dtype.itemsize
    record["logits_bytes"] = logits_bytes
    record["copy_ms"] = copy_times.summary()["forward_ms"]
    record["copy_bytes_per_second"] = 2 * logits_bytes / record["copy_ms"] * 1e3
    record["read_ms"] = read_times.summary()["forward_ms"]
    record["read_bytes_per_second"] = logits_bytes / record["read_ms"] * 1e3
    for one in timed:
        entry = records[one.name]
        entry |= times[one.name].summary()
        for part, count in (("forward", one.forward_bytes), ("backward", one.backward_bytes)):
            counted = count(dtype.itemsize, bench.trained) if count is not None else None
            if counted is None or counted != counted or (part == "backward" and one.formula == "statistics"):
                continue
            entry[f"{part}_bytes_per_element"] = counted
            speed = counted * elements / entry[f"{part}_ms"] * 1e3
            entry[f"{part}_bytes_per_second"] = speed
            entry[f"{part}_share_of_copy"] = speed / record["copy_bytes_per_second"]
    if case.compared == "objectives":
        for one in timed:
            shape = (case.tokens, case.columns, dtype.itemsize)
            records[one.name] |= top_k_bytes(one.formula, partial(bench.call, one), *shape)
    yardstick = records.get(OURS_STATISTICS if case.compared == "statistics" else OURS, {}).get("total_ms")
    for one in timed:
        if yardstick:
            records[one.name]["time_over_ours"] = records[one.name]["total_ms"] / yardstick


def judge(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal on each case it is about: value, limit, hit."""
    goals: list[dict[str, Any]] = []

    def add(goal: str, case: str, value: float, limit: float, hit: bool) -> None:
        goals.append({"goal": goal, "case": case, "value": value, "limit": limit, "hit": hit})

    by_name = {record["name"]: record for record in records}
    for record in records:
        case = record["name"]
        entries = {one["name"]: one for one in record["implementations"] if one["status"] == "measured"}
        statistics_only = record["compared"] == "statistics"
        mine = entries.get(OURS_STATISTICS if statistics_only else OURS)
        if mine is None:
            continue
        if record["columns"] >= MIN_COLUMNS and record["logits_bytes"] >= MIN_LOGITS_BYTES:
            for part in ("forward",) if statistics_only else ("forward", "backward"):
                share = mine[f"{part}_share_of_copy"]
                add(f"bandwidth, {part}", case, share, MIN_SHARE_OF_COPY, share >= MIN_SHARE_OF_COPY)
        others = [one for one in entries.values() if not one["ours"]]
        if others:
            best = min(others, key=lambda one: one["total_ms"])
            ratio = mine["total_ms"] / best["total_ms"]
            add(f"fastest, against {best['name']}", case, ratio, 1.0, ratio < 1.0)
        if record["compared"] == "objectives":
            for one in entries.values():
                top_k = one.get("token_bytes_over_idft")
                if top_k is not None:
                    add(
                        f"top K, bytes of {one['formula']} / IDFT",
                        case,
                        top_k,
                        MAX_TOP_K_BYTES,
                        top_k <= MAX_TOP_K_BYTES,
                    )
                elif one["name"] not in (OURS, OURS_CE):
                    ratio = one["total_ms"] / mine["total_ms"]
                    add(f"objective, {one['formula']} / IDFT", case, ratio, MAX_OVER_IDFT, ratio <= MAX_OVER_IDFT)
        if OURS_CE in entries:
            ratio = mine["total_ms"] / entries[OURS_CE]["total_ms"]
            add("objective, IDFT / CE", case, ratio, MAX_IDFT_OVER_CE, ratio <= MAX_IDFT_OVER_CE)
        full = by_name.get(record["full_time"])
        full_entries = {one["name"]: one for one in full["implementations"]} if full else {}
        if full_entries.get(OURS, {}).get("status") == "measured":
            ratio = mine["total_ms"] / full_entries[OURS]["total_ms"]
            add("ignored, 30 % / all rows", case, ratio, MAX_TRAINED_30_OVER_FULL, ratio <= MAX_TRAINED_30_OVER_FULL)
    return goals


def print_case(record: dict[str, Any]) -> None:
    copy, read = record["copy_bytes_per_second"] / 1e9, record["read_bytes_per_second"] / 1e9
    print(
        f"\n{record['name']} ({record['source']}): [{record['tokens']}, {record['columns']}] {record['dtype']}, "
        f"{record['logits_bytes'] / MIB:.0f} MiB; copy {copy:.0f} GB/s, read {read:.0f} GB/s"
    )
    print(
        f"  {'':32}{'forward':>9}{'backward':>9}{'ms in all':>10}{'min-max':>16}{'x ours':>8}{'B/element':>13}"
        f"{'% of copy':>11}{'peak MiB':>10}{'calls':>6}{'KiB sent':>9}{'error':>9}"
    )
    for one in record["implementations"]:
        error = max(one.get("value_error", 0.0), one.get("gradient_error", 0.0))
        if one["status"] != "measured":
            print(f"  {one['name']:32}{one['status']}: {one['reason']}" + (f", error {error:.1e}" if error else ""))
            continue
        low, high = one["total_ms_min_max"]
        counted = [one.get(f"{part}_bytes_per_element") for part in ("forward", "backward")]
        shares = [one.get(f"{part}_share_of_copy") for part in ("forward", "backward")]
        bytes_text = "+".join(f"{value:.3g}" for value in counted if value is not None) or "not counted"
        share_text = ", ".join(f"{100 * value:.0f}" for value in shares if value is not None)
        peak = f"{one['peak_bytes'] / MIB:.0f}" if "peak_bytes" in one else ""
        ratio = f"{one['time_over_ours']:.2f}" if "time_over_ours" in one else ""
        print(
            f"  {one['name']:32}{one['forward_ms']:9.3f}{one['backward_ms']:9.3f}{one['total_ms']:10.3f}"
            f"{f'{low:.3f}-{high:.3f}':>16}{ratio:>8}{bytes_text:>13}{share_text:>11}{peak:>10}"
            f"{len(one['collectives']):6}{one['bytes_sent'] / 1024:9.0f}{error:9.0e}"
        )


def print_goals(goals: list[dict[str, Any]]) -> None:
    print("\nGoals")
    for goal in goals:
        verdict = "hit " if goal["hit"] else "MISS"
        print(f"  {verdict}  {goal['goal']:52}{goal['value']:8.3f}  limit {goal['limit']:<6g}{goal['case']}")
    print(f"  {sum(goal['hit'] for goal in goals)} of {len(goals)} hit")


def describe_machine() -> dict[str, Any]:
    machine: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(ImportError):
        import triton

        machine["triton"] = triton.__version__
    if not torch.cuda.is_available():
        return {"device": "no GPU", **machine}
    properties = torch.cuda.get_device_properties(0)
    machine = {"device": properties.name, "multiprocessors": properties.multi_processor_count, **machine}
    machine |= {"memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        machine["driver, clocks, power limit"] = subprocess.check_output(query, text=True, timeout=20).split("\n")[0]
    return machine


@contextlib.contextmanager
def copied_output() -> Iterator[io.StringIO]:
    """What is printed, kept as well."""
    kept, terminal = io.StringIO(), sys.stdout

    class Both(io.TextIOBase):
        def write(self, text: str) -> int:
            terminal.write(text)
            terminal.flush()
            return kept.write(text)

    with contextlib.redirect_stdout(Both()):
        yield kept


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=CHECKOUT / ".cache" / "loss",
        help="folder for JSON, table and picture; default %(default)s",
    )
    parser.add_argument("--quick", action="store_true", help="four cases only")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="interpret the kernels on the CPU, on tiny shapes; Triton 3.6 needs numpy < 2.4 for it",
    )
    parser.add_argument("--compile-only", action="store_true", help="no times, even where there is a GPU")
    parser.add_argument(
        "--sweep",
        nargs="?",
        const="all",
        choices=("all", "narrow"),
        help="time launch parameters and compare with those in use; narrow: few, for the widest vocabularies",
    )
    parser.add_argument("--time-limit", type=float, default=210, help="seconds after which no further case starts")
    parser.add_argument(
        "--peers",
        type=Path,
        default=CHECKOUT / ".cache" / "peers",
        help="folder of unpacked wheels of other libraries, as tests/run.sh and gpu.sh make it; default %(default)s",
    )
    args = parser.parse_args()
    if args.sweep and not (args.smoke or torch.cuda.is_available()):
        parser.error("--sweep measures, so it needs a GPU; --sweep --smoke tries it without one")
    return args


if __name__ == "__main__":
    sys.exit(main())
