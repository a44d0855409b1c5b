"""Which chunks of a job are done, shared by any number of launches that come and go and know only one folder.

    manifest.json                   what the job is: settings that every launch must share, number of chunks
    parts/chunk-000012.parquet      a finished chunk; appears whole, never changes, exists once
    leases/chunk-000012.0           who works on a chunk now, see leases.py
    unfinished/chunk-000012.<owner>.parquet   a part while it is written

No launch talks to another: several processes, or jobs of an array on several machines, open the same folder on a shared
file system. `kill -9` at any moment loses only the chunks in flight. The loop of every launch:

    with Ledger(folder, settings, num_chunks) as ledger:
        while not ledger.all_finished():
            chunk = ledger.claim()
            if chunk is None:  # others work on all that is left: wait for them, or leave
                time.sleep(5)
                continue
            table = compute(chunk)
            ledger.finish(chunk, lambda path: pq.write_table(table, path))

Leases only save work: should two launches compute one chunk after all, the first part that is complete stands. So the
content of a chunk must not depend on who computes it.
"""

import errno
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_idft.corpus.ledger.files import finished_parts, part_name, plain_errors
from megatron_idft.corpus.ledger.leases import Leases, Owner
from megatron_idft.corpus.ledger.manifest import FORMAT, agree, read_manifest
from megatron_idft.corpus.ledger.status import Status, measure
from megatron_idft.errors import LedgerError, SettingsMismatch
from megatron_idft.files import put, sync

__all__ = ["Ledger", "LedgerError", "SettingsMismatch", "Status", "status_of"]


