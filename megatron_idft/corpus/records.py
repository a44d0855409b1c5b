"""Conversation records in, as a stream: JSONL (.gz, .zst) and Parquet.

A record holds a conversation in one of the forms of formats.py, with optional `id`, `answer`, `source` and `tools`;
every other column is carried through in `extra`. messages.py says what messages may hold.
Memory stays bounded by one line, or one small batch of Parquet rows.
"""

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from megatron_idft.corpus.formats import MESSAGES, conversation, refuse_unserved
from megatron_idft.corpus.messages import MAX_DEPTH, ROLES, Message, checked_tools, kind, too_deep
from megatron_idft.errors import RAW_EXCERPT, InputError, RecordError

__all__ = ["ROLES", "ErrorLog", "Message", "OnBytes", "OnError", "Record", "RecordError", "read_records"]

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
MAX_LINE_BYTES = 64 << 20  # one line may not exhaust the memory: a file without newlines is a fault, not a record
PARQUET_BATCH_ROWS = 256
_TO_LINES = "make lines of it with jq -c '.[]' FILE (jq -c . FILE, where it is no array)"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # escaped, alone or one of a pair


@dataclass(slots=True)
class Record:
    """One conversation.

    Attributes:
        messages: dicts with at least `role` (one of `ROLES`) and `content` (str), in the form of messages.py.
        id: the record's own, else `"{file name}:{line}"`.
        file: where it came from.
        line: of the file, or row in Parquet, from 1.
        tools: the functions that the assistant may call, in the OpenAI form; `extra` has them too, as they came.
        form: the name of the one that it was written in; no part of its content.
    """

    messages: list[Message]
    id: str
    file: str
    line: int
    answer: Any = None
    source: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    form: str = field(default=MESSAGES.name, compare=False)

    @property
    def source_name(self) -> str:
        """Its source, else the name of its file."""
        return Path(self.file).name if self.source is None else self.source


OnError = Callable[[RecordError], None]
OnBytes = Callable[[int], None]


