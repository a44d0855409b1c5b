"""Records as JSON text, with the values that Parquet has and JSON has not."""

import datetime
import decimal
import json
import math
import uuid
from typing import Any

from megatron_idft.corpus.parquet_values import iso_duration


class UnwritableError(Exception):
    """A field of a record that JSON cannot hold.

    Args:
        column: the field's name.
    """

    def __init__(self, column: str, reason: str):
        super().__init__(f"cannot be written as JSON: {reason}")
        self.column = column


def json_text(record: dict[str, Any]) -> str:
    """One line of strict JSON. Dates, times and durations become ISO text, decimals and UUIDs their digits, NaN null.

    Raises:
        UnwritableError: a value without JSON: bytes, infinities and others.
    """
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError):
        return json.dumps({key: _field(key, value) for key, value in record.items()}, ensure_ascii=False)


def _field(key: str, value: Any) -> Any:
    try:
        plain = _without_nan(value)
        json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UnwritableError(key, str(error)) from None
    return plain


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError("infinity")
        return None if math.isnan(value) else value
    return value if value is None or isinstance(value, str | int) else _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return iso_duration(value // datetime.timedelta(microseconds=1), 10**6)
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    raise TypeError(f"a value of the type {type(value).__name__}")
