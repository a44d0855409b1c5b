"""The types that mypy knows of scored rows, against the columns of the files that hold them."""

from types import NoneType
from typing import get_args, get_type_hints

import pyarrow as pa
import pytest

from megatron_idft.corpus.scores.rows import RECORD_SCHEMA, TOP_SCHEMA, ScoredRow, TokenStatistics, WorstToken

_PYTHON = {pa.types.is_string: str, pa.types.is_boolean: bool, pa.types.is_integer: int, pa.types.is_floating: float}


def python_type(column):
    return next((python for test, python in _PYTHON.items() if test(column)), None)


@pytest.mark.parametrize(
    ("row", "columns"), [(ScoredRow, TOP_SCHEMA), (WorstToken, RECORD_SCHEMA.field("worst_tokens").type.value_type)]
)
def test_a_row_has_the_columns_of_its_file(row, columns):
    types = get_type_hints(row)
    assert set(types) == {field.name for field in columns}
    for field in columns:
        if not pa.types.is_list(field.type):
            assert set(get_args(types[field.name]) or [types[field.name]]) - {NoneType} == {python_type(field.type)}


def test_lists_per_token_are_what_score_may_leave_out():
    assert ScoredRow.__optional_keys__ == set(get_type_hints(TokenStatistics))
    assert ScoredRow.__optional_keys__ == set(TOP_SCHEMA.names) - set(RECORD_SCHEMA.names)
