"""The command for a GPU machine, tried where there is none: its stages, its clock and its refusals."""

import os
import re
import signal
import subprocess
import tarfile
import time
from pathlib import Path

from tests.launch import ROOT, forking_python

SCRIPT = ROOT / "tools" / "benchmarks" / "gpu.sh"


def run(results: Path, *stages: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), str(results), *stages],
        env={**os.environ, "PYTHON": forking_python(), **environment},
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
    sizes = re.search(r"sizes: (\d+) MiB there .*, (\d+) files back .*, the largest (\d+) KiB", done.stdout)
    assert sizes is not None and 4 <= int(sizes[1]) <= 64 and int(sizes[2]) == 2 and int(sizes[3]) <= 16384


def test_what_cannot_travel_fails_the_dry_run(tmp_path):
    """A folder of wheels that is too large, and then a ninth file of results."""
    (tmp_path / "wheels").mkdir()
    with (tmp_path / "wheels" / "large.whl").open("wb") as file:
        file.truncate(70 << 20)
    results = tmp_path / "results"
    done = run(results, "sanitizer", GPU_SH_DRY_RUN="cpu", WHEELS=str(tmp_path / "wheels"))
    assert done.returncode == 1 and "(at most 64)" in done.stdout
    for number in range(7):
        (results / f"{number}.json").touch()
    done = run(results, "sanitizer", GPU_SH_DRY_RUN="cpu")
    assert done.returncode == 1 and ", 9 files back (at most 8)" in done.stdout


def test_a_stage_without_time_fails_the_command(tmp_path):
    done = run(tmp_path, "environment", GPU_SH_DRY_RUN="cpu", GPU_SH_SECONDS="4")
    assert done.returncode == 1
    assert "no time left" in (tmp_path / "summary.txt").read_text()


def test_what_was_there_stays_when_everything_is_killed(tmp_path):
    """The machine is taken away in the middle of a stage: neither traps nor a last line of the script run."""
    results, environment = tmp_path / "results", {"GPU_SH_DRY_RUN": "cpu", "GPU_SH_PACK_SECONDS": "0.5"}
    process = subprocess.Popen(
        ["bash", str(SCRIPT), str(results), "environment", "sweep"],
        env={**os.environ, "PYTHON": forking_python(), "TMPDIR": str(tmp_path), **environment},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while "environment" not in summary(results):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        written = (results / "logs.tar.gz").stat().st_mtime
        while (results / "logs.tar.gz").stat().st_mtime == written:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
        time.sleep(1)
        written = (results / "logs.tar.gz").stat().st_mtime
        time.sleep(1)
        assert (results / "logs.tar.gz").stat().st_mtime == written, "nothing goes on packing"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its stage
        process.wait()
    with tarfile.open(results / "logs.tar.gz") as logs:
        log = logs.extractfile("./environment.log")
        assert log is not None and b"training can start" in log.read()
    assert "sweep" not in summary(results)


def summary(results: Path) -> str:
    file = results / "summary.txt"
    return file.read_text() if file.exists() else ""


def test_stages_come_in_the_order_of_their_value():
    """Right or wrong first, and the attention kernel, which nobody has compiled and run, in it; then what is fast."""
    text = SCRIPT.read_text()
    stages = {name: words.split() for name, words in re.findall(r"^(first|second)=\((.*)\)", text, re.MULTILINE)}
    assert stages["first"] == ["environment", "values", "benchmark", "overhead", "decoding"]
    assert stages["second"] == ["output_head", "steps", "sanitizer", "sweep"]
    values = text[text.index("\nvalues() {") : text.index("\ntests() {")]
    for tested in ("tests/loss", "tests/inference/test_paged_attention.py", "tests/inference/test_engine_gpu.py"):
        assert (ROOT / tested).exists() and tested in values
    selected = [
        forking_python(),
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-m",
        "gpu",
        "tests/inference/test_paged_attention.py",
    ]
    found = subprocess.run(selected, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert "11/18 tests collected" in found.stdout, found.stdout


def test_the_limits_fit_into_thirteen_minutes():
    text = SCRIPT.read_text()
    limits = re.search(r"seconds_at_most=\((.*?)\)", text, re.DOTALL)
    assert limits is not None
    seconds = {name: int(value) for name, value in re.findall(r"\[(\w+)\]=(\d+)", limits[1])}
    totals = dict(re.findall(r"^ +(first|second)\) .*seconds \+ (\d+)", text, re.MULTILINE))
    for group, total in totals.items():
        stages = re.search(rf"^{group}=\((.*)\)", text, re.MULTILINE)
        assert stages is not None
        assert sum(seconds[stage] for stage in stages[1].split()) <= int(total) <= 600, group
    assert set(totals) == {"first", "second"} and sum(map(int, totals.values())) <= 780


def test_refusals_name_the_remedy(tmp_path):
    done = run(tmp_path, "benchmarks", GPU_SH_DRY_RUN="cpu")
    assert done.returncode == 2
    assert "unknown stage benchmarks; there are first (environment values" in done.stderr
    done = run(tmp_path, GPU_SH_DRY_RUN="", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "sees no GPU" in done.stderr and "tests/run.sh" in done.stderr


def test_the_study_says_that_its_model_must_be_brought(tmp_path):
    done = run(tmp_path, "study", GPU_SH_DRY_RUN="cpu", MODEL=str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert f"study: {tmp_path}/nothing is not here; examples/real_model/fetch.py writes it" in done.stdout
    assert summary(tmp_path).splitlines()[1].split()[:2] == ["study", "failed"]
