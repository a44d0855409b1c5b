"""Which checkpoint of a training can be trusted: a record of every file's size and checksum, and the tracker file.

A record, `checksums.json`, lies in the folder of its iteration and is the last file that is written there, atomically:
where it is, the save was complete. Megatron and other readers ignore it. The checksum is `zlib.crc32`: it finds every
truncation and every short burst of flipped bits, is not meant against anybody's intent, and runs at the disk's speed
(5.6 GB/s on one core of the machine this was written on, where hashlib.blake2b runs at 1.3 GB/s).

Nothing here knows Megatron or torch; integration/training/checkpoints.py spreads the work over ranks.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_idft.errors import DamagedCheckpointError
from megatron_idft.files import write_atomically

RECORD = "checksums.json"
TRACKER = "latest_checkpointed_iteration.txt"
_VERSION = 1
_CHUNK = 16 << 20
_THREADS = 4  # per process: reading overlaps with summing, which releases the interpreter's lock
_WRITTEN_BY = re.compile(r"__(\d+)_\d+\.distcp$")


@dataclass(frozen=True)
class FileEntry:
    """One file: bytes, and the CRC-32 of its content; None where only sizes are recorded."""

    size: int
    crc32: int | None


@dataclass(frozen=True)
class Record:
    """What was saved.

    Attributes:
        files: path relative to the iteration's folder -> its entry.
        begun_with: the flags that say which weights the training began with, to know it again when it is restarted.
    """

    files: dict[str, FileEntry]
    begun_with: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())


def iteration_folder(folder: Path, iteration: int | str) -> Path:
    """FOLDER/iter_0000020, or FOLDER/release."""
    return folder / (iteration if isinstance(iteration, str) else f"iter_{iteration:07d}")


def saved_iterations(folder: Path) -> list[int]:
    """The iterations that have a folder, whatever its state, the newest first."""
    found = [re.fullmatch(r"iter_(\d{7,})", path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]) for match in found if match), reverse=True)


def is_complete(folder: Path) -> bool:
    """Whether Megatron had finished saving: the files that it writes last are there; in other formats, any weights."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if any(name.endswith(".distcp") for name in names):
        return ".metadata" in names
    return any(name.startswith("mp_rank_") for name in names)


def read_tracker(folder: Path) -> int | str | None:
    """The iteration that Megatron would load, or "release"; None if there is no tracker file.

    Raises:
        DamagedCheckpointError: the file does not say, as after a disk that filled while it was written.
    """
    try:
        text = (folder / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    if text == "release":
        return text
    if not text.isdecimal() or len(text) > 18:
        raise DamagedCheckpointError(
            f"{folder / TRACKER} names no iteration but says {text[:60]!r}: write the N of a good iter_N"
        )
    return int(text)


def write_tracker(folder: Path, iteration: int) -> None:
    """Let Megatron load `iteration` next."""
    write_atomically(folder / TRACKER, str(iteration))


def files_of(folder: Path) -> list[str]:
    """Relative paths of the files to be recorded."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(RECORD)
    )


def share_to_record(files: Iterable[str], rank: int) -> list[str]:
    """The files that `rank` sums after a save: those that it wrote; rank 0 those that nobody wrote alone.

    What a rank wrote is still in its machine's page cache, and on a network file system surely visible to it.
    """
    written_by = {name: _WRITTEN_BY.search(name) for name in files}
    return [name for name, match in written_by.items() if (int(match[1]) if match else 0) == rank]


def share_to_verify(files: dict[str, FileEntry], rank: int, ranks: int) -> dict[str, FileEntry]:
    """The files that `rank` of `ranks` reads before a load: about equally many bytes for each rank."""
    burden = [0] * ranks
    mine = {}
    for name in sorted(files, key=lambda name: (-files[name].size, name)):
        owner = burden.index(min(burden))
        burden[owner] += files[name].size
        if owner == rank:
            mine[name] = files[name]
    return mine


def sum_files(folder: Path, names: Sequence[str], contents: bool = True) -> dict[str, FileEntry]:
    """Size and, if `contents`, checksum of files as they are on the disk now."""

    def entry(name: str) -> FileEntry:
        path = folder / name
        return FileEntry(path.stat().st_size, _crc32(path) if contents else None)

    return dict(zip(names, _in_threads(entry, names), strict=True))


def problems(folder: Path, files: dict[str, FileEntry], contents: bool = True) -> list[str]:
    """The faults of the files, a line for each; reads files only where the size is right."""

    def problem(name: str) -> str | None:
        path, wanted = folder / name, files[name]
        shown = f"{folder.name}/{name}"
        try:
            size = path.stat().st_size
            if size != wanted.size:
                return f"{shown}: {size} bytes, {wanted.size} were saved"
            if contents and wanted.crc32 is not None and _crc32(path) != wanted.crc32:
                return f"{shown}: its content has changed since it was saved (checksum differs)"
        except FileNotFoundError:
            return f"{shown}: missing"
        except OSError as error:
            return f"{shown}: cannot be read ({error.strerror})"
        return None

    return [found for found in _in_threads(problem, list(files)) if found]


def write_record(folder: Path, record: Record) -> None:
    """Write FOLDER/checksums.json atomically. Call it when every other file is complete."""
    content = {
        "version": _VERSION,
        "begun_with": record.begun_with,
        "files": {name: [entry.size, entry.crc32] for name, entry in sorted(record.files.items())},
    }
    write_atomically(folder / RECORD, json.dumps(content, indent=1))


def read_record(folder: Path) -> Record | None:
    """The record of an iteration's folder; None if there is none.

    Raises:
        DamagedCheckpointError: it cannot be read.
    """
    path = folder / RECORD
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != _VERSION:
            raise DamagedCheckpointError(
                f"{path} has version {content['version']}, and this program reads {_VERSION}: update megatron-idft, or"
                " remove the file to load the checkpoint unverified"
            )
        files = {name: FileEntry(size, crc32) for name, (size, crc32) in content["files"].items()}
        outside = [name for name in files if ".." in Path(name).parts or Path(name).is_absolute()]
        if outside:
            raise DamagedCheckpointError(f"{path} names a file outside of its folder: {outside[0][:200]!r}")
        return Record(files, content["begun_with"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedCheckpointError):
            raise
        raise DamagedCheckpointError(f"{folder.name}/{RECORD}: cannot be read ({error})") from error


def content_digest(folder: Path) -> str | None:
    """What tells the checkpoint of an iteration from all others, by its record; None where it has none.

    Raises:
        DamagedCheckpointError: the record cannot be read.
    """
    record = read_record(folder)
    if record is None:
        return None
    files = {name: [entry.size, entry.crc32] for name, entry in record.files.items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:24]


def begin_writing(folder: Path) -> None:
    """Take away what says that `folder` is complete, before its files are written over."""
    for name in (RECORD, "metadata.json", ".metadata"):
        (folder / name).unlink(missing_ok=True)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that nothing loads it and its iteration can be saved again; its new path."""
    target, number = folder.with_name(f"{folder.name}.damaged"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.damaged-{number}")
    folder.rename(target)
    return target


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(_CHUNK))
        while count := file.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
    return value


def _in_threads[T](work: Callable[[str], T], names: Sequence[str]) -> list[T]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, names))
