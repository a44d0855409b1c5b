"""The best checkpoints stay, the latest stays, what is not the run's own stays; a kill leaves nothing half deleted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_idft.checkpoint.best import STATE, BestCheckpoints
from megatron_idft.checkpoint.checksums import TRACKER
from megatron_idft.errors import InputError

METRIC = "lm loss validation"


def save(best: BestCheckpoints, iteration: int, finished: bool = True) -> None:
    for folder in (best.folder, best.folder / "hf"):
        (folder / f"iter_{iteration:07d}").mkdir(parents=True)
        (folder / f"iter_{iteration:07d}" / "weights").write_text("x")
    if finished:
        (best.folder / TRACKER).write_text(str(iteration))
    best.save(iteration)


def step(best: BestCheckpoints, iteration: int, value: float) -> list[int]:
    """An evaluation, then a checkpoint, as in Megatron's loop."""
    best.measure(iteration, {METRIC: value, "other": 0.0})
    deleted = best.prune()
    save(best, iteration)
    return deleted + best.prune()


def there(folder: Path) -> list[int]:
    found = sorted(int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*"))
    assert found == sorted(int(path.name.removeprefix("iter_")) for path in (folder / "hf").glob("iter_*"))
    assert not list(folder.rglob(".deleting-*"))
    return found


def test_the_best_and_the_latest_stay(tmp_path):
    best = BestCheckpoints(tmp_path, 2, METRIC, "min")
    (tmp_path / "iter_0000005").mkdir()
    (tmp_path / "hf" / "iter_0000005").mkdir(parents=True)  # not this run's
    values = {10: 3.0, 20: 2.0, 30: 4.0, 40: 1.0, 50: 2.0, 60: float("nan"), 70: 9.0}
    deleted = {iteration: step(best, iteration, value) for iteration, value in values.items()}
    assert there(tmp_path) == [5, 40, 50, 70]
    assert best.best() == [40, 50], "of equals the later"
    assert deleted == {10: [], 20: [], 30: [], 40: [10, 30], 50: [20], 60: [], 70: [60]}
    state = json.loads((tmp_path / STATE).read_text())
    assert state["best"] == [40, 50] and state["metric"] == METRIC


def test_a_resumed_run_goes_on_with_what_is_known(tmp_path):
    first = BestCheckpoints(tmp_path, 1, METRIC, "max")
    for iteration, value in ((10, 3.0), (20, 2.0)):
        step(first, iteration, value)
    again = BestCheckpoints(tmp_path, 1, METRIC, "max")
    assert step(again, 30, 1.0) == [20] and there(tmp_path) == [10, 30]
    # A run continued from an earlier step saves its iterations once more.
    assert again.best() == [10]
    with pytest.raises(InputError, match="--sft-keep-best-mode"):
        BestCheckpoints(tmp_path, 1, METRIC, "min")
    (tmp_path / STATE).write_text("{")
    with pytest.raises(InputError, match="damaged"):
        BestCheckpoints(tmp_path, 1, METRIC, "max")


def test_what_is_still_being_written_and_what_was_never_measured(tmp_path):
    best = BestCheckpoints(tmp_path, 1, METRIC, "min")
    step(best, 10, 1.0)
    best.measure(20, {METRIC: 5.0})
    save(best, 20, finished=False)
    assert best.prune() == [] and there(tmp_path) == [10, 20], "in the background"
    save(best, 25)  # on SIGTERM, between two evaluations
    assert best.prune() == [20] and there(tmp_path) == [10, 25]
    assert step(best, 30, 2.0) == [25] and there(tmp_path) == [10, 30]


def test_an_unknown_metric_names_the_known_ones(tmp_path):
    best = BestCheckpoints(tmp_path, 1, "lm loss validation-math", "min")
    with pytest.raises(InputError, match=r"This run measures: 'ddt/entropy validation', 'lm loss validation'"):
        best.measure(10, {"lm loss validation": 1.0, "ddt/entropy validation": 2.0})


def test_a_kill_while_deleting_leaves_no_half_checkpoint(tmp_path):
    best = BestCheckpoints(tmp_path, 1, METRIC, "min")
    for iteration, value in ((10, 1.0), (20, 5.0)):
        step(best, iteration, value)
    program = f"""
import os, shutil, signal
from pathlib import Path
from megatron_idft.checkpoint.best import BestCheckpoints
shutil.rmtree = lambda path: (os.remove(path / "weights"), os.kill(os.getpid(), signal.SIGKILL))
best = BestCheckpoints(Path({str(tmp_path)!r}), 1, {METRIC!r}, "min")
folder = best.folder / "iter_0000030"
folder.mkdir()
(best.folder / {TRACKER!r}).write_text("30")
best.save(30)
best.prune()
"""
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000010", "iter_0000030"]
    again = BestCheckpoints(tmp_path, 1, METRIC, "min")
    (tmp_path / "hf" / "iter_0000030").mkdir()
    again.prune()
    assert there(tmp_path) == [10, 30]
