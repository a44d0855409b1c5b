"""The quickstart's run.sh from its first stage to its table, with the real model's first two layers."""

import json
import os
import re
import subprocess

from tests.launch import ROOT, forking_python

SCRIPT = ROOT / "examples" / "real_model" / "run.sh"
SIZES = {"SCORED": "4", "REALIGNED": "1", "OWN_SAMPLES": "2", "STEPS": "2", "MAX_NEW_TOKENS": "8"}


def test_run_sh_ends_in_a_table_and_goes_on_where_it_was(shallow, tmp_path):
    environment = os.environ | SIZES | {"MODEL": str(shallow), "PYTHON": forking_python()}
    command = ["bash", SCRIPT, "--out", tmp_path / "out"]
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    for done in (first, again):
        stages = re.findall(r"^\[ *\d+ s\] (\d)\. ", done.stdout, re.MULTILINE)
        assert stages == ["1", "2", "3", "4", "5"]
        assert re.search(r"validation lm loss +\d+\.\d+ at step 0, \d+\.\d+ at step 2 ", done.stdout)
        assert re.search(r"phi, own samples +[+-]\d\.\d+ ± \d\.\d+ per token", done.stdout)
        assert re.search(r"seconds: model \d+, score \d+, realign \d+, train \d+, ask \d+$", done.stdout, re.MULTILINE)
    assert "step 2 of 2: objective " in first.stdout
    assert "step 2 of 2" not in again.stdout  # nothing is done twice
    replies = json.loads((tmp_path / "out" / "answers.json").read_text())["replies"]
    assert set(replies) == {"base", "tuned"}
