"""The interpreter that forks shows programs what the real one shows them, and ends with them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch import ROOT, forking_python

PROBE = """
import json, os, sys
ours = {name: value for name, value in os.environ.items() if name not in ("_", "LC_CTYPE")}
seen = [__name__, globals().get("__file__"), sys.argv, sys.path, os.getcwd(), ours, sys.stdin.read()]
print(json.dumps(seen))
print("last", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize("form", ["script", "module", "code"])
def test_a_program_sees_what_a_fresh_process_would(tmp_path, form):
    (tmp_path / "probe.py").write_text(PROBE)
    argv = {"script": ["probe.py"], "module": ["-u", "-m", "probe"], "code": ["-c", PROBE]}[form]
    seen = []
    for python in (sys.executable, forking_python()):
        environment = {"PYTHONPATH": f"{ROOT}:elsewhere", "PATH": os.environ["PATH"], "MINE": "é"}
        done = subprocess.run(
            [python, *argv, "--flag", "x y"], cwd=tmp_path, env=environment, input="in", capture_output=True, text=True
        )
        seen.append((done.returncode, done.stdout, done.stderr))
    assert seen[0] == seen[1] and seen[0][0] == 7 and '"x y"' in seen[0][1]


def test_threads_follow_the_environment():
    for threads in ("1", "2"):
        code = "import torch; print(torch.get_num_threads())"
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        done = subprocess.run([forking_python(), "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.split() == [threads], done.stderr


def test_signals_reach_the_program_and_its_death_by_one_is_seen():
    code = "import os, signal, time; {}; print(os.getpid(), flush=True); time.sleep(60)"
    handled = "signal.signal(signal.SIGTERM, lambda *_: os._exit(9))"
    for what, sent, expected in ((handled, signal.SIGTERM, 9), ("0", signal.SIGTERM, -15), ("0", signal.SIGKILL, -9)):
        process = subprocess.Popen([forking_python(), "-c", code.format(what)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        program = int(process.stdout.readline())
        process.send_signal(sent)
        assert process.wait(20) == expected
        wait_for_end(program)


def wait_for_end(pid: int, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, f"{pid} lives on"
        time.sleep(0.05)
