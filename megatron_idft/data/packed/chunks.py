"""One block's documents as arrays in a pair of files: `chunk-000042.bin` and, once that is complete, `….json`.

The .bin file holds one array after the other: lines int64 [documents], ids int32 [tokens], lengths int32 [documents],
sources int32 [documents], what each token counts for in the loss, uint8 (the mask) or float32 (weights) [tokens], and
the columns of a reference model, [tokens] or [tokens, K] each.
Without packing, `….parquet` holds a row for each document, see record_index.py.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.ledger.files import part_name
from megatron_idft.corpus.scores.rows import RecordOrigin
from megatron_idft.data.packed.counts import Counts
from megatron_idft.data.packed.record_index import write_index_part
from megatron_idft.data.reference.columns import ReferenceColumns
from megatron_idft.files import complete_file, write_atomically


@dataclass(slots=True)
class ChunkInfo:
    """The content of a chunk's JSON.

    Attributes:
        file_number: of the file in the input in which the block began.
        first: line or row there.
        weighted: `loss` holds weights, not the mask.
        sources: the names that the chunk's source numbers stand for.
        per_source: figures of each, see encoding.py.
        lengths: how many documents had 2^(k-1) to 2^k - 1 tokens, by k, before any was cut.
        errors: the bad records that were skipped.
        forms: how many records were read in each form, by its name.
        weights: of the records that weigh their tokens, or train others than the assistant: how many tokens are
            `trained`, the `sum` of their weights, how many are negative (`negative_tokens`), how many records have such
            ones (`negative_records`), and how many train others (`prompt_records`). Empty without any.
        reference: which columns of a reference model there are, and `log_prob_sum`, of all trained tokens.
    """

    index: int
    file_number: int
    first: int
    documents: int = 0
    tokens: int = 0
    weighted: bool = False
    counts: Counts = field(default_factory=Counts)
    end_ids: list[int] = field(default_factory=list)
    largest_id: int | None = None  # chunks of earlier versions do not say
    sources: list[str] = field(default_factory=list)
    per_source: list[dict[str, int]] = field(default_factory=list)
    lengths: dict[str, int] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    forms: dict[str, int] = field(default_factory=dict)  # chunks of earlier versions do not say
    weights: dict[str, float] = field(default_factory=dict)  # nor do these
    reference: dict[str, Any] | None = None

    def weigh(self, labels: NDArray[Any], prompts: bool) -> None:
        """Count the weights of a record's labels; whether others than the assistant are trained."""
        negative = int(np.count_nonzero(labels < 0))
        figures = {"trained": int(np.count_nonzero(labels)), "sum": float(labels.sum(dtype=np.float64))}
        figures |= {"negative_tokens": negative, "negative_records": int(negative > 0), "prompt_records": int(prompts)}
        self.weights = {name: self.weights.get(name, 0) + figure for name, figure in figures.items()}

    @property
    def columns(self) -> ReferenceColumns | None:
        """Of the reference model."""
        return None if self.reference is None else ReferenceColumns.recorded(self.reference)


@dataclass(slots=True)
class Chunk:
    """The documents of a chunk.

    Attributes:
        lines: [documents].
        ids: [tokens].
        lengths: [documents].
        loss: [tokens], uint8 or float32.
        sources: [documents].
        reference: the columns of a reference model by their names: of each document, or, where the chunk was read from
            its files, of all tokens at once, mapped.
        records: a row for each document, only where they are not packed and the chunk was not read from its files.
    """

    info: ChunkInfo
    lines: NDArray[np.int64]
    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    sources: NDArray[np.int32]
    loss: NDArray[Any]
    records: list[RecordOrigin] | None = None
    reference: dict[str, list[NDArray[Any]]] = field(default_factory=dict)


def is_finished(folder: Path, index: int) -> bool:
    return (folder / part_name(index, ".json")).exists()


def write_chunk(folder: Path, chunk: Chunk) -> None:
    """All files, the JSON last: where it stands, the chunk is whole. Two writers at once write the same bytes."""
    arrays = (
        chunk.lines.astype("<i8", copy=False),
        chunk.ids.astype("<i4", copy=False),
        chunk.lengths.astype("<i4", copy=False),
        chunk.sources.astype("<i4", copy=False),
        chunk.loss.astype("<f4" if chunk.info.weighted else "u1", copy=False),
    )
    with complete_file(folder / part_name(chunk.info.index, ".bin")) as path, open(path, "wb") as file:
        for array in (*arrays, *(part for parts in chunk.reference.values() for part in parts)):
            file.write(memoryview(np.ascontiguousarray(array)).cast("B"))
    if chunk.records is not None:
        with complete_file(index_part(folder, chunk.info.index)) as path:
            write_index_part(path, chunk.records)
    write_atomically(folder / part_name(chunk.info.index, ".json"), json.dumps(asdict(chunk.info), ensure_ascii=False))


def index_part(folder: Path, index: int) -> Path:
    """Of a chunk, without packing: the rows of its records."""
    return folder / part_name(index, ".parquet")


def read_info(folder: Path, index: int) -> ChunkInfo:
    values = json.loads((folder / part_name(index, ".json")).read_text(encoding="utf-8"))
    return ChunkInfo(**values | {"counts": Counts(**values["counts"])})


def read_lengths(folder: Path, info: ChunkInfo) -> NDArray[np.int32]:
    offset = 8 * info.documents + 4 * info.tokens
    return np.fromfile(folder / part_name(info.index, ".bin"), "<i4", info.documents, offset=offset)


def read_origins(folder: Path, info: ChunkInfo) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """`lines` and `sources` of the chunk, without its tokens."""
    path, n = folder / part_name(info.index, ".bin"), info.documents
    return np.fromfile(path, "<i8", n), np.fromfile(path, "<i4", n, offset=12 * n + 4 * info.tokens)


def read_chunk(folder: Path, info: ChunkInfo) -> Chunk:
    """The whole chunk, mapped.

    Raises:
        ValueError: the file is not of the size that the JSON says.
    """
    path, n, tokens, columns = folder / part_name(info.index, ".bin"), info.documents, info.tokens, info.columns
    kinds = [np.dtype(kind) for kind in ("<i8", "<i4", "<i4", "<i4", "<f4" if info.weighted else "u1")]
    sizes = [kind.itemsize * count for kind, count in zip(kinds, (n, tokens, n, n, tokens), strict=True)]
    sizes += [each * tokens for each in columns.token_bytes.values()] if columns else []
    found = path.stat().st_size
    if found != sum(sizes):
        raise ValueError(f"{path} should hold {sum(sizes)} bytes, found {found}")
    data = np.memmap(path, np.uint8, "r") if found else np.empty(0, np.uint8)
    arrays = np.split(data, np.cumsum(sizes)[:-1])
    lines, ids, lengths, sources, loss = (array.view(kind) for array, kind in zip(arrays, kinds, strict=False))
    names = columns.shapes if columns else ()
    reference = {name: [array] for name, array in zip(names, arrays[len(kinds) :], strict=True)}
    return Chunk(info, lines, ids, lengths, sources, loss, reference=reference)
