"""The command for a GPU machine, tried where there is none: its stages, its clock and its refusals."""

import os
import subprocess
import sys
from pathlib import Path

from launch import ROOT

SCRIPT = ROOT / "tools" / "benchmarks" / "gpu.sh"


def run(results: Path, *stages: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), str(results), *stages],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_stages_run_and_are_summed_up(tmp_path):
    done = run(tmp_path, "environment", "sanitizer", GPU_SH_DRY_RUN="cpu")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "training can start" in done.stdout
    lines = (tmp_path / "summary.txt").read_text().splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [["environment", "passed"], ["sanitizer", "passed"]]
    assert (tmp_path / "logs.tar.gz").stat().st_size > 0


def test_a_stage_without_time_fails_the_command(tmp_path):
    done = run(tmp_path, "environment", GPU_SH_DRY_RUN="cpu", GPU_SH_SECONDS="4")
    assert done.returncode == 1
    assert "no time left" in (tmp_path / "summary.txt").read_text()


def test_refusals_name_the_remedy(tmp_path):
    done = run(tmp_path, "benchmarks", GPU_SH_DRY_RUN="cpu")
    assert done.returncode == 2
    assert "unknown stage benchmarks; there are environment tests" in done.stderr
    done = run(tmp_path, GPU_SH_DRY_RUN="", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "sees no GPU" in done.stderr and "tests/run.sh" in done.stderr
