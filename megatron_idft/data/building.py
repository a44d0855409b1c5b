"""What a build of a token cache needs beside the tokens: weights on disk, and progress."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.records import OnBytes


class WeightsFile:
    """weights.bin, which begins to exist with the first record that weighs its tokens. What is skipped reads as 0."""

    def __init__(self, path: Path):
        self._path = path
        self._file: BinaryIO | None = None

    def write(self, at: int, weights: NDArray[np.float32]) -> None:
        """at: the tokens of all records before."""
        if self._file is None:
            self._file = open(self._path, "wb")  # noqa: SIM115
        self._file.seek(4 * at)
        self._file.write(weights.astype("<f4", copy=False).tobytes())

    def complete(self, tokens: int) -> None:
        if self._file is not None:
            self._file.truncate(4 * tokens)
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


class BuildProgress:
    """Records per second and the time left by the bytes read, on stderr."""

    def __init__(self, paths: Sequence[str], enabled: bool):
        from tqdm import tqdm

        total = sum(Path(path).stat().st_size for path in paths)
        self._seen = 0
        self._bar = tqdm(
            total=total,
            desc="tokenizing",
            unit="B",
            unit_scale=True,
            disable=not enabled,
            file=sys.stderr,
            mininterval=1.0,
        )

    @property
    def bytes(self) -> OnBytes:
        update: OnBytes = self._bar.update
        return update

    def records(self, count: int) -> None:
        self._seen += count
        elapsed = self._bar.format_dict["elapsed"] if not self._bar.disable else 0
        if elapsed:
            self._bar.set_postfix_str(f"{self._seen:,} records, {self._seen / elapsed:,.0f}/s", refresh=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
