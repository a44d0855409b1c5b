"""The realign example with tiny sizes, run once for the tests of two examples."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.launch import ROOT, forking_python

SIZES = {"RECORDS": "32", "HELD_OUT": "16", "LARGEST": "19", "STEPS": "150", "BATCH": "16", "TUNE_STEPS": "4"}
SIZES |= {"MIX_RECORDS": "0", "PROCESSES": "1"}


@pytest.fixture(scope="session")
def realign_example(tmp_path_factory) -> tuple[Path, str]:
    """Its folder and what it printed: real programs, each in a process of its own; no comparison of mixings."""
    out = tmp_path_factory.mktemp("realign") / "out"
    command = ["bash", ROOT / "examples" / "realign" / "run.sh", "--out", out]
    done = subprocess.run(
        command, env={**os.environ, **SIZES, "PYTHON": forking_python()}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout
