"""Folders in which something is built until it is complete, and the removal of those that killed processes left.

Beside `.building-NAME` lies `.building-NAME.lock`, which its builder keeps locked: the file system holds the lock, and
gives it back when the process ends, however that happens. Containers with one hostname and each with a process 7
cannot take each other for dead. `flock` also holds between the machines of an NFS since Linux 2.6.12, but where it is
mounted with `local_lock` each machine sees its own locks alone. So a build of another machine, or of another boot of
this one, is removed only where nothing in it was written for a day, too. Where a file system has no locks, nothing is
removed.
"""

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _LOCK = ".building-", ".lock"
_SILENT_SECONDS = 24 * 3600.0  # of a build whose machine cannot be asked


@contextmanager
def building_in(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, which the caller fills and renames. It is removed at the end where that has not come.

    What killed builds left in `parent` is removed first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_dead_builds(parent)
    folder = parent / f"{_PREFIX}{uuid.uuid4().hex[:12]}"
    lock = folder.with_name(folder.name + _LOCK)
    file = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        with suppress(OSError):  # a file system without locks: nobody can lock it to remove the build either
            fcntl.flock(file, fcntl.LOCK_EX)
            os.pwrite(file, _boot(), 0)  # after the lock: until it is written, nobody takes the build for dead
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(file)


def remove_dead_builds(parent: Path) -> None:
    """Delete the builds in `parent` whose processes are known to be gone."""
    for lock in parent.glob(f"{_PREFIX}*{_LOCK}"):
        with suppress(OSError):  # removed by another at this moment; no locks here; not ours to open
            file = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                folder = lock.with_name(lock.name.removesuffix(_LOCK))
                boot = os.pread(file, 100, 0)
                if (boot and boot == _boot()) or _is_silent(folder, lock):
                    shutil.rmtree(folder, ignore_errors=True)
                    if not folder.exists():
                        lock.unlink(missing_ok=True)
            finally:
                os.close(file)


def _boot() -> bytes:
    """What processes share that share a kernel, all of whose locks each of them sees. Empty where it is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return b""


def _is_silent(folder: Path, lock: Path) -> bool:
    newest = max(path.stat().st_mtime for path in (lock, folder, *folder.rglob("*")) if path.exists())
    return time.time() - newest > _SILENT_SECONDS
