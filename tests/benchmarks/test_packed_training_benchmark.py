"""The benchmark of training from packs, run whole on a toy corpus: both variants train the same tokens."""

import json
import subprocess

import pytest

from tests.launch import ROOT, forking_python

PROGRAM = ROOT / "tools" / "benchmarks" / "packed_training.py"


def test_padded_and_packed_records_are_measured(tmp_path):
    command = [forking_python(), str(PROGRAM), "--smoke", "--json", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "r.json").read_text())
    [padded], [packed] = result["runs"]["padded"], result["runs"]["packed"]
    assert padded["trained_tokens"] == packed["trained_tokens"] == result["data"]["trained_tokens"] > 0
    assert (padded["iterations"], packed["iterations"]) == (result["data"]["records"], result["data"]["packs"])
    rates, shares = result["trained_tokens_per_second"], result["data"]["share_of_text"]
    assert rates["padded"]["median"] == padded["tokens_per_second"]
    assert result["speed_up"] == packed["tokens_per_second"] / padded["tokens_per_second"] > 0
    assert result["ceiling"] == pytest.approx(result["data"]["records"] / result["data"]["packs"])
    assert result["ceiling"] == shares["packed"] / shares["padded"] and shares["packed"] <= 1
    assert ("hit: packs" in done.stdout) == result["goal_hit"] and result["expectation"]