class Ledger:
    """One launch's access to a job's folder. Use it as a context manager: leaving releases what is claimed.

    One thread may call claim, finish and release; any may call `holds` and `status`.

    Args:
        settings: JSON-able; everything that the content of the parts depends on (model, tokenizer, template, data,
            flags). The first launch records it, every later one must bring the same.
        part_suffix: of the parts' names; launches must agree on it too.
        lease_seconds: a launch that shows no sign of life for so long loses its chunk to others. Signs come from a
            thread: a call that keeps the GIL for longer costs the lease. NFS clients may see signs a minute late: 90 or
            more there.
        current: gives settings that an earlier version recorded the names that they have now, before they are compared.

    Raises:
        SettingsMismatch: the folder is that of another job.
        LedgerError: the folder cannot be used.
        TypeError: the settings are not JSON.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        num_chunks: int,
        *,
        part_suffix: str = ".parquet",
        lease_seconds: float = 120.0,
        current: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ):
        if num_chunks < 0 or not re.fullmatch(r"\.[\w.]+", part_suffix):
            raise ValueError(f"no ledger of {num_chunks} chunks with names ending in {part_suffix!r}")
        self.folder, self.num_chunks, self._suffix = Path(folder), num_chunks, part_suffix
        self._parts, self._unfinished = self.folder / "parts", self.folder / "unfinished"
        self._owner = Owner.here()
        self._leases = Leases(self.folder / "leases", self._owner, lease_seconds)
        # Launches begin at different places, so that they seldom want the same chunk.
        self._next = zlib.crc32(self._owner.token.encode()) % max(num_chunks, 1)
        job = {"num_chunks": num_chunks, "part_suffix": part_suffix, "settings": dict(settings)}
        with plain_errors(self.folder, "open the folder"):
            self._unfinished.mkdir(parents=True, exist_ok=True)
            agree(self.folder, self._unfinished, self._owner.token, job, current)
            for name in ("parts", "leases"):
                (self.folder / name).mkdir(exist_ok=True)
            self._sweep(self._leases.newest(), self._finished())

    def claim(self) -> int | None:
        """Lease a chunk that is neither finished nor leased, or whose owner is gone; None if there is none just now.

        Chunks that were claimed before (by a launch that died or released them) come after the untouched ones.
        """
        with plain_errors(self.folder, "claim a chunk"):
            newest = self._leases.newest()
            finished = self._finished()  # listed second: a chunk loses its lease only when its part is there
            self._sweep(newest, finished)
            left = [chunk for chunk in self._in_turn() if chunk not in finished]
            for chunk in left:
                if chunk not in newest and self._take(chunk, 0):
                    return chunk
            mine = set(self._leases.held())
            others = [chunk for chunk in left if chunk in newest and chunk not in mine]
            now = self._leases.now() if others else 0.0
            for chunk in others:
                lease = self._leases.read(chunk, newest[chunk], now)
                if lease is not None and lease.state != "held" and self._take(chunk, lease.generation + 1):
                    return chunk
            return None

    def holds(self, chunk: int) -> bool:
        """Whether the chunk is still leased to this launch. False: it was suspended or cut off for too long, and
        another launch has taken the chunk over or finished it; going on is harmless and most likely in vain."""
        with plain_errors(self.folder, "look up a lease"):
            return self._leases.holds(chunk)

    def finish(self, chunk: int, write: Callable[[Path], None]) -> bool:
        """Have `write` write the chunk to the path that it is given, then make that the chunk's part, durably.

        Returns:
            True if it is the part now; False if another launch has taken the chunk over, or has finished it, and its
            part stays. (A launch that lost its lease may still be the first to finish.)

        Raises:
            LedgerError: the disk is full or the folder not writable. This, and any error of `write`, leaves nothing
                half written and the chunk claimed.
        """
        if not 0 <= chunk < self.num_chunks:
            raise ValueError(f"chunk {chunk} is none of 0 … {self.num_chunks - 1}")
        with plain_errors(self.folder, f"write chunk {chunk}", foreign_code=True):
            if won := not self._part(chunk).exists():
                won = self._write(chunk, write)
            if won or self._part(chunk).exists():
                self._leases.remove(chunk)
        return won

    def release(self, chunk: int) -> None:
        """Give a claimed chunk back undone. Does nothing if this launch does not hold it (any more)."""
        with plain_errors(self.folder, f"release chunk {chunk}"):
            self._leases.release(chunk)

    def all_finished(self) -> bool:
        with plain_errors(self.folder, "list the parts"):
            return len(self._finished()) == self.num_chunks

    def finished(self) -> list[int]:
        """The finished chunks, in their order."""
        with plain_errors(self.folder, "list the parts"):
            return list(finished_parts(self._parts, self._suffix))

    def parts(self) -> list[Path]:
        """The finished parts in the order of their chunks."""
        with plain_errors(self.folder, "list the parts"):
            return list(finished_parts(self._parts, self._suffix).values())

    def status(self) -> Status:
        with plain_errors(self.folder, "list the folder"):
            return measure(self.num_chunks, finished_parts(self._parts, self._suffix), self._leases, self._leases.now())

    def close(self) -> None:
        """Release what is claimed and stop the heartbeat."""
        for chunk in self._leases.held():
            with suppress(OSError):  # out of reach: it goes stale
                self._leases.release(chunk)
        self._leases.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _in_turn(self) -> Iterator[int]:
        yield from range(self._next, self.num_chunks)
        yield from range(min(self._next, self.num_chunks))

    def _take(self, chunk: int, generation: int) -> bool:
        if not self._leases.take(chunk, generation):
            return False
        if self._part(chunk).exists():  # finished, and its lease removed, after the folders were listed
            self._leases.remove(chunk)
            return False
        for path in self._unfinished.glob(f"chunk-{chunk:06d}.*"):  # of owners that died, or have lost the lease
            path.unlink(missing_ok=True)
        self._next = chunk + 1
        return True

    def _write(self, chunk: int, write: Callable[[Path], None]) -> bool:
        temporary = self._unfinished / part_name(chunk, f".{self._owner.token}{self._suffix}")
        try:
            write(temporary)
            sync(temporary)
            won = put(temporary, self._part(chunk))
        except OSError as error:
            # Whoever finishes or takes over a chunk clears away what its former owner was writing.
            taken_away = error.errno in (errno.ENOENT, errno.ESTALE) and not temporary.exists()
            if not taken_away or self._leases.holds(chunk):
                raise
            return False
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if won:
            sync(self._parts)
        return won

    def _sweep(self, newest: Mapping[int, int], finished: set[int]) -> None:
        """Delete what killed launches left behind for chunks that are finished all the same."""
        for path in self._unfinished.iterdir():
            owned = re.match(r"chunk-(\d{6,})\.", path.name)
            if int(owned[1]) in finished if owned else path.name.startswith("manifest."):
                path.unlink(missing_ok=True)
        for chunk in newest.keys() & finished:
            self._leases.remove(chunk)

    def _part(self, chunk: int) -> Path:
        return self._parts / part_name(chunk, self._suffix)

    def _finished(self) -> set[int]:
        return set(finished_parts(self._parts, self._suffix))


def status_of(folder: str | Path) -> Status:
    """The status of the job that has this folder, for somebody who only looks; the folder may be read-only.

    Raises:
        LedgerError: it is no job's folder.
    """
    folder = Path(folder)
    with plain_errors(folder, "read the status"):
        if not (folder / "manifest.json").exists():
            raise LedgerError(f"{folder} holds no manifest.json: it is not the output folder of a job")
        manifest = read_manifest(folder)
        if manifest["format"] != FORMAT:
            raise LedgerError(f"{folder} has the format {manifest['format']}, this version knows {FORMAT}")
        leases = Leases(folder / "leases", Owner.here(), lease_seconds=120.0)
        try:
            now = leases.now()
        except OSError:  # read-only: this machine's clock is good enough to look at
            now = time.time()
        return measure(manifest["num_chunks"], finished_parts(folder / "parts", manifest["part_suffix"]), leases, now)
