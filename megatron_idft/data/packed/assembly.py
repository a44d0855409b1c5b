"""Finished chunks -> packs: which documents share a pack, and every document copied to its place."""

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_idft.data.packed.chunks import (
    ChunkInfo,
    index_part,
    read_chunk,
    read_info,
    read_lengths,
    read_origins,
)
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.packing import Packs, best_fit_decreasing, one_each
from megatron_idft.data.packed.record_index import join_index_parts
from megatron_idft.data.packed.store import companion, write_index
from megatron_idft.data.reference.columns import FILES
from megatron_idft.files import sync
from megatron_idft.processes import Task

_PLACES, _TOKENS = "places.bin", ".bin"


def positions(lengths: NDArray[np.integer], pad_multiple: int) -> NDArray[np.int32]:
    """Positions of a pack that documents of so many tokens take up, int32 [documents]: n - 1 inputs, padded."""
    return (-(-(lengths.astype(np.int64) - 1) // pad_multiple) * pad_multiple).astype(np.int32)


class Assembly:
    """A folder of its own beside the chunks, for the packs until they are complete.

    lengths: int32 [documents], in the order of the input. packs: which documents share one. weighted: some document
    weighs its tokens. sources: the names of all sources, in the order in which they come up.
    """

    def __init__(self, folder: Path, infos: list[ChunkInfo], settings: PrepareSettings):
        self._folder, self._infos = folder, infos
        for dead in folder.glob("assembling-*"):  # the caller holds the folder's lock: its owner was killed
            shutil.rmtree(dead, ignore_errors=True)
        self.folder = folder / f"assembling-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir()
        self.lengths = np.concatenate([read_lengths(folder, info) for info in infos])
        self._packing = settings.packing
        self._columns = settings.reference.columns if settings.reference else None
        self.packs: Packs = (
            best_fit_decreasing(positions(self.lengths, settings.pad_multiple), settings.seq_length, settings.seed)
            if settings.packing
            else one_each(len(self.lengths))
        )
        self.weighted = any(info.weighted for info in infos)
        self.sources = list(dict.fromkeys(name for info in infos for name in info.sources))

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def write_index(self) -> None:
        """Everything that follows from the lengths: where each token goes, Megatron's index, starts and bounds."""
        order, bounds = self.packs.order, self.packs.bounds
        ordered = self.lengths[order]
        ends = np.cumsum(ordered, dtype=np.int64)
        begins = ends - ordered
        pack_begins = begins[bounds[:-1]]
        self._write(".starts.bin", (begins - np.repeat(pack_begins, np.diff(bounds))).astype("<i4"))
        places = np.empty(len(order), dtype="<i8")
        places[order] = begins
        self._write(_PLACES, places)
        self._write(".packs.bin", bounds.astype("<i8"))
        with self._create(".idx") as file:
            write_index(file.write, np.diff(np.append(pack_begins, ends[-1])))

    def write_origins(self) -> None:
        """The source and the record of every document; without packing, the index of the records."""
        if not self._packing:
            parts = (index_part(self._folder, info.index) for info in self._infos)
            join_index_parts(self.folder / ".records.parquet", parts)
        numbers = {name: number for number, name in enumerate(self.sources)}
        sources = np.empty(len(self.lengths), dtype="<i4")
        records = np.empty((len(self.lengths), 2), dtype="<i8")
        at = 0
        for info in self._infos:
            rows = slice(at, at + info.documents)
            lines, local = read_origins(self._folder, info)
            sources[rows] = np.array([numbers[name] for name in info.sources], dtype="<i4")[local]
            records[rows, 0], records[rows, 1] = info.file_number, lines
            at += info.documents
        self._write(".sources.bin", sources[self.packs.order])
        self._write(".records.bin", records[self.packs.order])

    def place_tasks(self) -> Iterator[Task]:
        """What each token has, chunk by chunk, for the processes to write."""
        sizes = {_TOKENS: 4} | ({".weight.bin": 4} if self.weighted else {".mask.bin": 1})
        sizes |= {FILES[name]: size for name, size in self._columns.token_bytes.items()} if self._columns else {}
        for suffix, size in sizes.items():
            with self._create(suffix) as file:
                file.truncate(size * self.tokens)
        first = 0
        for info in self._infos:
            if info.documents:
                header = {"do": "place", "chunk": info.index, "first": first}
                header |= {"building": str(self.folder), "weighted": self.weighted}
                yield Task(info.index, header, label=f"the packs of chunk {info.index}")
            first += info.documents

    def publish(self, prefix: Path, others: dict[str, bytes], description: bytes) -> None:
        """Give all files their names, the description, PREFIX.json, last.

        Args:
            prefix: of the names.
            others: small files, by suffix.
            description: the content of PREFIX.json.
        """
        for suffix, content in others.items():
            with self._create(suffix) as file:
                file.write(content)
        with self._create(".json") as file:
            file.write(description)
        (self.folder / _PLACES).unlink()
        written = sorted(path.name for path in self.folder.iterdir())
        for name in written:
            sync(self.folder / name)
        for stale in (
            ".mask.bin",
            ".weight.bin",
            ".errors.jsonl",
            *FILES.values(),
        ):  # of a run that was killed right here
            if stale not in written:
                companion(prefix, stale).unlink(missing_ok=True)
        for name in [name for name in written if name != ".json"]:
            (self.folder / name).replace(companion(prefix, name))
        sync(prefix.parent)
        (self.folder / ".json").replace(companion(prefix, ".json"))
        sync(prefix.parent)
        self.folder.rmdir()

    def _create(self, name: str) -> BinaryIO:
        return open(self.folder / name, "wb")

    def _write(self, name: str, array: NDArray[Any]) -> None:
        with self._create(name) as file:
            file.write(memoryview(np.ascontiguousarray(array)).cast("B"))


def place_documents(building: Path, folder: Path, header: dict[str, Any]) -> int:
    """Write one chunk's documents to their places in the packs; the number of tokens. In a worker process."""
    chunk = read_chunk(folder, read_info(folder, header["chunk"]))
    places = np.fromfile(building / _PLACES, "<i8", chunk.info.documents, offset=8 * header["first"])
    loss, suffix = chunk.loss, ".mask.bin"
    if header["weighted"]:
        loss, suffix = loss.astype("<f4", copy=False), ".weight.bin"
    columns = {_TOKENS: chunk.ids, suffix: loss} | {FILES[name]: column for name, [column] in chunk.reference.items()}
    ends = np.cumsum(chunk.lengths, dtype=np.int64)
    documents = list(zip((ends - chunk.lengths).tolist(), ends.tolist(), places.tolist(), strict=True))
    for suffix, column in columns.items():
        data, size = memoryview(np.ascontiguousarray(column)).cast("B"), column.nbytes // chunk.info.tokens
        file = os.open(building / suffix, os.O_WRONLY)
        try:
            for begin, end, place in documents:
                _write_at(file, data[size * begin : size * end], size * place)
        finally:
            os.close(file)
    return chunk.info.tokens


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
