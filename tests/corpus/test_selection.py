"""Selections against plain Python, and what is said about expressions and records that do not work."""

import operator
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idft.corpus.scores.selection import MAX_DEPTH, MAX_LENGTH, compile_selection
from megatron_idft.errors import SelectionError, UserError

COLUMNS = ["id", "phi_mean", "num_tokens", "source", "truncated"]
NUMBERS, TEXTS = ["x", "y"], ["s", "t"]
ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
EQUALITY = {"==": operator.eq, "!=": operator.ne}
ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul}

numbers = st.integers(-4, 4) | st.floats(-4, 4).map(lambda value: round(value, 1)) | st.just(float("nan"))
texts = st.sampled_from(["", "a", "b", "é", "'\""])


def holds(expression, **record):
    return compile_selection(expression, COLUMNS)(record)


def refusal(expression, columns=COLUMNS):
    with pytest.raises(SelectionError) as caught:
        compile_selection(expression, columns)
    return str(caught.value)


def test_the_readme_example():
    test = compile_selection('phi_mean > -0.3 and num_tokens < 2000 and source in ("a", "b")', COLUMNS)
    good = {"phi_mean": -0.2, "num_tokens": 10, "source": "b"}
    assert test(good) is True and test.columns == ["num_tokens", "phi_mean", "source"]
    assert not test(good | {"phi_mean": -0.3}) and not test(good | {"num_tokens": 2000})
    assert not test(good | {"source": "c"}) and not test(good | {"source": None}) and not test({})


# Against Python's own eval, on complete records and conditions that Python and a selection read alike.
python_number = st.recursive(
    st.sampled_from(NUMBERS) | st.integers(-3, 9).map(str) | st.just("0.5"),
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*"), inner).map(" ".join)
        | inner.map("({})".format)
        | inner.map("-{}".format)
        | inner.map("{} / 4".format)
    ),
    max_leaves=6,
)
python_text = st.sampled_from([*TEXTS, '"a"', "'é'"])
python_order = st.sampled_from([*ORDER, *EQUALITY])
python_condition = st.recursive(
    st.lists(python_number, min_size=2, max_size=4).flatmap(
        lambda operands: st.lists(python_order, min_size=len(operands) - 1, max_size=len(operands) - 1).map(
            lambda operators: " ".join(sum(zip(operands, operators, strict=False), ())) + f" {operands[-1]}"
        )
    )
    | st.tuples(python_text, python_order, python_text).map(" ".join)
    | st.tuples(python_text, st.sampled_from(["in ('a', 'é')", "not in ['b',]", "in ()", "is None"])).map(" ".join)
    | st.tuples(python_number, st.sampled_from(["in (1, -2)", "not in [0.5, None]", "is not None"])).map(" ".join)
    | st.sampled_from(["b", "True", "False", "b == True"]),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(" ".join)
        | inner.map("not {}".format)
        | inner.map("({})".format)
    ),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore:.*with '.*' literal:SyntaxWarning")  # Python's own opinion on `"a" is None`
@settings(max_examples=300, deadline=None)
@given(python_condition, numbers, numbers, texts, texts, st.booleans())
def test_complete_records_select_as_python_would(expression, x, y, s, t, b):
    record = {"x": x, "y": y, "s": s, "t": t, "b": b}
    test = compile_selection(expression, [*NUMBERS, *TEXTS, "b"])
    assert test(record) is bool(eval(expression, {"__builtins__": {}}, record))


# With missing values Python would raise, so the rule is written down a second time: each tree carries its own meaning.
def arithmetic(left, symbol, right):
    def value(record):
        a, b = left[1](record), right[1](record)
        return None if a is None or b is None else ARITHMETIC[symbol](a, b)

    return f"({left[0]} {symbol} {right[0]})", value


def compared(left, symbol, right):
    def value(record):
        a, b = left[1](record), right[1](record)
        if symbol in EQUALITY:
            return EQUALITY[symbol](a, b)
        return a is not None and b is not None and ORDER[symbol](a, b)

    return f"{left[0]} {symbol} {right[0]}", value


def member(operand, words, constants):
    def value(record):
        a = operand[1](record)
        if a is None and None not in constants:
            return False
        return (a in constants) == (words == "in")

    return f"{operand[0]} {words} {constants!r}", value


