"""Leases on numbered chunks of work, for launches that share a folder and nothing else.

A lease is a file `chunk-000012.0`, created exclusively, renewed by a heartbeat that sets its modification time, and
given up by setting that time to 0. To take over a stale or released lease is to create the next generation,
`chunk-000012.1`, exclusively: of any number of contenders one succeeds, on NFS too. The highest generation is the valid
one. A generation is never removed before its chunk is finished, so its name is never free a second time, and a
contender that judged an old generation and was held up meanwhile cannot take the lease of whoever came after it.

Ages are differences between times that the file system stamped: a machine's own clock is never compared. (Where the
file system stamps with the clients' clocks, as Lustre does, these have to agree to within a lease; if they do not, work
is done twice.) A lease is stale when it was not renewed for as long as it says itself, or when its process lived on
this very machine and is dead.
"""

import json
import os
import re
import socket
import threading
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

_NAME = re.compile(r"chunk-(\d{6,})\.(\d+)")
_BEATS_PER_LEASE = 6  # NFS clients may show times that are a minute old: a few missed beats are no death


@dataclass(frozen=True, slots=True)
class Owner:
    """One launch. `place` tells process ids of different machines, boots and containers apart; empty: not known."""

    host: str
    pid: int
    token: str
    place: str = ""

    @classmethod
    def here(cls) -> Self:
        host = socket.gethostname()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            place = f"{host} {boot} {os.readlink('/proc/self/ns/pid')}"
        except OSError:
            place = ""
        return cls(host, os.getpid(), uuid.uuid4().hex[:12], place)

    def is_known_dead(self, place: str) -> bool:
        """True if the process lived at `place`, which is where the caller is, and is gone."""
        if not place or self.place != place:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False

    def __str__(self) -> str:
        return f"{self.host} (process {self.pid})"


@dataclass(frozen=True, slots=True)
class Lease:
    """The valid generation of one chunk's lease. Times in seconds by the file system's clock.

    Attributes:
        owner: None if its owner died while writing it.
        age: since it was taken.
        silence: since it was last renewed.
    """

    chunk: int
    generation: int
    owner: Owner | None
    age: float
    silence: float
    state: Literal["held", "stale", "released"]


class Leases:
    """The leases of one folder, as one launch sees them. Thread-safe; every method may raise OSError.

    Args:
        lease_seconds: others may take over a lease of this launch that was not renewed for so long.
    """

    def __init__(self, folder: Path, owner: Owner, lease_seconds: float):
        if not lease_seconds > 0:
            raise ValueError(f"lease_seconds must be positive, got {lease_seconds}")
        self._folder, self._owner, self._seconds = folder, owner, lease_seconds
        self._held: dict[int, int] = {}  # chunk -> generation
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def newest(self) -> dict[int, int]:
        """The valid generation of every chunk that ever was leased and is not finished."""
        newest: dict[int, int] = {}
        for name in os.listdir(self._folder):
            if match := _NAME.fullmatch(name):
                chunk, generation = int(match[1]), int(match[2])
                newest[chunk] = max(generation, newest.get(chunk, generation))
        return newest

    def now(self) -> float:
        """The file system's time: what it stamps on a file that is touched now."""
        clock = self._folder / "clock"
        with open(clock, "ab"):
            os.utime(clock)
            return clock.stat().st_mtime

    def read(self, chunk: int, generation: int, now: float) -> Lease | None:
        """The lease, judged at the time `now`; None if it is gone, which means that the chunk was finished."""
        try:
            with open(self._path(chunk, generation), "rb") as file:  # NFS: opening it brings its times up to date
                text, renewed = file.read(), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None
        owner, seconds, taken = None, self._seconds, renewed
        with suppress(ValueError, KeyError, TypeError):  # torn: judged by its time alone
            content = json.loads(text)
            owner, seconds, taken = Owner(**content["owner"]), float(content["lease_seconds"]), float(content["taken"])
        silence = now - renewed
        if renewed == 0:
            return Lease(chunk, generation, owner, 0.0, 0.0, "released")
        # A time far in the future was stamped before the server's clock was set back: nobody renews that either.
        stale = abs(silence) > seconds or (owner is not None and owner.is_known_dead(self._owner.place))
        return Lease(chunk, generation, owner, max(now - taken, 0.0), max(silence, 0.0), "stale" if stale else "held")

    def take(self, chunk: int, generation: int) -> bool:
        """Create this generation of the lease and keep it renewed; False if another launch was faster."""
        if self._stop.is_set():
            raise ValueError("these leases are closed")
        path = self._path(chunk, generation)
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            content = {"owner": asdict(self._owner), "lease_seconds": self._seconds, "taken": os.fstat(file).st_mtime}
            os.write(file, json.dumps(content).encode())
            with self._lock:
                os.utime(path)
                self._held[chunk] = generation
                if self._heart is None:
                    self._heart = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
                    self._heart.start()
        except BaseException:  # a full disk, or a signal whose handler raises: leave the chunk to others
            self._held.pop(chunk, None)
            os.utime(path, (0, 0))
            raise
        finally:
            os.close(file)
        return True

    def holds(self, chunk: int) -> bool:
        """Whether this launch has the chunk's lease still, asking the folder."""
        with self._lock:
            self._renew()
            return chunk in self._held

    def held(self) -> list[int]:
        """The chunks that this launch holds, as of the last heartbeat."""
        with self._lock:
            return sorted(self._held)

    def release(self, chunk: int) -> None:
        """Let others take the chunk at once. Does nothing if this launch does not hold it (any more)."""
        with self._lock:
            generation = self._held.pop(chunk, None)
            if generation is not None:
                with suppress(FileNotFoundError):
                    os.utime(self._path(chunk, generation), (0, 0))

    def remove(self, chunk: int) -> None:
        """Delete every generation, whoever holds it. Only for a chunk that is finished."""
        with self._lock:
            self._held.pop(chunk, None)
        for name in os.listdir(self._folder):
            if (match := _NAME.fullmatch(name)) and int(match[1]) == chunk:
                (self._folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Stop the heartbeat. Leases that are still held go stale."""
        self._stop.set()
        if self._heart is not None and self._heart is not threading.current_thread():
            self._heart.join()

    def _path(self, chunk: int, generation: int) -> Path:
        return self._folder / f"chunk-{chunk:06d}.{generation}"

    def _beat(self) -> None:
        while not self._stop.wait(self._seconds / _BEATS_PER_LEASE):
            with self._lock, suppress(OSError):  # out of reach for now: the next beat tries again
                self._renew()

    def _renew(self) -> None:
        newest = self.newest() if self._held else {}
        for chunk, generation in list(self._held.items()):
            try:
                if newest.get(chunk, generation) > generation:  # taken over while this process could not renew it
                    raise FileNotFoundError
                os.utime(self._path(chunk, generation))
            except FileNotFoundError:
                del self._held[chunk]
