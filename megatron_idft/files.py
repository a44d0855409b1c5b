"""Files and folders that appear whole or not at all, also where a process or a machine dies; and their identity."""

import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}
_SAMPLE_BYTES = 1 << 20  # of the head and of the tail of a file
_PREFIX, _LOCK = ".building-", ".lock"
_SILENT_SECONDS = 24 * 3600.0  # of a build whose machine cannot be asked


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def synced_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that is on the disk when the context ends without an error.

    Args:
        path: of the file.
        mode: "w" or "wb"; text is UTF-8.
    """
    with open(path, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def complete_file(path: Path, *, once: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` at the end, and is gone after an error.

    A reader finds the old file or the new one, also after the machine has died.

    Args:
        path: of the file.
        once: a file that is there stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        yield temporary
        sync(temporary)
        if once:
            put(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_atomically(path: Path, text: str, *, once: bool = False) -> None:
    """Write a `complete_file` of UTF-8."""
    with complete_file(path, once=once) as temporary:
        temporary.write_text(text, encoding="utf-8")


def put(temporary: Path, final: Path) -> bool:
    """Give a complete file its final name, once: False if that name is taken already."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        # NFS repeats a request whose answer was lost: the name may be taken by this very file.
        return temporary.exists() and final.samefile(temporary)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # This file system can only rename, which replaces. Two launches at once would replace like with like.
        if final.exists():
            return False
        temporary.rename(final)
    return True


def describe_source(path: Path) -> dict[str, Any]:
    """Identifies a source file without reading it whole, at every launch, on every rank.

    An edit changes the size or the modification time; the hash of head and tail catches files that were swapped or
    copied with their times. A file that is merely touched is tokenised again, which costs time but never correctness.
    """
    stat = path.stat()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, stat.st_size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return {"name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sample": digest.hexdigest()}


@contextmanager
def building(final: Path) -> Iterator[Path]:
    """A new folder that becomes `final` when the context ends without an error, unless another builder was faster."""
    with building_in(final.parent) as folder:
        yield folder
        try:
            folder.rename(final)
        except OSError:
            if not final.exists():
                raise
        else:
            sync(final.parent)


@contextmanager
def building_in(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, which the caller fills and renames. It is removed at the end where that has not come.

    What killed builds left in `parent` is removed first. Beside `.building-NAME` lies `.building-NAME.lock`, which its
    builder keeps locked: the file system holds the lock, and gives it back when the process ends, however that happens.
    Containers with one hostname and each with a process 7 cannot take each other for dead. `flock` also holds between
    the machines of an NFS since Linux 2.6.12, but where it is mounted with `local_lock` each machine sees its own locks
    alone. So a build of another machine, or of another boot of this one, is removed only where nothing in it was
    written for a day, too. Where a file system has no locks, nothing is removed.
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
    """The identity of this kernel, whose processes see each other's locks. Empty where it is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return b""


def _is_silent(folder: Path, lock: Path) -> bool:
    newest = max(path.stat().st_mtime for path in (lock, folder, *folder.rglob("*")) if path.exists())
    return time.time() - newest > _SILENT_SECONDS
