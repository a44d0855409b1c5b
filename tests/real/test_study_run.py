"""The study's run.sh at size smoke, with the real model's first two layers: killed, started again, reported."""

import json
import os
import signal
import subprocess
import time

import pytest

from tests.launch import ROOT, forking_python

SCRIPT = ROOT / "examples" / "study" / "run.sh"
ARMS = ("sft", "idft", "idft-noisy")


def test_a_killed_study_goes_on_and_ends_in_its_report(shallow, tmp_path):
    out = tmp_path / "out"
    environment = os.environ | {"MODEL": str(shallow), "PYTHON": forking_python()}
    command = ["bash", SCRIPT, "--size", "smoke", "--out", out]
    first = out / "results" / "sft@1e-4@1.json"
    with open(tmp_path / "killed.log", "w") as log:
        killed = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 200
        while killed.poll() is None and not first.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert killed.poll() is None and first.exists(), (tmp_path / "killed.log").read_text()
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    finished = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    assert not (out / "results" / "idft-noisy@1e-4@1.json").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # nothing is done twice
    assert not list((out / "work").iterdir())

    report = json.loads((out / "report.json").read_text())
    assert report["means_nothing"] and "the numbers mean nothing" in (out / "study.md").read_text()
    assert {arm["arm"] for arm in report["arms"]} == set(ARMS)
    for arm in report["arms"]:
        assert [point["step"] for point in arm["points"]] == [0, 1, 2]
        distances = [point["kl"] for point in arm["points"]]
        assert distances[0] == 0 and 1e-6 < abs(distances[-1]) < 1, distances  # an estimate from 192 tokens
        assert all(0 < arm["phi"][when][1] < 30 for when in ("before", "during", "after"))
    before, after = report["where"]["original, before"], report["where"]["original, after idft"]
    assert before["tokens"] == after["tokens"] > 100 and "noisy, before" in report["where"]
    for found in (before, after):
        assert sum(kind["share"] for kind in found["kinds"].values()) == pytest.approx(1)
        for loss in found["losses"].values():
            assert sum(kind["share"] for kind in loss.values()) == pytest.approx(1)
    assert before["kinds"]["words"]["cross_entropy"] != after["kinds"]["words"]["cross_entropy"]
    other = subprocess.run([*command, "--size", "cpu"], env=environment, capture_output=True, text=True, check=False)
    assert other.returncode == 1 and "another version or size" in other.stderr
