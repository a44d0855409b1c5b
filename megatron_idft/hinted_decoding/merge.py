"""The kept records of a realigned corpus in one file, ready to train on."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import batched
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_idft.corpus.ledger import status_of
from megatron_idft.corpus.ledger.files import sync
from megatron_idft.corpus.records import SUFFIXES
from megatron_idft.errors import InputError
from megatron_idft.hinted_decoding.results import read_outcomes

_ROWS = 512  # of a Parquet row group


def merge(folder: Path, output: Path, *, partial: bool = False) -> dict[str, int]:
    """Write the kept records of `folder` to `output`, in the order of the input; the file appears whole or not at all.

    output: a new .jsonl, .jsonl.gz, .jsonl.zst or .parquet. partial: also where chunks are missing.

    Returns how many records are kept, dropped and error. Raises InputError for an output that exists or has another
    suffix, for a folder that is not finished, and for columns that no Parquet type fits.
    """
    suffix = next((suffix for suffix in SUFFIXES if output.name.endswith(suffix)), None)
    if suffix is None:
        raise InputError(f"{output}: name a file that ends in {', '.join(SUFFIXES)}")
    if output.exists():
        raise InputError(f"{output} exists; name a new file")
    state = status_of(folder)
    if state.finished < state.num_chunks and not partial:
        raise InputError(
            f"{folder}: {state.num_chunks - state.finished} of {state.num_chunks} chunks are not finished; finish them"
            " by the same command, or pass --partial to merge those that are"
        )
    counts = Counter({"kept": 0, "dropped": 0, "error": 0})
    output.parent.mkdir(parents=True, exist_ok=True)
    building = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        if suffix == ".parquet":
            _write_parquet(building, folder, counts)
        else:
            _write_lines(building, suffix, folder, counts)
        sync(building)
        building.replace(output)
    finally:
        building.unlink(missing_ok=True)
    return dict(counts)


def _kept(folder: Path, counts: Counter[str]) -> Iterator[str]:
    for row in read_outcomes(folder, ["index", "status", "record"]):
        counts[row["status"]] += 1
        if row["status"] == "kept":
            yield row["record"]


def _write_lines(path: Path, suffix: str, folder: Path, counts: Counter[str]) -> None:
    with ExitStack() as stack:
        raw = stack.enter_context(open(path, "wb"))
        packed: IO[bytes] | Any = raw
        if suffix == ".jsonl.gz":
            packed = stack.enter_context(gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0))
        elif suffix == ".jsonl.zst":
            packed = stack.enter_context(pa.CompressedOutputStream(pa.PythonFile(raw, "w"), "zstd"))
        for record in _kept(folder, counts):
            packed.write(record.encode("utf-8", "surrogatepass") + b"\n")


def _write_parquet(path: Path, folder: Path, counts: Counter[str]) -> None:
    """Two passes: a column's type may show late, where it is empty at first."""
    schema: pa.Schema | None = None
    try:
        for batch in batched(_kept(folder, Counter()), _ROWS):
            # As structs: a table's columns would be named after the keys of its first row alone.
            found = pa.schema(pa.array([_storable(json.loads(record)) for record in batch]).type)
            schema = found if schema is None else pa.unify_schemas([schema, found], promote_options="permissive")
        if schema is None:
            raise InputError(f"{folder}: no record was kept, so there is no Parquet schema; merge to .jsonl")
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in batched(_kept(folder, counts), _ROWS):
                rows = [_storable(json.loads(record)) for record in batch]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{folder}: the records do not fit one Parquet schema ({error}); merge to .jsonl") from error


def _storable(record: dict[str, Any]) -> dict[str, Any]:
    """The record without empty objects, which Parquet cannot hold."""
    return {key: value for key, value in record.items() if value != {}}
