"""Record files cut into blocks of whole records: read in one process, parsed in another.

A block's rows do not depend on who parses it. Compressed files and Parquet cannot be entered in the middle, so one
process reads them all, at about a gigabyte a second for plain lines, and hands the bytes on.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_idft.corpus.records import (
    PARQUET_BATCH_ROWS,
    Record,
    check_files,
    parquet_batch_rows,
    parse_line,
    read_lines,
    to_record,
)
from megatron_idft.errors import RAW_EXCERPT, RecordError


@dataclass(slots=True)
class Block:
    """Consecutive lines or Parquet rows of one file.

    Attributes:
        index: of the block in the whole input.
        file_number: of the file in the input.
        first: line (row) of its first row, from 1.
        data: the lines, or an Arrow stream.
        error: of the unreadable part after them.
        disk_bytes: of the file, read since the block before.
    """

    index: int
    file: str
    file_number: int
    stem: str
    first: int
    data: bytes
    error: RecordError | None = None
    disk_bytes: int = 0


def read_blocks(paths: Sequence[str], chunk_bytes: int, limit: int | None = None) -> Iterator[Block]:
    """The input as blocks of about chunk_bytes of text or of Arrow's memory, at least one record each.

    Args:
        paths: the record files.
        chunk_bytes: of a block.
        limit: only so many records.

    Raises:
        InputError, FileNotFoundError: before anything is read.
    """
    check_files(paths)
    return _blocks(paths, chunk_bytes, limit)


def parse_block(block: Block) -> Iterator[tuple[int, Record | RecordError]]:
    """(line, record or what is wrong with it), in order."""
    rows = _table_rows(block) if block.file.endswith(".parquet") else _text_rows(block)
    for line, row in rows:
        if isinstance(row, RecordError):
            yield line, row
            continue
        try:
            yield line, to_record(row, block.file, line, f"{block.stem}:{line}")
        except RecordError as error:
            error.raw = repr(row)[:RAW_EXCERPT]
            yield line, error
    if block.error is not None:
        yield block.error.line, block.error


def _blocks(paths: Sequence[str], chunk_bytes: int, limit: int | None) -> Iterator[Block]:
    names = Counter(Path(path).name for path in paths)
    index = 0
    for number, path in enumerate(map(Path, paths)):
        if limit == 0:
            return
        stem = path.name if names[path.name] == 1 else str(path)  # as the ids of read_records
        read = _table_blocks if path.name.endswith(".parquet") else _text_blocks
        reported = 0
        for first, rows, data, error, position in read(path, chunk_bytes, limit):
            yield Block(index, str(path), number, stem, first, data, error, position - reported)
            index, reported = index + 1, position
            if limit is not None:
                limit -= rows


_Part = tuple[int, int, bytes, RecordError | None, int]  # first row, rows, data, error, position in the file


def _text_blocks(path: Path, chunk_bytes: int, limit: int | None) -> Iterator[_Part]:
    with open(path, "rb") as raw:
        lines: list[bytes] = []
        size, first, rows, left = 0, 1, 0, limit
        for line, text in read_lines(path, raw):
            error = text if isinstance(text, RecordError) else None
            if isinstance(text, bytes):
                lines.append(text)
                size += len(text)
            rows += error is not None or not lines[-1].isspace()
            if size >= chunk_bytes or error is not None or rows == left:
                yield first, rows, b"".join(lines), error, raw.tell()
                left = None if left is None else left - rows
                lines, size, first, rows = [], 0, line + 1, 0
            if left == 0:
                return
        if lines:
            yield first, rows, b"".join(lines), None, path.stat().st_size


def _text_rows(block: Block) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(block.data.split(b"\n"), block.first):
        if text and not text.isspace():
            yield line, parse_line(text, block.file, line)


def _table_blocks(path: Path, chunk_bytes: int, limit: int | None) -> Iterator[_Part]:
    size, row = path.stat().st_size, 0
    batches: list[Any] = []

    def part(error: RecordError | None) -> _Part:
        rows = sum(batch.num_rows for batch in batches)
        sink = pa.BufferOutputStream()
        if batches:
            with pa.ipc.new_stream(sink, batches[0].schema) as stream:
                for batch in batches:
                    stream.write_batch(batch)
        batches.clear()
        return row - rows + 1, rows + (error is not None), sink.getvalue().to_pybytes(), error, size * row // total

    total = 1
    try:
        with pq.ParquetFile(path) as table:
            total = max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                batches.append(batch if limit is None else batch.slice(0, limit - row))
                row += batches[-1].num_rows
                if sum(batch.nbytes for batch in batches) >= chunk_bytes or row == limit:
                    yield part(None)
                if row == limit:
                    return
    except (pa.ArrowException, OSError, ValueError, OverflowError) as damage:
        message = f"damaged Parquet file, the rest of it is unreadable: {damage}"
        yield part(RecordError(str(path), row + 1, "", message))
        return
    if batches:
        yield part(None)


def _table_rows(block: Block) -> Iterator[tuple[int, Any]]:
    if not block.data:
        return
    row = block.first
    with pa.ipc.open_stream(block.data) as stream:
        for batch in stream:
            for value in parquet_batch_rows(batch, Path(block.file), row - 1):
                yield row, value
                row += 1