def joined(word, tests):
    how = all if word == "and" else any
    return f"({f' {word} '.join(text for text, _ in tests)})", lambda record: how(test(record) for _, test in tests)


number = st.recursive(
    st.sampled_from([(name, operator.methodcaller("get", name)) for name in NUMBERS])
    | st.integers(0, 4).map(lambda value: (str(value), lambda record: value)),
    lambda inner: st.builds(arithmetic, inner, st.sampled_from("+-*"), inner),
    max_leaves=4,
)
condition = st.recursive(
    st.builds(compared, number, st.sampled_from([*ORDER, *EQUALITY]), number)
    | st.builds(member, number, st.sampled_from(["in", "not in"]), st.sampled_from([(1, 2), (None, 0), ()]))
    | number.map(lambda n: (f"{n[0]} is None", lambda record: n[1](record) is None))
    | st.just(("b", lambda record: bool(record.get("b")))),
    lambda inner: (
        st.builds(joined, st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=3))
        | inner.map(lambda test: (f"(not {test[0]})", lambda record: not test[1](record)))
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(condition, st.fixed_dictionaries({}, optional={"x": numbers | st.none(), "y": numbers, "b": st.booleans()}))
def test_missing_values_follow_the_documented_rule(tree, record):
    text, oracle = tree
    assert compile_selection(text, [*NUMBERS, "b"])(record) is oracle(record)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("phi_mean < 1", False),
        ("phi_mean >= 1", False),
        ("not phi_mean < 1", True),
        ("phi_mean == None", True),
        ("phi_mean != 1", True),
        ("phi_mean is None", True),
        ("phi_mean + 1 is None", True),
        ("-phi_mean < 1", False),
        ("phi_mean / 0 < 1", False),  # missing, before it is a division
        ("0 < phi_mean < 1", False),
        ('source in ("a",)', False),
        ('source not in ("a",)', False),
        ('source in ("a", None)', True),
        ('source not in ["a", None]', False),
        ("truncated", False),
        ("not truncated", True),
    ],
)
def test_missing_values_by_hand(expression, expected):
    assert holds(expression) is expected and holds(expression, phi_mean=None, source=None) is expected


def test_conditions_stop_where_the_answer_is_known():
    guard = "num_tokens != 0 and phi_mean / num_tokens > 1"
    assert holds(guard, num_tokens=0, phi_mean=1.0) is False
    assert holds("num_tokens == 0 or phi_mean / num_tokens > 1", num_tokens=0, phi_mean=1.0) is True
    assert holds("0 < num_tokens < phi_mean / num_tokens", num_tokens=0, phi_mean=1.0) is False


