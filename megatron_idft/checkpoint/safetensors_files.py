"""Safetensors folders, read and written tensor by tensor with plain file access.

Reading the few bytes wanted, instead of mapping the file, keeps resident memory at one tensor; writing in the order of
the header needs no more. `safetensors_header.py` reads and checks the headers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from megatron_idft.checkpoint.safetensors_header import INDEX, SINGLE, read_folder
from megatron_idft.errors import ConversionError
from megatron_idft.files import sync

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9  # as transformers' save_pretrained by default


class SafetensorsFolder:
    """The tensors of a Hugging Face folder: `model.safetensors`, or the shards that its index names.

    Raises:
        ConversionError: no safetensors there (weights in pickles are never read), a file that is damaged, or one that
            lies outside of the folder.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.tensors = read_folder(self.folder)
        self._open: tuple[Path, IO[bytes]] | None = None

    def read(self, name: str, start: int = 0, rows: int | None = None) -> Tensor:
        """Rows `start` to `start + rows` of a tensor, on the CPU, in its own dtype."""
        stored = self.tensors[name]
        rest = stored.shape[1:]
        rows = stored.shape[0] - start if rows is None else rows
        result = torch.empty((rows, *rest), dtype=DTYPES[stored.dtype])
        if self._open is None or self._open[0] != stored.file:
            self.close()
            self._open = (stored.file, open(stored.file, "rb", buffering=0))  # noqa: SIM115  closed by close()
        file = self._open[1]
        file.seek(stored.begin + start * math.prod(rest) * result.element_size())
        view = memoryview(result.view(torch.uint8).numpy()).cast("B")
        while view:
            count = file.readinto(view)  # type: ignore[attr-defined]  # of FileIO; may read less than asked
            if not count:
                raise ConversionError(f"{stored.file} ends within {name}")
            view = view[count:]
        return result

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


class SafetensorsWriter:
    """Writes tensors into a folder, in the order of `plan`, in shards of up to `shard_bytes`.

    Args:
        folder: exists.
        plan: name, shape and dtype of each tensor. `write` may bring a tensor in several blocks of rows.

    As a context manager it writes the index at the end, and checks that every byte of the plan has come.
    """

    def __init__(
        self,
        folder: Path,
        plan: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
        shard_bytes: int = SHARD_BYTES,
    ):
        self._folder = folder
        self._shards: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
        filled = 0
        for name, shape, dtype in plan:
            size = math.prod(shape) * dtype.itemsize
            if filled and filled + size > shard_bytes:
                self._shards.append([])
                filled = 0
            self._shards[-1].append((name, shape, dtype))
            filled += size
        self._total = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in plan)
        self._shard = -1
        self._file: IO[bytes] | None = None
        self._left: list[tuple[str, int]] = []  # name and bytes to come, of the open shard

    def name(self, shard: int) -> str:
        """File name of a shard."""
        count = len(self._shards)
        return SINGLE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def write(self, name: str, tensor: Tensor) -> None:
        """Append `tensor`, all of `name` or its next rows."""
        while not self._left:
            self._next_shard()
        expected, left = self._left[0]
        content = memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")
        if name != expected or len(content) > left:
            raise AssertionError(f"{name} with {len(content)} bytes came where {expected} with {left} was due")
        assert self._file is not None
        self._file.write(content)
        if left == len(content):
            self._left.pop(0)
        else:
            self._left[0] = (name, left - len(content))

    def _next_shard(self) -> None:
        self._close_shard()
        self._shard += 1
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
        at = 0
        for name, shape, dtype in self._shards[self._shard]:
            end = at + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
            self._left.append((name, math.prod(shape) * dtype.itemsize))
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
        self._file = open(self._folder / self.name(self._shard), "wb")  # noqa: SIM115  closed by _close_shard
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            sync(Path(self._file.name))
            self._file = None

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_shard()
        if kind is not None:
            return
        if self._left or self._shard + 1 < len(self._shards):
            raise AssertionError(f"shard {self._shard + 1} of {len(self._shards)} lacks {self._left[:3]}")
        if len(self._shards) > 1:
            weights = {name: self.name(i) for i, shard in enumerate(self._shards) for name, _, _ in shard}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weights.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
