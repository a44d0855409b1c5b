"""Progress: from the first moment, while one step takes long, on terminals of any size, and as lines elsewhere."""

import os
import re
import subprocess
import sys

import pytest

from tests.launch import ROOT

COUNTING = """
import sys, time
from megatron_idft import progress
progress.BAR_SECONDS = progress.LINE_SECONDS = 0.05
from megatron_idft.progress import Done, Progress, byte_bar
done = Done(20, 200, 0.2)
with Progress("scoring", 100, 1000, lambda: done):
    time.sleep(0.2)  # one long step
    done = Done(60, 600, 0.6, "own responses, 3 of 4")
    time.sleep(0.1)
    done = Done(100, 1000, 1.0)
with byte_bar("converting", 10**9) as bar:
    bar.update(10**9)
with Progress("scoring", 100, 1000, lambda: done):
    pass
"""


def lines(*words: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return [line.rstrip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]


def test_elsewhere_it_is_lines():
    found = lines(sys.executable, "-c", COUNTING)
    assert found[0] == "scoring:  20%, ? left, 20/100 records, 200/1,000 tokens, 00:00 so far"
    assert re.fullmatch(
        r"scoring:  60%, 00:00 left, 60/100 records, 600/1,000 tokens, [\d,]+ tokens/s, own responses, 3 of 4,"
        r" 00:00 so far",
        found[-4],
    )
    assert re.fullmatch(
        r"scoring: 100%, 00:00 left, 100/100 records, 1,000/1,000 tokens, [\d,]+ tokens/s, 00:00 so far", found[-3]
    )
    assert re.fullmatch(r"converting: 100%, 00:00 left, 1.00GB/1.00GB, \S+B/s, 00:00 so far", found[-1])
    # What is finished already is not shown, and no line comes twice.
    assert len(found) == len(set(found)) == found.index(found[-1]) + 1


@pytest.mark.parametrize("size", ["rows 0 cols 0", "rows 0 cols 60", "rows 30 cols 60"])
def test_on_a_terminal_it_is_a_bar_that_fits(tmp_path, size):
    (tmp_path / "count.py").write_text(COUNTING)
    found = lines("script", "-qec", f"stty {size}; {sys.executable} {tmp_path / 'count.py'}", "/dev/null")
    assert found[0].startswith("scoring:  20%|██        | ? left, 20/100 records, 2")
    assert any(line.startswith("scoring:  60%|██████    | 00:00 left, 60/100 re") for line in found)
    assert all(len(line) <= (100 if size.endswith("cols 0") else 60) for line in found)