class ErrorLog:
    """An `on_error` policy: skip bad records, count them, and write one JSON line for each to `path`.

    The file holds `file`, `line`, `field`, `message` and the start of the `raw` record; it is created at the first
    error.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.count = 0
        self._file: IO[str] | None = None

    def __call__(self, error: RecordError) -> None:
        if self._file is None:
            self._file = open(self.path, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        self.count += 1
        entry = error.parts()
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_records(
    paths: str | Path | Sequence[str | Path], *, on_error: OnError | None = None, on_bytes: OnBytes | None = None
) -> Iterator[Record]:
    """Stream the records of `paths`, in order.

    Args:
        paths: of the files.
        on_error: called with each `RecordError`, after which reading goes on after the bad record (after the file,
            where the compressed stream itself is damaged). None: the error is raised.
        on_bytes: called now and then with the number of bytes read from disk since the last call; they add up to the
            files' sizes.

    Raises:
        InputError: an unknown file type, before anything is read.
        FileNotFoundError: a missing file, before anything is read.
        RecordError: a bad record, without `on_error`.
    """
    files = check_files([paths] if isinstance(paths, str | Path) else paths)
    names = Counter(file.name for file in files)

    def skip_or_raise(error: RecordError) -> None:
        if on_error is None:
            raise error
        on_error(error)

    def records() -> Iterator[Record]:
        for file in files:
            # Two files of one name would give the same ids.
            stem = file.name if names[file.name] == 1 else str(file)
            rows = _parquet_rows if file.name.endswith(".parquet") else _json_rows
            for line, row in rows(file, on_bytes or (lambda count: None)):
                if isinstance(row, RecordError):
                    skip_or_raise(row)
                    continue
                try:
                    record = to_record(row, str(file), line, f"{stem}:{line}")
                except RecordError as error:
                    error.raw = repr(row)[:RAW_EXCERPT]
                    skip_or_raise(error)
                    continue
                yield record

    return records()


def check_files(paths: Sequence[str | Path]) -> list[Path]:
    """The record files.

    Raises:
        InputError: an unknown file type.
        FileNotFoundError: a missing file.
    """
    files = [Path(path) for path in paths]
    for file in files:
        if not str(file).endswith(SUFFIXES):
            raise InputError(f"{file}: unknown record file, expected a name ending in {_ending_in(file)}")
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such record file")
    return files


def _ending_in(file: Path) -> str:
    remedy = ""
    if file.suffix == ".json":
        lines = f"jq -c '.[]' {file} > {file}l"
        remedy = f". If each line holds a record, name it {file.name}l; if it is one array: {lines}"
    return ", ".join(SUFFIXES) + remedy


_Rows = Iterator[tuple[int, Any]]  # (line, decoded row or the RecordError that stands in its place)


def _json_rows(path: Path, on_bytes: OnBytes) -> _Rows:
    with open(path, "rb") as raw:
        reported = 0
        for line, text in read_lines(path, raw):
            if line % 256 == 0:
                reported, before = raw.tell(), reported
                on_bytes(reported - before)
            if isinstance(text, RecordError):
                yield line, text
            elif text.strip():
                yield line, parse_line(text, str(path), line)
        on_bytes(path.stat().st_size - reported)


def read_lines(path: Path, raw: IO[bytes]) -> Iterator[tuple[int, bytes | RecordError]]:
    """(number from 1, bytes) of each line of an open file, decompressed; for a line too long, or a stream damaged from
    there on, the error in its place.
    """
    line = 0
    try:
        stream = _decompressed(path, raw)
        while text := stream.readline(MAX_LINE_BYTES + 1):
            line += 1
            if line == 1:
                text = text.removeprefix(b"\xef\xbb\xbf")
            if len(text) > MAX_LINE_BYTES:
                while text and not text.endswith(b"\n"):
                    text = stream.readline(MAX_LINE_BYTES)
                yield line, RecordError(str(path), line, "", f"line is longer than {MAX_LINE_BYTES >> 20} MiB")
            else:
                yield line, text
    except (OSError, EOFError, zlib.error) as error:
        message = f"damaged or truncated file, the rest of it is unreadable: {error}"
        yield line + 1, RecordError(str(path), line + 1, "", message)


def _decompressed(path: Path, raw: IO[bytes]) -> Any:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if path.name.endswith(".zst"):
        import pyarrow as pa  # noqa: PLC0415  lines are read without it

        # A small buffer: what it holds is lost where the stream turns out to be damaged.
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"), 1 << 16)
    return raw


def parse_line(text: bytes, file: str, line: int) -> Any:
    """The value of a line of JSON, or a RecordError in its place."""
    excerpt = text[: 2 * RAW_EXCERPT].decode("utf-8", errors="backslashreplace")
    try:
        row = json.loads(text.rstrip(b"\r\n").decode("utf-8"))  # else what is cut would be missed in another line
        if text.count(b"[") + text.count(b"{") > MAX_DEPTH and too_deep(row):
            raise RecursionError
        if _SURROGATE.search(text) and (field := _field_with_surrogate(row)) is not None:
            return RecordError(file, line, field, "holds a lone surrogate, which is no text", excerpt)
        return row
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: {error.reason} at byte {error.start} of the line"
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg} at column {error.colno}"
        if line == 1 and text.strip() in (b"[", b"{"):
            reason = f"not JSON by itself, but the beginning of JSON over several lines: {_TO_LINES}"
    except RecursionError:  # of json's own, or ours
        reason = f"not readable JSON: nested more than {MAX_DEPTH} levels deep"
    except ValueError as error:  # absurdly long integers
        reason = f"not readable JSON: {error}"
    return RecordError(file, line, "", reason, excerpt)


def _field_with_surrogate(value: Any, at: str = "") -> str | None:
    """The place of a text that is not Unicode; None where there is none."""
    if isinstance(value, str):
        return None if _is_unicode(value) else at
    items: Any = ()
    if isinstance(value, dict):
        items = ((f"{at}.{key}" if at else key, item) for key, item in value.items())
        if not all(map(_is_unicode, value)):
            return at
    elif isinstance(value, list):
        items = ((f"{at}[{i}]", item) for i, item in enumerate(value))
    return next((found for place, item in items if (found := _field_with_surrogate(item, place)) is not None), None)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(path: Path, on_bytes: OnBytes) -> _Rows:
    import pyarrow as pa  # noqa: PLC0415  lines are read without it
    import pyarrow.parquet as pq  # noqa: PLC0415  lines are read without it

    row, size, reported = 0, path.stat().st_size, 0
    try:
        with pq.ParquetFile(path) as table:
            total = table.metadata.num_rows
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for value in parquet_batch_rows(batch, path, row):
                    row += 1
                    yield row, value
                reported, before = size * row // max(total, 1), reported
                on_bytes(reported - before)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        message = f"damaged Parquet file, the rest of it is unreadable: {error}"
        yield row + 1, RecordError(str(path), row + 1, "", message)
    on_bytes(size - reported)


def parquet_batch_rows(batch: Any, path: Path, before: int) -> list[Any]:
    """The rows of a pyarrow RecordBatch that follows `before` rows of its file; RecordErrors for unreadable ones."""
    from megatron_idft.corpus.parquet_values import ValueFault, read_rows  # noqa: PLC0415  imports pyarrow

    return [
        RecordError(str(path), before + i, row.column, str(row)) if isinstance(row, ValueFault) else row
        for i, row in enumerate(read_rows(batch), 1)
    ]


def to_record(row: Any, file: str, line: int, default_id: str) -> Record:
    """A decoded row as a record.

    Raises:
        RecordError: naming the field.
    """

    def bad(field: str, message: str) -> RecordError:
        return RecordError(file, line, field, message)

    if not isinstance(row, dict):
        remedy = f"; {_TO_LINES}" if line == 1 and isinstance(row, list) else ""
        raise bad("", f"expected an object, found {kind(row)}{remedy}")
    from_parquet = file.endswith(".parquet")
    messages, used, form = conversation(row, bad, from_parquet=from_parquet)
    if row.get("token_ids") is None:  # else nobody renders the conversation
        refuse_unserved(row, bad, from_parquet=from_parquet)
    extra = {key: value for key, value in row.items() if key not in used}
    identity = extra.pop("id", None)
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int)):
        raise bad("id", f"expected a string or an integer, found {kind(identity)}")
    source = extra.pop("source", None)
    if source is not None and not isinstance(source, str):
        raise bad("source", f"expected a string, found {kind(source)}")
    name = default_id if identity is None or identity == "" else str(identity)
    tools = checked_tools(row.get("tools"), bad, from_parquet=from_parquet, may_be_bare=form.bare_tools)
    return Record(messages, name, file, line, extra.pop("answer", None), source, extra, tools, form.name)
