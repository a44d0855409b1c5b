"""Fill a Triton cache for sm_90 on a machine without a GPU: with the kernels of the GPU tests and of the benchmarks.

    python tools/benchmarks/triton_cache.py [FOLDER]      default: .cache/triton-sm90, which gpu.sh uses

On a GPU machine that is lent by the minute a fifth of the tests' time is Triton's compiler. What it makes is found by
the kernel's source, its arguments' types, the target and the files of Triton itself, so this must run under the very
Triton of the GPU machine; with another the cache is of no use and does no harm.

The kernels of the benchmark come from its own calls (ahead_of_time.py). For the tests, every tensor stands on the CPU
and a launch compiles its kernel and ends: the tests fail at their first comparison, behind the launches.
"""

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path

DECODED = [(28, 4, 128)]  # decoding.py's shape on a GPU
INTERMEDIATE = (".source", ".ttir", ".ttgir", ".llir", ".ptx")
CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))  # a checkout needs no installation


class CountOutcomes:
    """A pytest plugin. The tests cannot pass; one that ends before its first launch is the exception."""

    def __init__(self) -> None:
        self.tests = 0

    def pytest_runtest_logreport(self, report: object) -> None:
        self.tests += getattr(report, "when", "") == "call"


def compile_tests() -> int:
    """Run the tests that are marked `gpu`. How many there were."""
    import pytest
    from hypothesis import HealthCheck, Phase, settings

    from megatron_idft.integration.platform import cpu

    cpu.enable(trainer=False)
    settings.register_profile(
        "compile", phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck), deadline=None
    )
    settings.load_profile("compile")
    plugin = CountOutcomes()
    words = [
        "-q",
        "--no-header",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        "-k",
        "not [reference and not -reference",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        files = (CHECKOUT / "tests" / "loss", CHECKOUT / "tests" / "inference" / "test_paged_attention.py")
        pytest.main([*words, *map(str, files)], plugins=[plugin])
    return plugin.tests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=CHECKOUT / ".cache" / "triton-sm90")
    folder = parser.parse_args().folder.resolve()
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"}
    os.chdir(CHECKOUT)
    import loss
    import torch
    import triton
    from ahead_of_time import call_paged_attention, compile_all

    with contextlib.redirect_stdout(io.StringIO()):
        compile_all(loss.CASES, {})  # from here on a launch only compiles
        for heads, kv_heads, d in DECODED:
            call_paged_attention(heads, kv_heads, d, torch.bfloat16)
    of_benchmark = len(list(folder.glob("*/*.cubin")))
    tests = compile_tests()
    for file in folder.rglob("*"):
        if file.suffix in INTERMEDIATE:  # nine tenths of the bytes; Triton reads what is there
            file.unlink()
    cubins = len(list(folder.glob("*/*.cubin")))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(
        f"{folder}: {cubins} kernels for sm_90 by Triton {triton.__version__}, {size / 2**20:.1f} MiB;"
        f" {of_benchmark} of the benchmark, the others of {tests} tests"
    )
    return 0 if tests and cubins > of_benchmark else 1


if __name__ == "__main__":
    sys.exit(main())
