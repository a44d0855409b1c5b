"""Which record each pack of one document came from: a Parquet file beside the packs, one row per record."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_idft.corpus.records import Message, Record
from megatron_idft.corpus.scores.rows import RECORD_SCHEMA, RecordOrigin

_SCHEMA = pa.schema([RECORD_SCHEMA.field(name) for name in RecordOrigin.__annotations__])


def indexed(record: Record, truncated: bool) -> RecordOrigin:
    """The row of a record."""
    assistant = [message for message in record.messages if message["role"] == "assistant"]
    others = [message for message in record.messages if message["role"] != "assistant"]
    return {
        "id": record.id,
        "file": record.file,
        "line": record.line,
        "source": record.source,
        "truncated": truncated,
        "prompt_hash": _text_hash(others, record.tools),
        "response_hash": _text_hash(assistant),
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


def _text_hash(messages: Sequence[Message], tools: Any = None) -> str:
    texts = [" ".join(str(message["content"]).split()) for message in messages]
    said = [[message.get("reasoning_content"), message.get("tool_calls")] for message in messages]
    if tools or any(part for parts in said for part in parts):
        texts.append(json.dumps([tools, said], ensure_ascii=False, sort_keys=True, default=str))
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
