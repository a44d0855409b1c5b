"""Compile every kernel of ours under several versions of Triton, for several GPUs, on a machine without any.

    for version in 3.4.0 3.5.1; do pip install --no-deps --target tritons/$version triton==$version; done
    python tools/benchmarks/triton_versions.py tritons/*

Writes tools/benchmarks/results/triton_kernels.json and, from it, docs/triton.md: registers, spilled bytes and the
widest access to global memory of each kernel, as its machine code says. Each version runs in a process of its own, for
an assertion of a compiler ends that. --interpret runs the kernels' interpreted tests under each version instead.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
CAPABILITIES = {80: "A100", 90: "H100, H200", 100: "B200"}
RESULT = CHECKOUT / "tools" / "benchmarks" / "results" / "triton_kernels.json"
PAGE = CHECKOUT / "docs" / "triton.md"
# Cases of loss.py, by name; the first of each kind of row, and which formulas.
LOSSES = {
    "8192 x 152064, tp 1": "bf16, 152064 columns",
    "8192 x 152064, tp 8": "bf16, 19008 columns",
    "8192 x 131072, tp 2, fp32": "fp32, 65536 columns",
    "8192 x 50257": "bf16, 50257 columns (odd rows)",
}
# Columns of the fused output head, whose gradient is in bf16.
HEADS = (152064, 19008, 50257)
# (heads, heads of keys, head size, dtype)
ATTENTIONS = [
    (28, 4, 128, "bfloat16"),
    (9, 3, 64, "bfloat16"),
    (32, 8, 128, "float32"),
]
# Interpreted: those that are about the kernels themselves.
TESTS = ["tests/loss/test_triton.py", "tests/inference/test_paged_attention.py"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="each with one Triton, as pip's --target makes it")
    parser.add_argument("--interpret", action="store_true", help="run the interpreted tests under each instead")
    parser.add_argument(
        "--out", type=Path, default=RESULT, help="the JSON; versions that it has stay; default %(default)s"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.one:
        for one in compile_here():
            print(json.dumps(one), flush=True)
        return 0
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"versions": {}}
    result["date"] = datetime.date.today().isoformat()
    for folder in args.folders or [None]:
        version = run(folder, "-c", "import triton; print(triton.__version__)").stdout.strip()
        entry = result["versions"].setdefault(version, {"kernels": []})
        if args.interpret:
            entry["interpreted"] = interpreted_under(folder)
        else:
            entry["kernels"] = compiled_under(folder)
        bad = [one for one in entry["kernels"] if one.get("error") or one["spilled_bytes"]]
        print(
            f"Triton {version}: {len(entry['kernels'])} kernels, {len(bad)} of them do not compile or spill;"
            f" interpreted: {entry.get('interpreted', 'not tried')}",
            flush=True,
        )
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.out == RESULT:
        PAGE.write_text(page(result))
    return int(any(one.get("error") or one["spilled_bytes"] for one in every_kernel(result)))


def run(folder: Path | None, *words: str, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
    """A Python process under the Triton of `folder`, compiling into a cache of its own."""
    paths = [*([str(folder.resolve())] if folder else []), str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as cache:
        environment = {"TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": str(int(interpreted))}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        return subprocess.run(
            [sys.executable, *words], env={**os.environ, **environment}, cwd=CHECKOUT, capture_output=True, text=True
        )


def compiled_under(folder: Path | None) -> list[dict[str, Any]]:
    """One entry for each kernel and capability; the last one names the error if the compiler ended the process."""
    done = run(folder, __file__, "--one")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        found.append({"kernel": "the next one", "error": done.stderr[-500:]})
    return found


def interpreted_under(folder: Path | None) -> str:
    """The last line of pytest, or of its error."""
    words = ["-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    done = run(folder, "-m", "pytest", *words, *TESTS, interpreted=True)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1].strip("= ")


def compile_here() -> Iterator[dict[str, Any]]:
    """Compile everything under this process's Triton."""
    import loss
    import torch
    from ahead_of_time import (
        call_fused_head,
        call_loss,
        call_paged_attention,
        compile_for,
        read_kernel,
        record_launches,
    )
    from emulated_group import emulated_groups
    from implementations import ours
    from objectives import every_objective

    launches = record_launches()
    groups = emulated_groups()
    idft = next(one for one in ours() if one.name == "triton idft, overwriting")

    def loss_of(case: Any, implementation: Any = idft) -> Callable[[], None]:
        group = groups[case.tp]
        group.reset()
        group.set_empty_state(torch.tensor(implementation.empty_state))
        return lambda: call_loss(implementation, case, group)

    calls: list[tuple[str, str, Callable[[], None]]] = []
    for case in loss.CASES:
        if case.name in LOSSES:
            calls.append((LOSSES[case.name], str(case.torch_dtype), loss_of(case)))
    whole = next(case for case in loss.CASES if case.name == next(iter(LOSSES)))
    calls += [(one.formula, str(whole.torch_dtype), loss_of(whole, one)) for one in every_objective()]
    calls += [
        (f"fused head, {columns} columns", "torch.bfloat16", partial(call_fused_head, 256, columns, torch.bfloat16))
        for columns in HEADS
    ]
    for heads, kv_heads, d, dtype in ATTENTIONS:
        shape = (heads, kv_heads, d, getattr(torch, dtype))
        calls.append(
            (f"{dtype}, {heads} heads, {kv_heads} of keys, {d} wide", dtype, partial(call_paged_attention, *shape))
        )
    seen = set()
    for capability in CAPABILITIES:
        compile_for(capability)
        for name, dtype, call in calls:
            launches.clear()
            try:
                call()
            except Exception as error:
                yield {"kernel": name, "capability": capability, "error": f"{type(error).__name__}: {error}"[:300]}
            for launch in launches:
                if launch.compiled.hash in seen:
                    continue
                seen.add(launch.compiled.hash)
                kernel = read_kernel(launch, getattr(torch, dtype.removeprefix("torch.")))
                kept = ("kernel", "warps", "registers", "spilled_bytes", "shared_bytes", "widest_load", "widest_store")
                yield {name: kernel[name] for name in kept} | {"capability": capability, "case": name}


