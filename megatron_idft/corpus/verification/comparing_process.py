"""A process that compares answers: it asks math-verify, or a function of the user's.

It imports neither torch nor Megatron by itself.
"""

import logging
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, NotRequired, TypedDict

from megatron_idft.processes import serve


class Reply(TypedDict):
    """The verdict on an answer.

    Attributes:
        reason: why it is unknown, or wrong without a comparison.
    """

    verdict: Literal["right", "wrong", "unknown"]
    reason: NotRequired[str]


Check = Callable[[Any, Any], Reply]


def load_plugin(spec: str) -> Check:
    """The function of the user's as a check.

    Raises:
        ValueError: `module:function` names no function.
    """
    module_name, _, attribute = spec.partition(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name!r} ({error}); put its folder on PYTHONPATH") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"module {module_name!r} ({module.__file__}) has no function {attribute!r}")

    def check(response: str, reference: Any) -> Reply:
        result = function(response, reference)
        if result is None:
            return {"verdict": "unknown", "reason": f"{spec} could not tell"}
        if not isinstance(result, bool):
            name = type(result).__name__
            return {"verdict": "unknown", "reason": f"{spec} returned {name}; it must return True, False or None"}
        return {"verdict": "right" if result else "wrong"}

    return check


def load_math_verify() -> Check:
    """math-verify without its search: every text is read whole, or not at all, and it keeps no time limits of its own.

    Its `parse` looks for something that it can read in a text, and so takes one number out of what it cannot; its
    limits are signals, and do not stop everything.
    """
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
    from math_verify import verify

    logging.disable(logging.CRITICAL)
    plain = NormalizationConfig(units=False, malformed_operators=True, nits=False, boxed="none")
    case_matters = ConversionConfig(lowercase_symbols=False)

    def read(text: str, real: bool) -> Any:
        return latex2sympy(text, is_real=real or None, normalization_config=plain, conversion_config=case_matters)

    def compare(answer: Any, reference: Any) -> Literal["right", "wrong", "unknown"]:
        """Right and wrong where math-verify, which is not symmetric, says so in both orders, and numbers agree."""
        orders = {
            bool(verify([x], [y], float_rounding=12, allow_set_relation_comp=True, timeout_seconds=None,
                        raise_on_error=True))
            for x, y in ((reference, answer), (answer, reference))
        }  # fmt: skip
        numbers = _equal_in_numbers(answer, reference)
        if len(orders) > 1 or (numbers is not None and orders != {numbers}):
            return "unknown"
        return "right" if orders == {True} else "wrong"

    def check(answers: list[str], references: list[str]) -> Reply:
        real = not any(re.search(r"(?<![a-zA-Z\\])[iI](?![a-zA-Z])", text) for text in (*answers, *references))
        found = []
        for text in (*references, *answers):
            try:
                found.append(read(text, real))
            except RecursionError:
                return {"verdict": "unknown", "reason": f"nested too deeply: {text[:60]!r}"}
            except Exception:
                return {"verdict": "unknown", "reason": f"math-verify cannot read {text[:100]!r}"}
        split = len(references)
        verdicts = {compare(answer, reference) for reference in found[:split] for answer in found[split:]}
        if len(verdicts) > 1 or verdicts == {"unknown"}:
            return {
                "verdict": "unknown",
                "reason": "what is said to be equal differs, or is the same in one order only",
            }
        return {"verdict": verdicts.pop()}

    check(["x+1"], ["1+x"])  # compiles its patterns and tables, which should not count as the time of the first answer
    return check


def _equal_in_numbers(a: Any, b: Any) -> bool | None:
    """Whether two formulas have the same values, to 20 digits at some places; None where that cannot be said."""
    from sympy import Expr, Rational

    if not isinstance(a, Expr) or not isinstance(b, Expr):
        return None
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    for place in range(3):
        values = {symbol: Rational(7 * i + 5 * place + 3, 11) for i, symbol in enumerate(symbols)}
        x, y = (_parts(formula.subs(values).evalf(30)) for formula in (a, b))
        if x is None or y is None:
            return None
        if any(abs(p - q) > 1e-12 * max(abs(p), abs(q)) for p, q in zip(x, y, strict=True)):
            return False
    return True


def _parts(value: Any) -> tuple[Any, Any] | None:
    parts = value.as_real_imag()
    return parts if all(part.is_Float or part.is_Integer or part.is_Rational for part in parts) else None


def load(plugin: str | None) -> Callable[[Any, bytes], Reply]:
    """The answer to a task, [response or answers, reference or references].

    Args:
        plugin: `module:function`; None: math-verify.
    """
    check = load_plugin(plugin) if plugin else load_math_verify()
    return lambda task, _: check(*task)


if __name__ == "__main__":
    serve(load)
