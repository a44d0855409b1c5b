"""Launches for test_ledger.py, in processes that hold no torch and may be forked, stopped and killed.

python ledger_worker.py obey FOLDER CHUNKS LEASE_SECONDS [elsewhere]    one launch, driven over stdin and stdout
python ledger_worker.py crash|storm|share|contend|begin FOLDER          many forked launches; prints what came out
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from megatron_idft.corpus.ledger import leases
from megatron_idft.corpus.ledger.ledger import Ledger
from megatron_idft.errors import SettingsMismatch

SETTINGS = {"model": "tiny"}


def content(chunk: int) -> str:
    return f"chunk {chunk}\n" * 5000


def move_elsewhere() -> None:
    """Be on another machine: whether this process lives cannot be seen by others, nor theirs by it."""
    here = leases.Owner.here
    leases.Owner.here = lambda: dataclasses.replace(here(), place="")


def in_pieces(chunk: int, between=lambda: None):
    """A writer that can be hit in the middle."""

    def write(path: Path) -> None:
        text = content(chunk)
        with open(path, "w") as file:
            for start in range(0, len(text), len(text) // 4):
                file.write(text[start : start + len(text) // 4])
                file.flush()
                between()

    return write


def work(folder, chunks, lease_seconds=30.0, on_claim=print, on_finish=print, between=lambda: None, limit=None) -> None:
    """The loop of the module's docstring."""
    with Ledger(folder, SETTINGS, chunks, lease_seconds=lease_seconds) as ledger:
        while not ledger.all_finished():
            chunk = ledger.claim()
            if chunk is None:
                time.sleep(0.005)
                continue
            on_claim(chunk)
            on_finish(chunk, ledger.finish(chunk, in_pieces(chunk, between)))


def quiet(*_) -> None:
    pass


def check(folder: Path, chunks: int | None = None) -> None:
    """Every part that is there is whole; with `chunks`, all are there and nothing else is."""
    names = sorted(os.listdir(folder / "parts"))
    for name in names:
        chunk = int(name.removeprefix("chunk-").removesuffix(".parquet"))
        assert (folder / "parts" / name).read_text() == content(chunk), f"{name} is not whole"
    if chunks is not None:
        assert names == [f"chunk-{chunk:06d}.parquet" for chunk in range(chunks)], names
        for place, kept in (("leases", {"clock"}), ("unfinished", set())):
            assert set(os.listdir(folder / place)) <= kept, os.listdir(folder / place)


def forked(function, *arguments) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*arguments)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def crash(root: Path) -> dict:
    """Kill a launch before each of its operations on files in turn; a second launch must end what it left."""

    def run_until(step: int, folder: Path) -> None:
        main, steps = threading.get_ident(), itertools.count(1)

        def count(*_) -> None:
            if threading.get_ident() == main and next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event, arguments) -> None:
            if event in ("open", "os.link", "os.remove", "os.mkdir", "os.utime", "os.listdir", "os.rename"):
                count()

        for name in ("write", "fsync"):  # these two are not audited
            original = getattr(os, name)
            setattr(os, name, lambda *a, original=original: (count(), original(*a))[1])
        sys.addaudithook(hook)
        work(folder, 2, on_claim=quiet, on_finish=quiet, between=count)

    def resume(step: int, folder: Path) -> None:
        if step % 2:
            move_elsewhere()  # the lease must run out; else the dead process is seen at once
        work(folder, 2, on_claim=quiet, on_finish=quiet)

    os.fsync = lambda handle: None  # the machine stays on: what was written is there, flushed or not
    lease = leases.Leases.__init__
    leases.Leases.__init__ = lambda self, folder, owner, seconds: lease(self, folder, owner, 0.02)
    for step in itertools.count(1):
        folder = root / str(step)
        code = ended(forked(run_until, step, folder))
        if code == 0:
            return {"steps": step - 1}
        assert code == -signal.SIGKILL, code
        if (folder / "parts").exists():
            check(folder)
        assert ended(forked(resume, step, folder)) == 0, f"killed before step {step}"
        check(folder, 2)
        shutil.rmtree(folder)
    raise AssertionError


