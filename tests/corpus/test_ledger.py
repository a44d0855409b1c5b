"""The ledger under launches that are killed, suspended and race each other, in real processes on real files."""

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_idft.corpus.ledger import leases as leases_module
from megatron_idft.corpus.ledger.leases import Leases, Owner
from megatron_idft.corpus.ledger.ledger import Ledger, status_of
from megatron_idft.errors import LedgerError, SettingsMismatch, UserError

SETTINGS = {"model": "tiny"}
WORKER = Path(__file__).with_name("ledger_worker.py")
COMMAND = [sys.executable, str(WORKER)]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(WORKER.parents[2])}


def launches(program, folder):
    """What a program of ledger_worker.py found out; its own checks have passed."""
    run = subprocess.run([*COMMAND, program, folder], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


class Launch:
    """A launch in a process of its own that does what it is told."""

    def __init__(self, folder, chunks=1, lease_seconds=100.0, place="here"):
        arguments = [*COMMAND, "obey", folder, str(chunks), str(lease_seconds), place]
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def say(self, *words):
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def hear(self):
        return json.loads(self.process.stdout.readline())

    def __call__(self, *words):
        self.say(*words)
        return self.hear()

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def launch(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(*arguments, **options):
            started = Launch(tmp_path, *arguments, **options)
            stack.callback(started.kill)
            return started

        yield start


@pytest.fixture
def ledger(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda chunks=1, lease_seconds=100.0, settings=SETTINGS, **options: stack.enter_context(
            Ledger(tmp_path, settings, chunks, lease_seconds=lease_seconds, **options)
        )


def eventually(question, seconds=10.0):
    end = time.monotonic() + seconds
    while (answer := question()) is None or answer is False:  # not 0, which is a chunk
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
    return answer


def text(words):
    return lambda path: path.write_text(words)


def leftovers(folder):
    return sorted(set(os.listdir(folder / "leases")) - {"clock"}) + sorted(os.listdir(folder / "unfinished"))


def test_one_launch_does_every_chunk(tmp_path, ledger):
    one = ledger(5)
    claimed = [one.claim() for _ in range(6)]
    assert sorted(claimed[:5]) == [0, 1, 2, 3, 4] and claimed[5] is None and not one.all_finished()
    for chunk in claimed[:5]:
        assert one.holds(chunk) and one.finish(chunk, text(f"{chunk}")) is True and not one.holds(chunk)
    assert one.all_finished() and one.claim() is None and leftovers(tmp_path) == []
    assert [part.name for part in one.parts()] == [f"chunk-{chunk:06d}.parquet" for chunk in range(5)]
    assert [part.read_text() for part in one.parts()] == list("01234")


def test_no_chunks_is_finished(ledger):
    assert ledger(0).all_finished() and ledger(0).claim() is None


# Killed


def test_killed_before_any_operation_on_a_file_the_rest_is_done_by_the_next_launch(tmp_path):
    assert launches("crash", tmp_path)["steps"] > 60


def test_killed_at_random_beside_others_every_chunk_is_there_once(tmp_path):
    assert launches("storm", tmp_path / "job")["kills"] > 10


def test_a_dead_launch_of_this_machine_is_seen_at_once(launch, ledger):
    dead, one = launch(), ledger()
    assert dead("claim") == 0 and one.claim() is None
    dead.kill()
    assert one.claim() == 0


def test_a_dead_launch_of_another_machine_is_seen_when_its_own_lease_runs_out(launch, ledger):
    dead, one = launch(1, 0.8, "elsewhere"), ledger()
    assert dead("claim") == 0
    dead.kill()
    assert one.claim() is None
    assert eventually(one.claim) == 0


def test_a_process_id_says_nothing_where_its_machine_is_not_known(launch):
    dead = launch()
    dead.kill()
    owner = Owner("host", dead.process.pid, "token", "host boot pid:[1]")
    assert owner.is_known_dead(owner.place) and not owner.is_known_dead("host boot pid:[2]")
    assert not dataclasses.replace(owner, place="").is_known_dead("")
    assert not dataclasses.replace(owner, pid=os.getpid()).is_known_dead(owner.place)


# Side by side


def test_concurrent_launches_share_the_chunks(tmp_path):
    log = launches("share", tmp_path / "job")["log"]
    claimed, finished = Counter(e[1] for e in log if len(e) == 2), Counter(e[1] for e in log if len(e) == 3)
    assert claimed == finished == Counter(range(60))
    assert all(entry[2] for entry in log if len(entry) == 3)
    assert len({launch for launch, *_ in log}) > 1


def test_one_of_many_takes_a_stale_lease_over(tmp_path):
    assert launches("contend", tmp_path)["winners"] == [1] * 20


def test_one_of_two_settings_begins_the_folder(tmp_path):
    results = launches("begin", tmp_path)["results"]
    for index in range(10):
        accepted = {(setting, yes) for i, setting, yes in results if i == index}
        assert accepted in ({(0, True), (1, False)}, {(0, False), (1, True)})


def test_launches_begin_at_different_places(tmp_path, ledger):
    first = [ledger(10_000).claim() for _ in range(8)]
    assert len(set(first)) == 8 and max(first) - min(first) > 1000


@pytest.mark.parametrize("then", ["release", "finish"])
def test_a_contender_that_was_held_up_takes_nothing(tmp_path, ledger, monkeypatch, then):
    dead, slow, fast = ledger(), ledger(), ledger()
    assert dead.claim() == 0
    dead.release(0)
    take = slow._leases.take

    def late(chunk, generation):  # it has judged the lease, and others pass it by
        monkeypatch.setattr(slow._leases, "take", take)
        assert fast.claim() == 0
        fast.release(0) if then == "release" else fast.finish(0, text("fast"))
        return take(chunk, generation)

    monkeypatch.setattr(slow._leases, "take", late)
    assert slow.claim() is None and not slow.holds(0)
    if then == "finish":
        assert leftovers(tmp_path) == [] and slow.all_finished()
    else:
        assert slow.claim() == 0 and slow.finish(0, text("slow"))


def test_the_second_part_of_a_chunk_is_dropped(tmp_path, ledger, monkeypatch):
    one, two = ledger(), ledger()
    assert one.claim() == 0

    def write(path):  # the other finishes while this one writes
        path.write_text("one")
        assert two.finish(0, text("two"))

    assert one.finish(0, write) is False and one.finish(0, text("again")) is False
    assert one.parts()[0].read_text() == "two" and leftovers(tmp_path) == []


def test_a_file_system_without_hard_links_will_do(tmp_path, ledger, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", link)
    test_the_second_part_of_a_chunk_is_dropped(tmp_path, ledger, monkeypatch)
    with pytest.raises(SettingsMismatch):
        ledger(settings={"model": "large"})


# Suspended


def suspended_after(launch, ledger, *words):
    """A launch that is stopped after answering, and one that has taken its chunk over."""
    stopped, other = launch(1, 0.25), ledger()
    assert stopped("claim") == 0
    if words:
        stopped(*words)
    stopped.signal(signal.SIGSTOP)
    assert eventually(other.claim) == 0
    return stopped, other


def test_a_suspended_launch_notices_that_it_lost_its_lease(tmp_path, launch, ledger):
    stopped, other = suspended_after(launch, ledger)
    stopped.signal(signal.SIGCONT)
    assert stopped("holds", 0) is False and other.holds(0)
    assert stopped("release", 0) is None and other.holds(0)  # no longer its to release
    assert stopped("claim") is None
    assert other.finish(0, text("other")) is True
    assert stopped("finish", 0, "stopped") is False
    assert other.parts()[0].read_text() == "other" and leftovers(tmp_path) == []


def test_a_suspended_launch_may_still_be_first(tmp_path, launch, ledger):
    stopped, other = suspended_after(launch, ledger)
    stopped.signal(signal.SIGCONT)
    assert stopped("finish", 0, "stopped") is True
    assert not other.holds(0) and other.finish(0, text("other")) is False
    assert other.parts()[0].read_text() == "stopped" and leftovers(tmp_path) == []


@pytest.mark.parametrize("finished", [False, True])
def test_a_launch_suspended_while_it_writes_leaves_nothing(tmp_path, launch, ledger, finished):
    stopped, other = suspended_after(launch, ledger, "finish by halves", 0)
    if finished:
        assert other.finish(0, text("other")) is True
    stopped.signal(signal.SIGCONT)
    assert stopped("other half") is False  # its file was cleared away
    if not finished:
        assert other.holds(0) and other.finish(0, text("other")) is True
    assert other.parts()[0].read_text() == "other" and leftovers(tmp_path) == []


# Clocks and leases


def test_the_machines_own_clock_is_never_compared(tmp_path, ledger, monkeypatch):
    one, two = ledger(), ledger()
    assert one.claim() == 0
    for skew in (-1e6, 1e6):
        clock = time.time
        monkeypatch.setattr(time, "time", lambda clock=clock, skew=skew: clock() + skew)
        assert two.claim() is None and two.status().leased[0].silence < 10
        monkeypatch.undo()


def test_a_lease_that_is_renewed_is_not_stale(launch, ledger):
    busy, other = launch(1, 3.0, "elsewhere"), ledger()
    assert busy("claim") == 0
    end = time.monotonic() + 3.6
    while time.monotonic() < end:
        assert other.claim() is None
        time.sleep(0.05)
    assert busy("holds", 0) is True


@pytest.mark.parametrize("seconds", [-101, 101])  # +: the server's clock was set back
def test_a_lease_that_is_not_renewed_is_stale(tmp_path, ledger, seconds):
    dead, one = ledger(lease_seconds=100), ledger(lease_seconds=7)
    assert dead.claim() == 0
    path = tmp_path / "leases/chunk-000000.0"
    now = path.stat().st_mtime
    os.utime(path, (now, now + seconds * 0.9))
    assert one.claim() is None and len(one.status().leased) == 1  # by the owner's lease time, not one's own
    os.utime(path, (now, now + seconds))
    assert len(one.status().stale) == 1 and one.claim() == 0 and not dead.holds(0)


def test_leaving_releases_what_is_claimed(tmp_path, ledger):
    with pytest.raises(ZeroDivisionError), Ledger(tmp_path, SETTINGS, 2) as left:
        assert {left.claim(), left.claim()} == {0, 1}
        raise ZeroDivisionError
    one = ledger(2)
    assert one.status().left == 2 and one.status().stale == [] and {one.claim(), one.claim()} == {0, 1}
    one.release(1)
    one.release(1)
    assert not one.holds(1) and one.holds(0) and ledger(2).claim() == 1
    with pytest.raises(ValueError, match="closed"):
        left.claim() or one.release(0) or left.claim()


def test_untouched_chunks_come_before_abandoned_ones(ledger):
    one = ledger(4)
    abandoned = one.claim()
    one.release(abandoned)
    assert [one.claim() for _ in range(4)][3] == abandoned


# Leftovers


def test_torn_leftovers_are_cleared_away(tmp_path, ledger):
    one = ledger(4)
    (tmp_path / "parts/chunk-000003.parquet").write_text("3")
    for name in ("leases/chunk-000003.0", "leases/chunk-000003.1", "unfinished/manifest.dead.json"):
        (tmp_path / name).write_text('{"owner": ')
    (tmp_path / "leases/chunk-000000.0").write_text("")
    (tmp_path / "leases/chunk-000001.4").write_text('{"owner": {"host": 1}, "lease_seconds": "x"}')
    for chunk in (0, 1, 2, 3):
        (tmp_path / f"unfinished/chunk-{chunk:06d}.dead.parquet").write_text("half")
    (tmp_path / "leases/notes.txt").write_text("not ours")
    assert one.claim() == 2
    left = ["chunk-000000.0", "chunk-000001.4", "chunk-000002.0", "notes.txt"]
    assert leftovers(tmp_path) == [*left, "chunk-000000.dead.parquet", "chunk-000001.dead.parquet"]
    assert one.claim() is None  # 0 and 1 may have been claimed just now
    assert "a launch that died while claiming it" in one.status().format()
    for name in ("chunk-000000.0", "chunk-000001.4"):
        os.utime(tmp_path / "leases" / name, (1, 1))
    assert {one.claim(), one.claim()} == {0, 1}
    for chunk in range(3):
        one.finish(chunk, text(str(chunk)))
    assert leftovers(tmp_path) == ["notes.txt"] and [part.read_text() for part in one.parts()] == list("0123")


# Settings


def test_other_settings_are_named_with_both_values_and_the_remedy(tmp_path, ledger):
    settings = {"data": {"files": ("x", "y"), "rows": 3}, "flags": [1, True], "nan": float("nan"), "list": [SETTINGS]}
    ledger(3, settings=settings)
    ledger(3, settings={"list": [SETTINGS], "nan": float("nan"), "flags": [1, True], "data": settings["data"]})
    changed = settings | {"data": {"files": ["x"], "rows": 3}, "flags": [1, 1], "new": None}
    with pytest.raises(SettingsMismatch) as caught:
        ledger(4, settings=changed)
    assert caught.value.differences == {
        "num_chunks": (3, 4),
        "data.files": (["x", "y"], ["x"]),
        "flags": ([1, True], [1, 1]),
        "new": ("(absent)", None),
    }
    message = str(caught.value)
    assert 'data.files: ["x", "y"] in the folder, ["x"] now' in message and "Name another output folder" in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message and isinstance(caught.value, UserError)
    with pytest.raises(SettingsMismatch, match=r'part_suffix: "\.parquet" in the folder, "\.jsonl" now'):
        ledger(3, settings=settings, part_suffix=".jsonl")


def test_the_order_of_keys_is_no_difference(ledger):
    ledger(settings={"list": [{"a": 1, "b": 2}], "c": 3})
    ledger(settings={"c": 3, "list": [{"b": 2, "a": 1}]})


def test_the_manifest_is_for_people_too(tmp_path, ledger):
    ledger(3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest.pop("versions")["numpy"] and manifest == {
        "format": 1,
        "num_chunks": 3,
        "part_suffix": ".parquet",
        "settings": SETTINGS,
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"versions": {}}))
    ledger(3)  # versions are for information only
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(SettingsMismatch, match="format: 99 in the folder, 1 now"):
        ledger(3)
    with pytest.raises(LedgerError, match="format 99"):
        status_of(tmp_path)


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"settings": {}}', '{"settings": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path, ledger, torn):
    ledger(3)
    (tmp_path / "manifest.json").write_text(torn)
    with pytest.raises(LedgerError, match=r"damaged.*restore it, or name another"):
        ledger(3)


def test_parts_of_nobody_are_refused(tmp_path, ledger):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/chunk-000000.parquet").write_text("old")
    with pytest.raises(LedgerError, match=r"no manifest\.json: name another"):
        ledger(3)


def test_what_no_ledger_can_be_made_of(tmp_path, ledger):
    with pytest.raises(TypeError):
        ledger(settings={"model": object()})
    for options in ({"chunks": -1}, {"part_suffix": "parquet"}, {"part_suffix": "./../x"}, {"lease_seconds": 0}):
        with pytest.raises(ValueError):
            ledger(**options)
    with pytest.raises(ValueError, match="chunk 1 is none of"):
        ledger().finish(1, text("x"))


# Disks


def test_a_full_disk_while_writing_is_told_and_leaves_nothing_half(tmp_path, ledger):
    one = ledger()
    assert one.claim() == 0

    def full(path):
        path.symlink_to("/dev/full")
        path.write_text("x" * 100_000)

    with pytest.raises(LedgerError, match=r"cannot write chunk 0: .*No space left.*free some space.*parts are kept"):
        one.finish(0, full)
    assert os.listdir(tmp_path / "unfinished") == [] and one.parts() == [] and one.holds(0)
    assert one.finish(0, text("fits")) is True


def test_a_full_disk_while_claiming_is_told_and_leaves_the_chunk_to_others(ledger):
    one, two = ledger(), ledger()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(LedgerError, match=r"cannot claim a chunk: .*free some space"):
            one.claim()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not one.holds(0) and two.claim() == 0


def test_errors_of_the_writer_are_its_own(tmp_path, ledger):
    one = ledger()
    assert one.claim() == 0

    def fail(error):
        def write(path):
            path.write_text("half")
            raise error

        return write

    for error in (KeyError("x"), OSError(errno.EIO, "bad disk"), PermissionError(errno.EACCES, "no", "/data/x")):
        with pytest.raises(type(error)) as caught:
            one.finish(0, fail(error))
        assert caught.value is error and os.listdir(tmp_path / "unfinished") == [] and one.holds(0)
    with pytest.raises(FileNotFoundError):
        one.finish(0, lambda path: None)


def test_a_folder_that_is_not_writable_is_told_and_can_be_looked_at():
    base = Path(tempfile.mkdtemp())  # not below pytest's folder, which others may not enter
    user = os.geteuid()
    try:
        with Ledger(base / "job", SETTINGS, 2) as one:
            done = one.claim()
            one.finish(done, text("x"))
            folders = [base, base / "job", *(base / "job" / name for name in ("parts", "leases", "unfinished"))]
            for folder in folders:
                folder.chmod(0o555)
            if user == 0:  # root may write everywhere
                os.seteuid(65534)
            for attempt in (
                one.claim,
                lambda: one.finish(1 - done, text("x")),
                lambda: Ledger(base / "job", SETTINGS, 2).claim(),
                lambda: Ledger(base / "new", SETTINGS, 2),
            ):
                with pytest.raises(LedgerError, match=r"Permission denied.*make the folder writable, or name another"):
                    attempt()
            assert status_of(base / "job").finished == 1
            os.seteuid(user)
            for folder in folders:
                folder.chmod(0o755)
            assert one.finish(one.claim(), text("x")) and one.all_finished()
    finally:
        os.seteuid(user)
        shutil.rmtree(base)


def test_a_path_that_is_no_folder_is_told(tmp_path, ledger):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot open the folder"):
        Ledger(tmp_path / "file", SETTINGS, 1)
    with pytest.raises(LedgerError, match=r"no manifest\.json"):
        status_of(tmp_path / "nothing")


# Status


def test_status_counts_and_tells_rate_and_time_left(tmp_path, ledger, launch):
    one = ledger(10)
    assert one.status().rate is None and one.status().format().startswith("0 of 10 chunks finished (0.0 %), 0 leased")
    for _ in range(4):
        one.finish(one.claim(), text("x"))
    now = one.parts()[0].stat().st_mtime
    for index, part in enumerate(one.parts()):
        os.utime(part, (now, now - 60 - 30 * index))
    dead = launch(10, 0.05, "elsewhere")
    abandoned, held = dead("claim"), one.claim()
    dead.kill()
    eventually(lambda: len(one.status().stale) == 1)
    status = status_of(tmp_path)
    assert (status.num_chunks, status.finished, status.left) == (10, 4, 5)
    assert [lease.chunk for lease in status.leased] == [held] and [lease.chunk for lease in status.stale] == [abandoned]
    assert status.leased[0].owner.pid == os.getpid() and status.stale[0].owner.pid == dead.process.pid
    assert status.rate == pytest.approx(1 / 30) and status.eta_seconds == pytest.approx(180)
    assert status.since_last == pytest.approx(60, abs=10)
    lines = status.format().splitlines()
    assert lines[0].startswith("4 of 10 chunks finished (40.0 %), 1 leased, 5 left, 1 of these given up")
    assert re.fullmatch(r"2 chunks/min, last part (60|61|62|63|64|65) s ago, 3\.0 min to go", lines[1])
    assert f"chunk {held:06d} leased by" in lines[2] and f"(process {os.getpid()})" in lines[2]
    assert f"chunk {abandoned:06d} was leased by" in lines[3]
    assert eventually(lambda: one.claim() == abandoned) and "attempt 2" in one.status().format()


def test_a_part_whose_lease_is_still_there_is_finished(tmp_path, ledger):
    one = ledger()
    assert one.claim() == 0
    (tmp_path / "parts/chunk-000000.parquet").write_text("x")
    status = one.status()
    assert (status.finished, status.leased, status.left, status.eta_seconds) == (1, [], 0, None)


def test_a_signal_in_the_moment_of_a_claim_leaves_the_chunk_to_others(tmp_path, monkeypatch):
    def interrupted(owner):
        raise KeyboardInterrupt

    leases = Leases(tmp_path, Owner.here(), 60)
    with monkeypatch.context() as patched:
        patched.setattr(leases_module, "asdict", interrupted)
        with pytest.raises(KeyboardInterrupt):
            leases.take(3, 0)
    assert leases.read(3, 0, leases.now()).state == "released" and leases.held() == []
    leases.close()
