"""Processes that can be killed: what they get and give back, how they end, and that nothing outlives the program."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from megatron_idft.errors import WorkerError
from megatron_idft.processes import Failure, ProcessPool, Task

MODULE = "obedient_process"


def replies(pool, *headers, payload=b""):
    found = {task.number: reply for task, reply in pool.run(Task(i, h, payload) for i, h in enumerate(headers))}
    return [found[number] for number in range(len(headers))]


@pytest.fixture(scope="module")
def pool():
    with closing(ProcessPool(MODULE, None, 1, not_started=WorkerError, seconds=20)) as pool:
        yield pool


def test_bytes_and_json_arrive_as_they_were(pool):
    payload = bytes(range(256)) * 10_000
    assert replies(pool, "measure", {"ü\ud800": [1, None]}, payload=payload) == [len(payload), {"ü\ud800": [1, None]}]


def test_what_it_prints_neither_stops_it_nor_is_lost_when_it_ends(pool):
    before = replies(pool, "pid")
    noise, ended, after = replies(pool, "noise", "exit", "pid")
    assert noise == "noise" and [after] != before
    assert isinstance(ended, Failure) and ended.end == "exit status 3, after it printed 'last words'"


def test_tasks_are_taken_as_they_can_be_done(pool):
    taken = []
    tasks = (taken.append(number) or Task(number, number) for number in range(5))
    for done, (task, reply) in enumerate(pool.run(tasks)):
        assert task.number == reply == done and taken == [*range(done + 1)]


def test_a_run_that_is_left_early_leaves_no_reply_to_the_next(pool):
    for _ in pool.run([Task(0, "old"), Task(1, "old")]):
        break
    assert replies(pool, "new") == ["new"]


def test_what_ends_while_it_loads_says_why():
    with pytest.raises(WorkerError) as caught:
        ProcessPool(MODULE, "print and exit", 1, not_started=lambda failure: WorkerError(failure.reason)).start()
    end = "exit status 4, after it printed 'no such table'"
    assert str(caught.value) == f"its process ended while loading, {end}"


PROGRAM = """
import os, signal, threading
from megatron_idft.processes import ProcessPool, Task
pool = ProcessPool("obedient_process", None, 1, not_started=RuntimeError)
for task, reply in pool.run([Task(0, "pid"), Task(1, "child")]):
    print(reply, flush=True)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
list(pool.run([Task(0, "hang")]))
"""


def alive(pid):
    """Not dead, and no zombie that nobody has waited for."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_nothing_outlives_a_program_that_is_killed_while_a_process_hangs():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -9, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(pids) == 2 and not left
