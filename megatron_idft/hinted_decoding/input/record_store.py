"""The records of a corpus by index: one Parquet copy per output folder, so that no launch holds all in memory."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_idft.corpus.json_text import UnwritableError, json_text
from megatron_idft.corpus.records import ErrorLog, Record, read_records
from megatron_idft.errors import InputError, RecordError
from megatron_idft.files import building, describe_source, sync

_SCHEMA = pa.schema([("id", pa.string()), ("record", pa.string())])  # record: its fields as JSON
_GROUP = 256  # records that are read at once
_FORMAT = 2  # raise it whenever the same files would give another copy


class RecordStore:
    """An open copy.

    Attributes:
        fingerprint: of the content of all its records.
        forms: how many records each file had in each form, as `describe_forms` takes them.

    Raises:
        InputError: the copy is damaged.
    """

    def __init__(self, path: Path):
        try:
            self._file = pq.ParquetFile(path / "records.parquet")
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            self.fingerprint = str(meta["fingerprint"])
            self.forms: list[list[Any]] = meta.get("forms", [])  # copies of earlier versions do not say
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} is damaged ({error}): delete it to have it made again") from error
        self._last: tuple[int, list[str]] = (-1, [])

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        group, place = divmod(index, _GROUP)
        if self._last[0] != group:
            self._last = group, self._file.read_row_group(group, columns=["record"])["record"].to_pylist()
        return Record(**json.loads(self._last[1][place]))

    def ids(self) -> Iterator[str]:
        for batch in self._file.iter_batches(columns=["id"]):
            yield from batch["id"].to_pylist()


def store_path(folder: Path, data: Sequence[str], limit: int | None, bad_records: str) -> Path:
    """The folder of the copy of these files. Reads the head and the tail of each."""
    described = [_FORMAT, limit, bad_records, *(describe_source(Path(path)) for path in data)]
    name = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"records-{name}"


def build_store(
    path: Path,
    data: Sequence[str],
    limit: int | None,
    bad_records: str,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Write the copy unless it is there.

    The copy appears complete or not at all; of several builders, which all write the same, one wins.

    Args:
        path: of `store_path`.
        data: the files of records.
        limit: the number of records that are copied; None: all.
        bad_records: "stop" raises at the first record that cannot be used; "skip" writes it to errors.jsonl in the
            copy.
        on_bytes: is given the number of bytes that were read since its last call.

    Raises:
        RecordError: a record cannot be used, or has the id of another: ids name random draws.
        InputError: there is no record.
    """
    if path.exists():
        return
    with building(path) as folder:
        with ExitStack() as stack:
            on_error = None
            if bad_records == "skip":
                on_error = stack.enter_context(ErrorLog(folder / "errors.jsonl"))
            forms: Counter[tuple[str, str]] = Counter()
            rows = _rows(data, on_error, on_bytes, forms)
            fingerprint = _write(folder / "records.parquet", rows if limit is None else islice(rows, limit), data)
        meta = {"fingerprint": fingerprint, "forms": [[*form, count] for form, count in forms.items()]}
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        for file in folder.iterdir():
            sync(file)


def _write(path: Path, rows: Iterator[tuple[str, str]], data: Sequence[str]) -> str:
    digest, count = hashlib.sha256(), 0
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        while group := list(islice(rows, _GROUP)):
            for _, text in group:
                digest.update(_content(text).encode("utf-8", "surrogatepass") + b"\n")
            count += len(group)
            ids, texts = zip(*group, strict=True)
            writer.write_table(pa.table([pa.array(ids), pa.array(texts)], schema=_SCHEMA))
    if not count:
        raise InputError(f"{', '.join(data)}: no record in there")
    return f"{count}-{digest.hexdigest()}"


def _content(text: str) -> str:
    """A record without its place: the same records in another folder are the same."""
    record = json.loads(text)
    del record["file"], record["line"]
    return json.dumps(record, sort_keys=True)


def _rows(
    data: Sequence[str],
    on_error: ErrorLog | None,
    on_bytes: Callable[[int], None] | None,
    forms: Counter[tuple[str, str]],
) -> Iterator[tuple[str, str]]:
    seen: dict[int, int] = {}  # hash of an id -> line
    for record in read_records(list(data), on_error=on_error, on_bytes=on_bytes):
        try:
            digest = int.from_bytes(hashlib.blake2b(record.id.encode("utf-8", "surrogatepass"), digest_size=8).digest())
            if digest in seen:
                before = f"{record.id!r} was the id of line {seen[digest]} already"
                raise RecordError(
                    record.file, record.line, "id", f"{before}: ids name random draws, so each must occur once"
                )
            seen[digest] = record.line
            text = _as_json(record)
            forms[record.file, record.form] += 1
            yield record.id, text
        except RecordError as error:
            if on_error is None:
                raise
            on_error(error)


def _as_json(record: Record) -> str:
    fields = {name: getattr(record, name) for name in Record.__slots__ if name != "form"}
    try:
        try:
            return json_text(fields)
        except UnwritableError:
            json_text(fields.pop("extra"))  # names the column, if it is one of these
            raise
    except UnwritableError as error:
        raise RecordError(record.file, record.line, error.column, f"{error}; drop that column") from None
