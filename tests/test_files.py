"""Files that are replaced whole; builds that others must not remove, and dead ones that they must."""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_idft.files import building_in, remove_dead_builds, write_atomically

HOLD = """
import sys
from pathlib import Path
from megatron_idft.files import building_in
with building_in(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("done")
    print(folder, flush=True)
    sys.stdin.read()
"""
CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]  # process ids of its own


def hold(parent: Path, *before: str) -> tuple[subprocess.Popen[str], Path]:
    """A process, behind the command `before`, that builds until its input ends; and its folder."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", HOLD, str(parent)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    process.communicate()


def test_a_file_is_replaced_whole_or_kept_and_nothing_stays_beside_it(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, "old")
    write_atomically(file, "new")
    assert file.read_text() == "new"
    write_atomically(file, "later", once=True)
    assert file.read_text() == "new"
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "\ud800")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_a_build_appears_whole_and_leaves_nothing_beside_it(tmp_path):
    with building_in(tmp_path) as folder:
        (folder / "half").write_text("done")
        folder.rename(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    with pytest.raises(ZeroDivisionError), building_in(tmp_path):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_live_build_stays_and_a_killed_one_goes(tmp_path):
    process, folder = hold(tmp_path)
    try:
        remove_dead_builds(tmp_path)
        with building_in(tmp_path) as own:
            remove_dead_builds(tmp_path)
            assert own.exists() and (folder / "half").exists()
    finally:
        end(process)
    remove_dead_builds(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_live_build_of_another_container_with_this_hostname_stays(tmp_path):
    """Its process id means nothing here: by name and id alone it would be taken for dead."""
    if subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("this machine admits no process namespaces")
    process, folder = hold(tmp_path, *CONTAINER)
    try:
        remove_dead_builds(tmp_path)
        assert (folder / "half").exists()
    finally:
        end(process)
    deadline = time.monotonic() + 30  # the namespace ends with its first process
    while list(tmp_path.iterdir()):
        assert time.monotonic() < deadline
        remove_dead_builds(tmp_path)
        time.sleep(0.05)


def test_a_build_of_another_machine_goes_only_when_it_is_silent(tmp_path):
    process, folder = hold(tmp_path)
    end(process)
    lock = folder.with_name(folder.name + ".lock")
    lock.write_text("0" * 36)  # of another boot
    remove_dead_builds(tmp_path)
    assert (folder / "half").exists()
    long_ago = time.time() - 2 * 24 * 3600
    for path in (lock, folder, folder / "half"):
        os.utime(path, (long_ago, long_ago))
    held = os.open(lock, os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)  # that machine lives, and was held up for two days
    remove_dead_builds(tmp_path)
    assert (folder / "half").exists()
    os.close(held)
    remove_dead_builds(tmp_path)
    assert not list(tmp_path.iterdir())


def test_builders_that_sweep_at_once_remove_nothing_of_each_other(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(_build_often, [tmp_path] * 4) == [50] * 4
    assert not list(tmp_path.iterdir())


def _build_often(parent: Path) -> int:
    whole = 0
    for _ in range(50):
        with building_in(parent) as folder:
            (folder / "half").write_text("done")
            remove_dead_builds(parent)
            whole += (folder / "half").exists()
    return whole
