"""Selecting records by an expression over their columns: `phi_mean > -0.3 and source in ("a", "b")`.

The expression has Python's syntax and its precedence, but is never run as Python: its tree is walked node by node, and
what is not listed here is refused.

    columns, numbers, "strings", True, False, None, parentheses
    + - * /  unary + -           of numbers
    < <= > >=                    of two numbers or two strings; chains such as 0 < a <= 1
    == !=                        of anything
    in, not in                   a tuple or list of constants
    is None, is not None
    and, or, not                 of conditions, evaluated from left to right only as far as needed

A missing value (None, or no such key in a record) makes arithmetic missing, and every comparison with it False, except
`==`, `!=`, `is`, and `in` a list that names None. As a condition it counts as False. So `not x > 1` holds where x is
missing and `x <= 1` does not. NaN compares as in Python.

Errors are SelectionErrors. `compile_selection` reports those that the expression shows, with the position; a
record that does not fit (text where a number is needed, division by zero) stops the selection and is named: a rule that
means nothing for a record neither keeps nor drops it silently. Guard such terms: `n != 0 and total / n > 2`.
"""

import ast
import difflib
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from megatron_idft.errors import SelectionError

MAX_LENGTH = 4000  # characters
MAX_DEPTH = 50  # of nested operations

Row = Mapping[str, Any]
_Value = Callable[[Row], Any]

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_BOOLEAN, _NUMBER, _TEXT, _MISSING, _ANY = "a condition", "a number", "text", "None", "a column"  # kinds of operands


class Selection:
    """A compiled expression: `selection(record)` is True or False.

    Attributes:
        columns: the names that it uses, sorted.
    """

    def __init__(self, expression: str, columns: Collection[str]):
        compiler = _Compiler(expression, columns)
        self.expression = compiler.text
        self._test = compiler.compile()
        self.columns = sorted(compiler.used)

    def __call__(self, record: Row) -> bool:
        try:
            return self._test(record)
        except _RecordFault as fault:
            name = record.get("id")
            which = "a record" if name is None else f"record {_describe(name)}"
            raise SelectionError(_at(self.expression, fault.node, f"{which}: {fault}")) from None

    def __repr__(self) -> str:
        return f"Selection({self.expression!r})"


def compile_selection(expression: str, columns: Collection[str]) -> Selection:
    """Compile an expression over the `columns` of the records into a test of one record.

    The test takes a mapping from column to value (Python's own types, as JSON and `to_pylist` of Parquet give) and
    raises SelectionError for a record that the expression cannot be applied to.

    Raises:
        SelectionError: with the position: syntax that the module's description does not list, unknown columns, operands
            that can never fit, more than MAX_LENGTH characters or MAX_DEPTH nested operations.
    """
    return Selection(expression, columns)


class _RecordFault(Exception):
    def __init__(self, node: ast.expr, message: str):
        self.node = node
        super().__init__(message)


