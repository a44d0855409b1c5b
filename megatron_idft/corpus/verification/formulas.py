"""What stands between two answers and math-verify: plain notation as LaTeX, and pairs that it would misread."""

import re

from megatron_idft.corpus.verification.answers import MAX_ANSWER, normalised, number

_FUNCTIONS = "arccos arcsin arctan cos cosh cot csc exp ln log sin sinh tan tanh"  # `min` and `sec` are units
_GREEK = "alpha beta gamma delta epsilon theta lambda mu phi pi psi rho sigma tau omega"
_CONSTANTS = {"infinity": "infty", "inf": "infty", "oo": "infty"}
_COMMANDS = {name: name for name in f"{_FUNCTIONS} {_GREEK} infty".split()} | _CONSTANTS
_NO_WORDS = ("and", "or", "sqrt")
_NAME = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]+")
_IN_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf)|mbox|operatorname)\s*\{([^{}]*)\}")
_NOT_A_NUMBER = re.compile(r"[0-9]\}?\s*_|[0-9] [0-9]|\b[0-9]{1,4}-[0-9]{1,2}-[0-9]{1,4}\b")


def as_latex(answer: str) -> str:
    r"""The answer with function names, Greek letters and powers as LaTeX writes them: `pi/4` as `\pi/4`.

    math-verify reads LaTeX, where `pi` is p times i.
    """

    def command(name: re.Match[str]) -> str:
        known = _COMMANDS.get(name[0])
        return rf"\{known} " if known else name[0]

    answer = re.sub(r"\\?\$|(?<!\\)\\[()\[\]]", "", answer)
    return _NAME.sub(command, answer.replace("**", "^")).strip().rstrip(".")


def words(answer: str) -> list[str]:
    r"""Words and units, in lower case: what stands in `\text{…}`, and letters in a row, three or more."""
    answer = re.sub(r"\\(?:begin|end)\s*\{[a-z]*\*?\}", " ", answer)
    found = re.findall(r"[a-zA-Z]+", " ".join(_IN_TEXT.findall(answer)))
    found += [name for name in _NAME.findall(_IN_TEXT.sub(" ", answer)) if len(name) >= 3 and name not in _COMMANDS]
    return [word.lower() for word in found if word.lower() not in _NO_WORDS]


_QUANTITY = re.compile(r"(.*?[0-9.]) ?((?:square |cubic )?[a-zA-Z]{2,}(?:/[a-z]+)?)")
_NO_UNITS = ("dozen", "hundred", "thousand", "million", "billion", "trillion", "percent", "half", "or", "and", "not")


def without_unit(answer: str) -> str | None:
    """The number in "18 dollars" or "5 km/h", for a comparison with a plain number; None: not of that form."""
    found = _QUANTITY.fullmatch(normalised(answer)[:MAX_ANSWER])
    if found is None or found[2].lower() in _NO_UNITS or number(found[1]) is None:
        return None
    return found[1]


def different_words(a: str, b: str) -> bool:
    """Whether each is one word, or letter, and these differ.

    Not said of anagrams, which could be the same product of letters, and of names that mean a number.
    """
    a, b = normalised(a).lower(), normalised(b).lower()
    both = all(re.fullmatch("[a-z]+", word) and word not in _COMMANDS for word in (a, b))
    return both and sorted(a) != sorted(b)


def unreadable(a: str, b: str) -> str | None:
    r"""Why math-verify must not be asked about this pair; None where it may.

    Math-Verify 0.9 multiplies the letters of words, so that "listen" equals "silent", drops units and subscripts, so
    that 5 km equals 5 cm and 101_2 equals 101_3, reads 1 out of `1 234`, and a date as a subtraction
    (https://github.com/huggingface/Math-Verify/issues/14).
    """
    for answer in (a, b):
        if len(answer) > MAX_ANSWER:
            return f"an answer of {len(answer)} characters is a text, not a formula"
        found = _NOT_A_NUMBER.search(normalised(answer))
        if found:
            return f"{found[0]!r} can be read in more than one way"
    words_a, words_b = words(a), words(b)
    if words_a and words_b and words_a != words_b:
        return f"words are no formula: {' '.join(words_a)[:60]!r}, {' '.join(words_b)[:60]!r}"
    return None
