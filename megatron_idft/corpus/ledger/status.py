"""How far a job is: finished, leased and stale chunks, rate and time left."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_idft.corpus.ledger.leases import Lease, Leases

_RATE_PARTS = 32  # the rate follows launches that join and leave


@dataclass(frozen=True, slots=True)
class Status:
    """A job at one moment. Seconds by the file system's clock.

    Attributes:
        leased: chunks somebody works on.
        stale: chunks whose owner is gone.
        left: chunks that a launch may claim now, the stale ones among them.
        rate: chunks per second of all launches together, over the last finished parts; None before the second one.
        eta_seconds: for all unfinished chunks, at that rate.
        since_last: age of the latest part.
    """

    num_chunks: int
    finished: int
    leased: list[Lease]
    stale: list[Lease]
    left: int
    rate: float | None
    eta_seconds: float | None
    since_last: float | None

    def format(self) -> str:
        """As text for a person."""
        share = 100 * self.finished / self.num_chunks if self.num_chunks else 100.0
        lines = [
            f"{self.finished:,} of {self.num_chunks:,} chunks finished ({share:.1f} %), {len(self.leased):,} leased, "
            f"{self.left:,} left, {len(self.stale):,} of these given up by a launch that is gone"
        ]
        if self.since_last is not None:
            rate = f"{60 * self.rate:.3g} chunks/min, " if self.rate is not None else ""
            eta = f", {_duration(self.eta_seconds)} to go" if self.eta_seconds else ""
            lines.append(f"{rate}last part {_duration(self.since_last)} ago{eta}")
        lines += [_line(lease, "leased by") for lease in self.leased]
        lines += [_line(lease, "was leased by") for lease in self.stale]
        return "\n".join(lines)


def measure(num_chunks: int, finished: Mapping[int, Path], leases: Leases, now: float) -> Status:
    """Look at the folder.

    Args:
        num_chunks: of the job.
        finished: chunk -> part.
        leases: of the folder.
        now: the file system's time.

    Raises:
        OSError: the folder cannot be read.
    """
    open_chunks = sorted((chunk, newest) for chunk, newest in leases.newest().items() if chunk not in finished)
    seen = [leases.read(chunk, newest, now) for chunk, newest in open_chunks]
    leased = [lease for lease in seen if lease is not None and lease.state == "held"]
    stale = [lease for lease in seen if lease is not None and lease.state == "stale"]
    unfinished = num_chunks - len(finished)
    times = sorted(part.stat().st_mtime for part in finished.values())[-_RATE_PARTS:]
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None
    return Status(
        num_chunks,
        len(finished),
        leased,
        stale,
        left=max(unfinished - len(leased), 0),
        rate=rate,
        eta_seconds=unfinished / rate if rate else None,
        since_last=max(now - times[-1], 0.0) if times else None,
    )


def _line(lease: Lease, verb: str) -> str:
    owner = lease.owner or "a launch that died while claiming it"
    attempt = f", attempt {lease.generation + 1}" if lease.generation else ""
    taken, seen = _duration(lease.age), _duration(lease.silence)
    return f"  chunk {lease.chunk:06d} {verb} {owner}, taken {taken} ago, last sign of life {seen} ago{attempt}"


def _duration(seconds: float | None) -> str:
    seconds = seconds or 0.0
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
