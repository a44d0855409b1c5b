"""Rows of Parquet as Python's values, also where Arrow's own conversion gives up: nanoseconds, dates beyond Python's.

What Python's types cannot hold becomes ISO text, so that no part of a value is lost.
"""

from typing import Any

import pyarrow as pa

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


class ValueFault(Exception):
    """A value that cannot be read.

    Args:
        column: of the row.
    """

    def __init__(self, column: str, reason: str):
        super().__init__(reason)
        self.column = column


def read_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | ValueFault]:
    """The rows of a batch; for those that cannot be read, what is wrong with them."""
    try:
        rows: list[dict[str, Any] | ValueFault] = batch.to_pylist()
        return rows
    except (ValueError, OverflowError, LookupError):  # LookupError: a time zone that is not known here
        return [_row(batch, i) for i in range(batch.num_rows)]


def _row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | ValueFault:
    row = {}
    try:
        names = batch.schema.names
    except UnicodeDecodeError as error:
        return ValueFault("", f"a column's name is not UTF-8: {error.reason}")
    for name, column in zip(names, batch.columns, strict=True):
        try:
            row[name] = _value(column[index])
        except UnicodeDecodeError as error:
            return ValueFault(name, f"not UTF-8: {error.reason}")
        except (ValueError, OverflowError, LookupError, pa.ArrowException) as error:
            return ValueFault(name, f"a value of the type {column.type} that cannot be read: {error}")
    return row


def _value(scalar: Any) -> Any:
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StructScalar):
        return {name: _value(item) for name, item in scalar.items()}
    if isinstance(scalar, pa.MapScalar):
        return [tuple(_value(part) for part in (item["key"], item["value"])) for item in scalar.values]
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return [_value(item) for item in scalar.values]
    if isinstance(scalar, pa.ExtensionScalar | pa.DictionaryScalar):
        return _value(scalar.value)
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError, LookupError):
        return _iso(scalar)


def _iso(scalar: Any) -> str:
    kind = scalar.type
    if pa.types.is_duration(kind):
        return iso_duration(scalar.value, _PER_SECOND[kind.unit])
    zone = ""
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        scalar, zone = scalar.cast(pa.timestamp(kind.unit)), "+00:00"  # the instant, whatever the zone
    text = scalar.cast(pa.string()).as_py()
    if text.startswith("<"):  # Arrow's "<value out of range: …>"
        raise OverflowError(text.strip("<>"))
    return str(text.replace(" ", "T") + zone)


def iso_duration(ticks: int, per_second: int) -> str:
    """ISO 8601, in seconds."""
    seconds, rest = divmod(abs(ticks), per_second)
    digits = f".{rest:0{len(str(per_second)) - 1}d}".rstrip("0") if rest else ""
    return f"{'-' if ticks < 0 else ''}PT{seconds}{digits}S"