def storm(folder: Path) -> dict:
    """Launches killed at random moments, with others beside them, until nothing is left to do."""
    chunks, launches, kills = 300, {}, 0

    def launch(number: int) -> None:
        if number % 2:
            move_elsewhere()
        work(folder, chunks, 0.3, on_claim=quiet, on_finish=quiet, between=lambda: time.sleep(0.001))

    random.seed(0)
    for number in itertools.count():
        while len(launches) < 4:
            launches[forked(launch, number)] = number
        time.sleep(random.random() * 0.03)
        victim = random.choice(list(launches))
        os.kill(victim, signal.SIGKILL)
        code = ended(victim)
        assert code in (0, -signal.SIGKILL), code
        kills += code != 0
        del launches[victim]
        if (folder / "parts").exists():
            check(folder)
            if len(os.listdir(folder / "parts")) > chunks - 20 or number > 400:
                break
    for pid in launches:
        assert ended(pid) == 0
    check(folder, chunks)
    return {"kills": kills}


def share(folder: Path) -> dict:
    """Six launches at once: who claimed and finished what."""
    chunks, log = 60, folder.with_suffix(".log")
    start = multiprocessing.get_context("fork").Barrier(6)

    def launch(number: int) -> None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def note(*what) -> None:
            os.write(file, (json.dumps([number, *what]) + "\n").encode())

        start.wait()
        work(folder, chunks, on_claim=note, on_finish=note, between=lambda: time.sleep(0.001))

    for pid in [forked(launch, number) for number in range(6)]:
        assert ended(pid) == 0
    check(folder, chunks)
    return {"log": [json.loads(line) for line in log.read_text().splitlines()]}


def contend(root: Path) -> dict:
    """Many launches find the same stale lease at the same moment: how many of them got it, round by round."""
    rounds, contenders = 20, 8
    context = multiprocessing.get_context("fork")
    start, seen, end = (context.Barrier(contenders) for _ in range(3))
    winners = [context.Value("i", 0) for _ in range(rounds)]
    move_elsewhere()

    def launch(number: int) -> None:
        take = leases.Leases.take

        def late(self, chunk, generation):  # all have judged the lease before the first one acts
            seen.wait(30)
            time.sleep(random.random() * 0.003)
            return take(self, chunk, generation)

        leases.Leases.take = late
        random.seed(number)
        for index, winner in enumerate(winners):
            with Ledger(root / str(index), SETTINGS, 1, lease_seconds=100) as ledger:
                start.wait(30)
                if ledger.claim() is not None:
                    with winner:
                        winner.value += 1
                end.wait(30)

    for index in range(rounds):
        dead = Ledger(root / str(index), SETTINGS, 1, lease_seconds=100)
        assert dead.claim() == 0
        dead._leases.close()
        os.utime(root / str(index) / "leases" / "chunk-000000.0", (1000, 1000))
    for pid in [forked(launch, number) for number in range(contenders)]:
        assert ended(pid) == 0
    return {"winners": [winner.value for winner in winners]}


def begin(root: Path) -> dict:
    """Launches with two different settings begin one folder at the same moment: [setting, was it accepted]."""
    rounds, launches = 10, 8
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(launches), context.SimpleQueue()

    def launch(number: int) -> None:
        for index in range(rounds):
            start.wait(30)
            try:
                with Ledger(root / str(index), {"model": number % 2}, 1):
                    accepted = True
            except SettingsMismatch:
                accepted = False
            results.put([index, number % 2, accepted])

    pids = [forked(launch, number) for number in range(launches)]
    outcome = [results.get() for _ in range(rounds * launches)]
    assert [ended(pid) for pid in pids] == [0] * launches
    return {"results": outcome}


def obey(folder: str, chunks: str, lease_seconds: str, place: str = "here") -> None:
    if place == "elsewhere":
        move_elsewhere()
    ledger = Ledger(folder, SETTINGS, int(chunks), lease_seconds=float(lease_seconds))

    def half(path: Path) -> None:
        with open(path, "w") as file:
            file.write("half")
            file.flush()
            print(json.dumps("half"), flush=True)
            file.write(json.loads(sys.stdin.readline())[0])

    for line in sys.stdin:
        match json.loads(line):
            case ["finish", chunk, text]:
                answer = ledger.finish(chunk, lambda path, text=text: path.write_text(text))
            case ["finish by halves", chunk]:
                answer = ledger.finish(chunk, half)
            case [name, *arguments]:
                answer = getattr(ledger, name)(*arguments)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "obey":
        obey(*sys.argv[2:])
    else:
        print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