def every_kernel(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for entry in result["versions"].values() for one in entry["kernels"]]


def page(result: dict[str, Any]) -> str:
    """docs/triton.md."""
    versions = sorted(result["versions"], key=lambda version: tuple(map(int, version.split("."))))
    lines = [
        HEAD.format(date=result["date"]),
        "| Triton | `test_triton.py`, `test_paged_attention.py`, interpreted |",
        "|---|---|",
    ]
    lines += [f"| {version} | {result['versions'][version].get('interpreted', 'not tried')} |" for version in versions]
    cells: dict[tuple[int, str, str], dict[str, str]] = {}
    for version in versions:
        for one in result["versions"][version]["kernels"]:
            key = (one.get("capability", 0), one["kernel"], one.get("case", ""))
            cells.setdefault(key, {})[version] = cell(one)
    for capability, cards in CAPABILITIES.items():
        lines += ["", f"## sm_{capability} ({cards})", ""]
        lines += [f"| kernel | of | {' | '.join(versions)} |", "|---" * (2 + len(versions)) + "|"]
        for (of, kernel, case), row in cells.items():
            if of == capability:
                values = " | ".join(row.get(version, "as above") for version in versions)
                lines.append(f"| `{kernel.removesuffix('_kernel').strip('_')}` | {case} | {values} |")
    return "\n".join(lines) + "\n"


def cell(one: dict[str, Any]) -> str:
    if one.get("error"):
        return "**does not compile**"
    spilled = f", **spills {one['spilled_bytes']} B**" if one["spilled_bytes"] else ""
    shared = one["shared_bytes"] // 1024
    shared = f", {shared} KiB" if shared > 2 else ""
    return f"{one['registers']}, {one['widest_load']}/{one['widest_store']} B{shared}{spilled}"


HEAD = """# Triton

Made by `python tools/benchmarks/triton_versions.py` on {date}; do not edit. No GPU has run these kernels.

Every kernel of ours, compiled without a GPU under the releases of Triton that `setup.py` admits: the registers of a
lane, the widest load and store of global memory in bytes (16 is the most), shared memory above 2 KiB, and what is
spilled. `shard_state`, `token_results`, `gradient` and `store_columns` are of the loss, those named after an objective
in bf16 over 152064 columns; `attend` and `merge` are of decoding without flash-attn. Where 8 bytes are the widest load,
that is a label: rows at odd addresses are read by elements. Of kernels that several shapes share, the first is named.
"""


if __name__ == "__main__":
    sys.exit(main())
