"""Which record each sample of a token cache came from: a Parquet file beside the tokens, one row per sample."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_idft.corpus.records import Message, Record
from megatron_idft.corpus.scores.rows import RecordOrigin

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("source", pa.string()),
        ("truncated", pa.bool_()),
        ("prompt_hash", pa.string()),
        ("response_hash", pa.string()),
    ]
)
_ROWS = 4096  # in memory while writing


class RecordIndexWriter:
    """Writes rows in the order of the samples; `close` completes the file."""

    def __init__(self, path: Path):
        self._writer = pq.ParquetWriter(path, _SCHEMA)
        self._rows: list[RecordOrigin] = []

    def add(self, record: Record, truncated: bool) -> None:
        """truncated: the record was longer than its sample."""
        assistant = [message for message in record.messages if message["role"] == "assistant"]
        others = [message for message in record.messages if message["role"] != "assistant"]
        self._rows.append(
            {
                "id": record.id,
                "file": record.file,
                "line": record.line,
                "source": record.source,
                "truncated": truncated,
                "prompt_hash": _text_hash(others, record.tools),
                "response_hash": _text_hash(assistant),
            }
        )
        if len(self._rows) == _ROWS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, _SCHEMA))
        self._rows = []

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_record_index(path: Path, samples: Sequence[int] | None = None) -> list[RecordOrigin]:
    """All rows, or those of `samples` in their order."""
    table = pq.read_table(path, memory_map=True)
    if samples is not None:
        table = table.take(pa.array(samples, pa.int64()))
    rows: list[RecordOrigin] = table.to_pylist()
    return rows


def _text_hash(messages: Sequence[Message], tools: Any = None) -> str:
    texts = [" ".join(str(message["content"]).split()) for message in messages]
    said = [[message.get("reasoning_content"), message.get("tool_calls")] for message in messages]
    if tools or any(part for parts in said for part in parts):
        texts.append(json.dumps([tools, said], ensure_ascii=False, sort_keys=True, default=str))
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