@pytest.mark.parametrize(
    ("expression", "record", "message"),
    [
        ("phi_mean / num_tokens > 1", {"phi_mean": 1.0, "num_tokens": 0}, "division by zero in phi_mean / num_tokens"),
        ("num_tokens / 2 > 1", {"num_tokens": 10**400}, "too large a number in num_tokens / 2"),
        ("source < 3", {"source": "x"}, "'x' and 3 have no order"),
        ("phi_mean < num_tokens", {"phi_mean": True, "num_tokens": 3}, "True and 3 have no order"),
        ("phi_mean + source > 1", {"phi_mean": 1.0, "source": "x" * 999}, "arithmetic needs numbers, not 'xxx"),
        ("source * 9 == 1", {"source": [0]}, "arithmetic needs numbers, not [0]"),
        ("phi_mean", {"phi_mean": 0.5}, "0.5 is no condition"),
        ("truncated or phi_mean > 1", {"truncated": 1}, "1 is no condition"),
        ("num_tokens * num_tokens < source", {"num_tokens": 10**3000, "source": ""}, "a huge int and '' have no order"),
    ],
)
def test_a_record_that_does_not_fit_is_named(expression, record, message):
    with pytest.raises(SelectionError, match="record 'r7': " + re.escape(message)) as caught:
        holds(expression, id="r7", **record)
    assert len(str(caught.value)) < 400
    with pytest.raises(SelectionError, match=r"column \d+: a record: "):
        holds(expression, **record)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "(lambda: 1)() > 0",
        "source.__class__ == 1",
        "source[0] == 'a'",
        "[x for x in (1, 2)] == 1",
        "(x := 1) > 0",
        "1 if truncated else 2",
        "f'{source}' == 'a'",
        "b'a' == source",
        "1j == phi_mean",
        "... == phi_mean",
        "{1: 2} == phi_mean",
        "source in {'a'}",
        "phi_mean ** 9 > 1",
        "phi_mean // 2 > 1",
        "phi_mean % 2 > 1",
        "num_tokens << 99 > 1",
        "num_tokens & 1 == 1",
        "~num_tokens == 1",
        "source == ('a', 'b')",
        "source in ('a', source)",
        "source in 'abc'",
        "source in ('a')",
        "source in (('a',),)",
        "'a' in source",
        "phi_mean is 1",
        "phi_mean is num_tokens",
        "1 < phi_mean in (1, 2) < 3",
        "'ab' * 99 == source",
        "'a' + 'b' == source",
        "-'a' == source",
        "True + 1 > phi_mean",
        "phi_mean < 'a' < 3",
        "(phi_mean > 1) < 2",
        "phi_mean > None",
        "phi_mean > True",
        "1",
        "'a'",
        "None",
        "phi_mean + 1",
        "not -phi_mean",
        "phi_mean and 'a'",
        "*source",
        "yield",
        "await source",
        "import os",
        "phi_mean > 1; 1",
        "phi_mean > 1\nand truncated",
        "phi_mean = 1",
        "phi_mean >",
        "'unclosed",
        "",
        "  \n",
        "\0",
        "\ud800",
        "phi_mean > 1" + " " * MAX_LENGTH + "or truncated",
        "(" * 150 + "phi_mean" + ")" * 151,
        "(" * 1990 + "1" + ")" * 1990,
        "-" * (MAX_LENGTH - 1) + "1",
        "not " * (MAX_DEPTH + 1) + "truncated",
        "+".join(["phi_mean"] * (MAX_DEPTH + 1)) + " > 1",
        "[" * 1000,
    ],
)
def test_everything_else_is_refused_before_any_record(expression):
    message = refusal(expression)
    assert "selection" in message and len(message) < 600


def test_limits_are_limits():
    assert holds("not " * (MAX_DEPTH - 2) + "truncated", truncated=True) is True
    sources = ", ".join(f'"source {i}"' for i in range(250))
    assert holds(f"source in ({sources})", source="source 249")
    assert holds(" and ".join(["phi_mean > 1"] * 200), phi_mean=2)
    assert holds("phi_mean > 1 and (\n  truncated  # a note\n  or source == 'a'\n)", phi_mean=2, truncated=True)


@pytest.mark.parametrize(
    ("expression", "place", "marked"),
    [
        ("phi_mean > 1 and phi_maen < 2", "column 18", "phi_maen"),
        ("source == 'é' and nothing", "column 19", "nothing"),  # columns are characters, not bytes
        ("(phi_mean > 1 and\n  x == 'a')", "line 2, column 3", "x == "),
        ("phi_mean = 1", "column 10", "= 1"),
        (" " * 9 + "phi_mean is 1", "column 13", "1"),
        ("phi_mean > 1" + " and phi_mean > 1" * 50 + " and wrong == 1 and phi_mean > 1", "column 868", "wrong"),
    ],
)
def test_errors_point_at_the_place(expression, place, marked):
    message = refusal(expression)
    _, line, caret, last = message.rsplit("\n", 3)
    assert last.startswith(f"selection, {place}: ") and line[caret.index("^") :].startswith(marked)


def test_unknown_columns_are_answered_with_the_known_ones():
    message = refusal("phi_meen > 1")
    assert "no column 'phi_meen'; did you mean 'phi_mean'?" in message and "id, num_tokens, phi_mean" in message
    assert "did you mean" not in refusal("zzz > 1") and "the columns are none" in refusal("zzz > 1", [])
    assert "equality is written ==" in refusal("phi_mean = 1")
    assert "('a',)" in refusal("source in ('a')")


def test_errors_are_for_users():
    assert issubclass(SelectionError, UserError) and issubclass(SelectionError, ValueError)
