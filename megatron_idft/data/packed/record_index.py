"""Which record each pack of one document came from: a Parquet file beside the packs, one row per record."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_idft.corpus.records import Record
from megatron_idft.corpus.scores.rows import RECORD_SCHEMA, RecordOrigin
from megatron_idft.corpus.text_hashes import text_hashes

_SCHEMA = pa.schema([RECORD_SCHEMA.field(name) for name in RecordOrigin.__annotations__])


def indexed(record: Record, truncated: bool) -> RecordOrigin:
    """The row of a record."""
    prompt_hash, response_hash = text_hashes(record)
    return {
        "id": record.id,
        "file": record.file,
        "line": record.line,
        "source": record.source,
        "truncated": truncated,
        "prompt_hash": prompt_hash,
        "response_hash": response_hash,
    }


def write_index_part(path: Path, rows: Sequence[RecordOrigin]) -> None:
    """The rows of one chunk."""
    pq.write_table(pa.Table.from_pylist(list(rows), _SCHEMA), path)


def join_index_parts(path: Path, parts: Iterable[Path]) -> None:
    """One file of the rows of all chunks, in their order."""
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))


def read_index(path: Path, indices: Sequence[int] | None = None) -> list[RecordOrigin]:
    """All rows, or those of `indices` in their order."""
    table = pq.read_table(path, memory_map=True)
    if indices is not None:
        table = table.take(pa.array(indices, pa.int64()))
    return cast(list[RecordOrigin], table.to_pylist())
