"""Progress on the console: a bar on a terminal; elsewhere, in files and pipes, a line now and then."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TextIO, cast

from tqdm import tqdm

from megatron_idft.console import error_stream

BAR_SECONDS, LINE_SECONDS = 1.0, 15.0


def byte_bar(title: str, total: int, shown: bool = True, unit: str = "B") -> Any:
    """A tqdm bar of bytes, or of another unit, for work of which every piece is small."""
    manner = _Manner("{n_fmt}{unit}/{total_fmt}{unit}, {rate_fmt}{postfix}")
    return tqdm(
        total=total,
        desc=title,
        unit=unit,
        unit_scale=True,
        disable=not shown,
        file=manner.stream,
        mininterval=manner.seconds,
        maxinterval=max(manner.seconds, 10.0),
        **manner.size,
        bar_format=manner.form,
    )


@dataclass(frozen=True, slots=True)
class Done:
    """How far the work is.

    Attributes:
        records, tokens: finished; of those that a launch before this one has finished too.
        share: of all the work, 0 to 1: what the time left is told by.
        stage: what is being done, in plain words; may be empty.
    """

    records: int
    tokens: int
    share: float
    stage: str = ""


class Progress:
    """Records, tokens, rate and time left, drawn on a thread of its own: also while one step takes long.

    Args:
        title: what is done.
        records: of all the work.
        tokens: of all the work; None where nobody knows, and only those of this process are counted.
        look: the state of the work now, from another thread.
        shown: False on the ranks that do not show it.
        unit: what `records` are.

    Attributes:
        waits: whether nothing can be done here until others finish their part.
    """

    def __init__(
        self,
        title: str,
        records: int,
        tokens: int | None,
        look: Callable[[], Done],
        *,
        shown: bool = True,
        unit: str = "records",
    ) -> None:
        self._records, self._tokens, self._look, self._unit = records, tokens, look, unit
        self.waits = False
        manner = _Manner("{unit}")  # tqdm's word for any text of ours
        self._seconds = manner.seconds
        self._before = look()
        self._bar = tqdm(
            total=1.0,
            initial=self._before.share,
            desc=title,
            disable=not shown or self._before.share >= 1.0,
            file=manner.stream,
            mininterval=0.0,
            **manner.size,
            bar_format=manner.form,
            unit=self._numbers(self._before, 0.0),
        )
        self._ended = threading.Event()
        self._drawing = threading.Thread(target=self._draw_now_and_then, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if not self._bar.disable:
            self._drawing.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        if not self._bar.disable:
            self._drawing.join()
            self._draw()
            self._bar.close()

    def _draw_now_and_then(self) -> None:
        while not self._ended.wait(self._seconds):
            self._draw()

    def _draw(self) -> None:
        done = self._look()
        self._bar.n = min(done.share, 1.0)
        self._bar.unit = self._numbers(done, self._bar.format_dict["elapsed"])
        self._bar.refresh()

    def _numbers(self, done: Done, elapsed: float) -> str:
        tokens = f"{done.tokens:,} tokens here" if self._tokens is None else f"{done.tokens:,}/{self._tokens:,} tokens"
        parts = [f"{done.records:,}/{self._records:,} {self._unit}", tokens]
        if (new := done.tokens - self._before.tokens) and elapsed:
            parts.append(f"{new / elapsed:,.0f} tokens/s")
        stage = "waiting for chunks that others work on" if self.waits else done.stage
        return ", ".join(filter(None, [*parts, stage]))


class _Manner:
    """Where progress goes, how often, and what a line of it looks like."""

    def __init__(self, numbers: str) -> None:
        """numbers: fields of tqdm's bar_format."""
        stream = error_stream()
        bar = "|{bar:10}| " if stream.isatty() else ", "
        self.form = "{desc}: {percentage:3.0f}%" + bar + "{remaining} left, " + numbers + ", {elapsed} so far"
        self.seconds = BAR_SECONDS if stream.isatty() else LINE_SECONDS
        self.stream = stream if stream.isatty() else cast(TextIO, _Lines(stream))
        self.size: dict[str, Any] = {}
        if stream.isatty():
            columns, lines = os.get_terminal_size(stream.fileno())
            # Without columns or lines is a terminal that nobody looks at (a container's): tqdm would draw nothing.
            self.size = {"nrows": 20} | ({"dynamic_ncols": True} if columns and lines else {"ncols": columns or 100})


class _Lines(io.TextIOBase):
    """What tqdm draws over itself, as lines that stand below each other."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last = stream, ""

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        if line and line != self._last:  # tqdm draws its last state again when it closes
            self._stream.write(f"{line}\n")
            self._last = line
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