class _Compiler:
    """Turns each node into a function of the record; beside it goes the kind of its value, as far as it is known."""

    def __init__(self, expression: str, columns: Collection[str]):
        self.text = expression.strip()
        self.used: set[str] = set()
        self._columns = frozenset(columns)

    def compile(self) -> Callable[[Row], bool]:
        if not self.text:
            raise SelectionError("empty selection; write a condition such as 'phi_mean > -0.3'")
        if len(self.text) > MAX_LENGTH:
            raise SelectionError(f"selection of {len(self.text):,} characters; at most {MAX_LENGTH:,} are allowed")
        try:
            tree = ast.parse(self.text, mode="eval")  # parses, and runs nothing
        except SyntaxError as error:
            line, column = min(error.lineno or 1, len(_lines(self.text))), max((error.offset or 1) - 1, 0)
            single = _lines(self.text)[line - 1][column : column + 1] == "="
            message = "equality is written ==" if single else f"not an expression: {error.msg}"
            raise SelectionError(_marked(self.text, line, column, message)) from None
        except (ValueError, MemoryError, RecursionError) as error:
            raise SelectionError(f"selection that cannot be parsed: {error or 'nested too deeply'}") from None
        return self._condition(tree.body, 1)

    def _refuse(self, node: ast.expr, message: str) -> SelectionError:
        return SelectionError(_at(self.text, node, message))

    def _condition(self, node: ast.expr, depth: int) -> Callable[[Row], bool]:
        value, kind = self._visit(node, depth)
        if kind not in (_BOOLEAN, _ANY):
            raise self._refuse(node, f"{kind} is no condition; compare it with something")
        if kind == _BOOLEAN:
            return value

        def test(row: Row) -> bool:
            result = value(row)
            if result is None or isinstance(result, bool):
                return bool(result)
            raise _RecordFault(node, f"{_describe(result)} is no condition; compare it with something")

        return test

    def _visit(self, node: ast.expr, depth: int) -> tuple[_Value, str]:
        if depth > MAX_DEPTH:
            raise self._refuse(node, f"more than {MAX_DEPTH} nested operations")
        match node:
            case ast.Constant():
                constant = self._constant(node)
                return (lambda row: constant), _kind(constant)
            case ast.Name():
                return self._column(node), _ANY
            case ast.BoolOp():
                return self._bool_op(node, depth), _BOOLEAN
            case ast.UnaryOp(op=ast.Not()):
                test = self._condition(node.operand, depth + 1)
                return (lambda row: not test(row)), _BOOLEAN
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
                sign = operator.neg if isinstance(node.op, ast.USub) else operator.pos
                number = self._number(node.operand, depth + 1)
                return (lambda row: None if (value := number(row)) is None else sign(value)), _NUMBER
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                return self._arithmetic(node, depth), _NUMBER
            case ast.Compare():
                return self._comparison(node, depth), _BOOLEAN
        raise self._refuse(node, f"{_source(self.text, node)} is not allowed; {_ALLOWED}")

    def _constant(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return node.value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if _is_number(value):
                return -value  # type: ignore[operator]
        raise self._refuse(node, f"{_source(self.text, node)} is no number, string, True, False or None")

    def _column(self, node: ast.Name) -> _Value:
        name = node.id
        if name not in self._columns:
            near = difflib.get_close_matches(name, self._columns, n=1, cutoff=0.5)
            meant = f"; did you mean {near[0]!r}?" if near else ";"
            known = ", ".join(sorted(self._columns)) or "none"
            raise self._refuse(node, f"no column {name!r}{meant} the columns are {known}")
        self.used.add(name)
        return lambda row: row.get(name)

    def _bool_op(self, node: ast.BoolOp, depth: int) -> Callable[[Row], bool]:
        tests = [self._condition(value, depth + 1) for value in node.values]
        if isinstance(node.op, ast.And):
            return lambda row: all(test(row) for test in tests)
        return lambda row: any(test(row) for test in tests)

    def _number(self, node: ast.expr, depth: int) -> _Value:
        value, kind = self._visit(node, depth)
        if kind not in (_NUMBER, _ANY):
            raise self._refuse(node, f"arithmetic needs numbers, not {kind}")
        if kind == _NUMBER:
            return value

        def number(row: Row) -> Any:
            result = value(row)
            if result is None or _is_number(result):
                return result
            raise _RecordFault(node, f"arithmetic needs numbers, not {_describe(result)}")

        return number

    def _arithmetic(self, node: ast.BinOp, depth: int) -> _Value:
        left, right = self._number(node.left, depth + 1), self._number(node.right, depth + 1)
        operation = _ARITHMETIC[type(node.op)]

        def compute(row: Row) -> Any:
            a, b = left(row), right(row)
            if a is None or b is None:
                return None
            try:
                return operation(a, b)
            except ZeroDivisionError:
                raise _RecordFault(node, f"division by zero in {_source(self.text, node)}") from None
            except OverflowError:  # an integer that no float can hold
                raise _RecordFault(node, f"too large a number in {_source(self.text, node)}") from None

        return compute

    def _comparison(self, node: ast.Compare, depth: int) -> Callable[[Row], bool]:
        first, left = self._operand(node.left, depth)
        links: list[tuple[_Value, Callable[[Any, Any], bool]]] = []
        for op, operand in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                if operand is not node.comparators[-1]:
                    raise self._refuse(operand, "a chain cannot go on after a tuple or list; write 'and'")
                links.append((lambda row: None, self._membership(op, operand)))
            else:
                value, right = self._operand(operand, depth)
                links.append((value, self._relation(op, operand, left, right)))
                left = right

        def test(row: Row) -> bool:
            a = first(row)
            for value, relation in links:
                b = value(row)
                if not relation(a, b):
                    return False
                a = b
            return True

        return test

    def _operand(self, node: ast.expr, depth: int) -> tuple[_Value, str]:
        if isinstance(node, ast.Tuple | ast.List):
            raise self._refuse(node, "a tuple or list can only stand after 'in' or 'not in'")
        return self._visit(node, depth + 1)

    def _membership(self, op: ast.cmpop, node: ast.expr) -> Callable[[Any, Any], bool]:
        if not isinstance(node, ast.Tuple | ast.List):
            hint = f"({_source(self.text, node)},)" if isinstance(node, ast.Constant) else '("a", "b")'
            raise self._refuse(node, f"'in' needs a tuple or list of constants, such as {hint}")
        constants = tuple(self._constant(element) for element in node.elts)
        wanted, names_none = isinstance(op, ast.In), None in constants
        return lambda a, _: (a is not None or names_none) and (a in constants) == wanted

    def _relation(self, op: ast.cmpop, node: ast.expr, left: str, right: str) -> Callable[[Any, Any], bool]:
        """node: the right operand. left, right: the operands' kinds."""
        match op:
            case ast.Eq():
                return lambda a, b: a == b
            case ast.NotEq():
                return lambda a, b: a != b
            case ast.Is() | ast.IsNot():
                if _MISSING not in (left, right):
                    raise self._refuse(node, "'is' is only for None; write == or !=")
                wanted = isinstance(op, ast.Is)
                return lambda a, b: (a is b) == wanted
        order = _ORDER[type(op)]
        if {left, right} & {_BOOLEAN, _MISSING} or {left, right} == {_NUMBER, _TEXT}:
            raise self._refuse(node, f"{left} and {right} have no order; only two numbers or two strings do")

        def ordered(a: Any, b: Any) -> bool:
            if a is None or b is None:
                return False
            if (_is_number(a) and _is_number(b)) or (isinstance(a, str) and isinstance(b, str)):
                return order(a, b)
            raise _RecordFault(node, f"{_describe(a)} and {_describe(b)} have no order")

        return ordered


_ALLOWED = "a selection is made of columns, constants, + - * /, comparisons, in, is None, and, or, not"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    if value is None:
        return _MISSING
    return {bool: _BOOLEAN, str: _TEXT}.get(type(value), _NUMBER)


def _describe(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:60] + "…"


def _source(text: str, node: ast.expr) -> str:
    source = ast.get_source_segment(text, node) or type(node).__name__
    return source if len(source) <= 60 else source[:60] + "…"


def _lines(text: str) -> list[str]:
    return re.split(r"\r\n|\r|\n", text)  # as the parser counts them


def _at(text: str, node: ast.expr, message: str) -> str:
    before = _lines(text)[node.lineno - 1].encode()[: node.col_offset]  # the tree counts bytes
    return _marked(text, node.lineno, len(before.decode()), message)


def _marked(text: str, line: int, column: int, message: str) -> str:
    """The line of the expression, a caret under the column, which counts from 0, and last the message."""
    start = max(column - 60, 0)
    excerpt = _lines(text)[line - 1][start : column + 60]
    where = f"line {line}, column {column + 1}" if line > 1 else f"column {column + 1}"
    return f"this selection cannot be used:\n  {excerpt}\n  {' ' * (column - start)}^\nselection, {where}: {message}"
