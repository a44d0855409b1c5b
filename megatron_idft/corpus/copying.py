"""Chosen records of record files, copied as they were: lines byte for byte, rows of Parquet with their own types."""

import gzip
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import batched
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_idft.corpus.json_text import UnwritableError, json_text
from megatron_idft.corpus.records import PARQUET_BATCH_ROWS, SUFFIXES, parquet_batch_rows, read_lines
from megatron_idft.errors import InputError, RecordError

_GROUP = 16  # batches in a row group
Lines = Collection[int]  # of a file, or rows of a Parquet file, from 1


def suffix_of(output: Path) -> str:
    """Which of `SUFFIXES` a new file has.

    Raises:
        InputError: it has another one, or is there already.
    """
    if output.exists():
        raise InputError(f"{output} exists; name a new file")
    suffix = next((suffix for suffix in SUFFIXES if output.name.endswith(suffix)), None)
    if suffix is None:
        raise InputError(f"{output}: name a file that ends in {', '.join(SUFFIXES)}")
    return suffix


@contextmanager
def open_lines(path: Path, suffix: str) -> Iterator[IO[bytes] | Any]:
    """A binary file that compresses as `suffix` says, the same bytes at any time."""
    with ExitStack() as stack:
        raw = stack.enter_context(open(path, "wb"))
        if suffix == ".jsonl.gz":
            yield stack.enter_context(gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0))
        elif suffix == ".jsonl.zst":
            yield stack.enter_context(pa.CompressedOutputStream(pa.PythonFile(raw, "w"), "zstd"))
        else:
            yield raw


def copy_records(chosen: Sequence[tuple[Path, Lines]], path: Path, suffix: str) -> int:
    """Write the chosen lines of each file to `path`, in order.

    A line is copied with its own bytes, and a row to Parquet with its own values and types. A row of Parquet that
    becomes a line holds every column by its name; `json_text` writes values that JSON has no form for.

    Returns:
        how many lines were written.

    Raises:
        InputError: lines would have to become Parquet, Parquet files differ in columns, or JSON cannot hold a value.
        RecordError: a chosen row cannot be read.
    """
    if suffix == ".parquet":
        return _copy_to_parquet(chosen, path)
    written = 0
    with open_lines(path, suffix) as out:
        for file, lines in chosen:
            read = _rows_as_lines if file.name.endswith(".parquet") else _lines
            for text in read(file, lines):
                out.write(text)
                written += 1
    return written


def _lines(file: Path, lines: Lines) -> Iterator[bytes]:
    with open(file, "rb") as raw:
        for line, text in read_lines(file, raw):
            if line in lines and isinstance(text, bytes):
                yield text if text.endswith(b"\n") else text + b"\n"


def record_lines(file: Path) -> Iterator[int]:
    """The line (or row) of each record of a file, readable or not, from 1."""
    if file.name.endswith(".parquet"):
        yield from range(1, pq.read_metadata(file).num_rows + 1)
        return
    with open(file, "rb") as raw:
        for line, text in read_lines(file, raw):
            if isinstance(text, RecordError) or text.strip():
                yield line


def _rows_as_lines(file: Path, rows: Lines) -> Iterator[bytes]:
    for before, batch in _batches(file):
        if not any(row in rows for row in range(before + 1, before + batch.num_rows + 1)):
            continue
        for row, value in enumerate(parquet_batch_rows(batch, file, before), before + 1):
            if row not in rows:
                continue
            if isinstance(value, RecordError):
                raise value
            try:
                yield json_text(value).encode() + b"\n"
            except UnwritableError as error:
                remedy = "name an --output that ends in .parquet"
                raise RecordError(str(file), row, error.column, f"{error}; {remedy}") from None


def _copy_to_parquet(chosen: Sequence[tuple[Path, Lines]], path: Path) -> int:
    if lines := [str(file) for file, _ in chosen if not file.name.endswith(".parquet")]:
        raise InputError(f"{lines[0]} holds lines, which are copied as they are: name an --output that ends in .jsonl")
    schemas = {file: _schema(file) for file, _ in chosen}
    first = next(iter(schemas))
    for file, schema in schemas.items():
        if not schema.equals(schemas[first]):
            raise InputError(
                f"{first} and {file} have different columns or types, so no one Parquet file holds both as they are:"
                " select from one at a time, or name an --output that ends in .jsonl"
            )
    written = 0
    with pq.ParquetWriter(path, schemas[first], compression="zstd") as writer:
        taken = (
            batch.take(pa.array(wanted))
            for file, rows in chosen
            for before, batch in _batches(file)
            if (wanted := [i for i in range(batch.num_rows) if before + i + 1 in rows])
        )
        for group in batched(taken, _GROUP):
            table = pa.Table.from_batches(group)
            writer.write_table(table)
            written += table.num_rows
    return written


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file}: damaged Parquet file: {error}") from error


def _batches(file: Path) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(rows before it, batch)."""
    before = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                yield before, batch
                before += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file}: damaged Parquet file after row {before}: {error}") from error
