"""A file of scores that another engine wrote, JSONL or Parquet, cut into parts in one pass, without much memory.

A row is a record: `file` and `line`, or `id`; `token_ids` and `log_prob`; and, if it likes, `positions`, `entropy`,
`top_token_ids` and `top_log_prob`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_idft.corpus.ledger.files import part_name
from megatron_idft.corpus.records import Record, check_files, parquet_batch_rows, parse_line, read_lines
from megatron_idft.data.reference.index import place_key
from megatron_idft.data.reference.parts import LISTS
from megatron_idft.errors import RecordError
from megatron_idft.files import complete_file

_PART_ROWS = 256
_SCHEMA = pa.schema(LISTS)
_NEEDED = ("token_ids", "log_prob")


class PlaceKeys:
    """The keys of records by their place. Files are known by their names, where no two of the input share one.

    Args:
        paths: the record files.
    """

    def __init__(self, paths: Sequence[str]):
        self._named = Counter(Path(path).name for path in paths)

    def of_line(self, file: str, line: int) -> int:
        name = Path(file).name
        return place_key("line", name if self._named[name] < 2 else file, line)

    def of_id(self, identity: str | int) -> int:
        return place_key("id", identity)

    def of_record(self, record: Record) -> tuple[int, int]:
        """Each that its scores may have."""
        return self.of_line(record.file, record.line), self.of_id(record.id)


def cut_into_parts(path: Path, keys: PlaceKeys, folder: Path) -> Iterator[NDArray[np.uint64]]:
    """Write the rows of `path` as parts into `folder`, each whole or not at all; the keys of each part.

    Raises:
        RecordError: a row that is no record's scores; names file, line and column.
    """
    check_files([path])
    rows = _table_rows(path) if path.name.endswith(".parquet") else _text_rows(path)
    for number, batch in enumerate(batched(rows, _PART_ROWS)):
        yield np.array([_key(row, keys, path, line) for line, row in batch], np.uint64)
        with complete_file(folder / part_name(number, ".parquet")) as building:
            pq.write_table(_table(batch, path), building)


def _text_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, "rb") as raw:
        for line, text in read_lines(path, raw):
            if isinstance(text, RecordError):
                raise text
            if text.strip():
                yield line, _object(parse_line(text, str(path), line), path, line)


def _table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    row = 0
    try:
        with pq.ParquetFile(path) as table:
            names = [name for name in ("file", "line", "id", *LISTS) if name in table.schema_arrow.names]
            for batch in table.iter_batches(batch_size=_PART_ROWS, columns=names):
                for value in parquet_batch_rows(batch, path, row):
                    row += 1
                    yield row, _object(value, path, row)
    except (pa.ArrowException, OSError) as error:
        raise RecordError(str(path), row + 1, "", f"damaged Parquet file: {error}") from error


def _object(row: Any, path: Path, line: int) -> dict[str, Any]:
    if isinstance(row, RecordError):
        raise row
    if not isinstance(row, dict):
        raise RecordError(str(path), line, "", f"expected an object, found {type(row).__name__}")
    return row


def _key(row: dict[str, Any], keys: PlaceKeys, path: Path, line: int) -> int:
    if isinstance(row.get("file"), str) and type(row.get("line")) is int:
        return keys.of_line(row["file"], row["line"])
    if isinstance(row.get("id"), str | int) and row["id"] is not True and row["id"] is not False:
        return keys.of_id(row["id"])
    message = "does not say whose scores these are: give `file` (text) and `line` (a number from 1), or `id`"
    raise RecordError(str(path), line, "file", message)


def _table(batch: Sequence[tuple[int, dict[str, Any]]], path: Path) -> pa.Table:
    rows = [_lists(row, path, line) for line, row in batch]
    try:
        return pa.Table.from_pylist(rows, _SCHEMA)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        for (line, _), row in zip(batch, rows, strict=True):  # name the row that is to blame
            for name, values in row.items():
                try:
                    pa.array([values], LISTS[name])
                except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                    raise RecordError(str(path), line, name, f"expected a list of numbers: {error}") from error
        raise


def _lists(row: dict[str, Any], path: Path, line: int) -> dict[str, Any]:
    """The columns that are lists, one list of numbers each."""
    found = {name: row[name] for name in LISTS if row.get(name) is not None}
    for name in _NEEDED:
        if name not in found:
            raise RecordError(str(path), line, name, "missing: give one number for each trained token")
    for name in ("top_token_ids", "top_log_prob"):
        nested = found.get(name)
        if isinstance(nested, list) and nested and isinstance(nested[0], list):
            found[name] = [value for values in nested if isinstance(values, list) for value in values]
    lengths = {
        name: len(found[name]) for name in ("positions", *_NEEDED, "entropy") if isinstance(found.get(name), list)
    }
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{number} of {name}" for name, number in lengths.items())
        raise RecordError(str(path), line, "log_prob", f"as many numbers as tokens are needed, found {told}")
    return found
