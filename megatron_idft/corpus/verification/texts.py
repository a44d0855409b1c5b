"""Answers as texts: what differences of writing are, and what can be said of options, clocks, dates and words."""

import re
import unicodedata
from collections.abc import Callable
from enum import Enum
from typing import Literal

_RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿⁱ]+")
_LOWERED = re.compile("[₀-₉₊₋]+")
_AFTER_A_DIGIT = re.compile("(?<=[0-9]) ?(?=[¼-¾⅐-⅞])")  # 3½ is three and a half, not 31/2
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\uff0d", "-"),  # minus, hyphens, figure dash, en dash
        **dict.fromkeys("\u2044\u2215", "/"),
        **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "∓": r"\mp "},
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "∪": r"\cup "},
        **{"∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "、": ",", "。": "."},
    }
)
TEXT_COMMANDS = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname\*?|boldsymbol|bm)"
_REPLACEMENTS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\{,\}", ","),
        (r"(?<=[0-9])\\[,!](?=[0-9]{3})", ","),  # 1\,000
        (r"(?<!\\)\\[()\[\]]|(?:\bUS)?\\?\$", ""),  # math delimiters, dollars
        (r"\\(?:left|right|displaystyle|textstyle|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\[,!;: ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (TEXT_COMMANDS + r"\s*\{([^{}]*)\}", r"\1"),
        (r"(?:\s*\^\s*\{?\s*\\circ(?![a-zA-Z])\s*\}?|\s*\\degree(?![a-zA-Z])|\s*°|(?<=[0-9])\s?degrees?\b)", "°"),
        (r"\\%|(?<=[0-9])\s?(?:percent|per cent|pct)\b", "%"),
        (r"\\leq(?![a-zA-Z])|\\leqslant|<=", r"\\le "),
        (r"\\geq(?![a-zA-Z])|\\geqslant|>=", r"\\ge "),
        (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
    ]
]
_WORD = re.compile(r"(?<![\\a-zA-Z])(?:[a-zA-Z]{3,}|[nN][oO])(?![a-zA-Z])")
_THOUSANDS = re.compile(r"[-+]? ?[0-9]{1,3}(?:([, '’])[0-9]{3})(?:\1[0-9]{3})*(?:\.[0-9]+)? ?%?")
_DEGREES = re.compile(r"[-+]?[0-9.,/]+°")
_OF_A_LIST = re.compile("(?<=[0-9]), (?=[0-9]{3}(?![0-9]))")  # "1, 234" are two numbers, "1,234" is one


def normalised(text: str) -> str:
    r"""The text in which differences of writing are gone.

    Gone are white space except between two letters or digits, and in "1, 234"; $ signs and math delimiters; `\left`,
    `\right`, spaces of LaTeX; `\text{…}` and its kind around their content; the degree sign after a number; emphasis,
    a colon or = in front, and a period at the end; thousands separators, where the whole text is one number; brackets
    around a single letter, as in "(C)". `\dfrac` is `\frac`, `\frac12` is `\frac{1}{2}`, `\%` and "percent" are `%`.
    Digits, signs and brackets of other scripts are ASCII, `²` is `^{2}`. Words of three letters or more, and "no", are
    in lower case: "x" and "X" differ, "Yes" and "yes" do not.
    """
    text = in_plain_characters(text).strip().strip("*_` ").rstrip(".,;: \n\t").strip("*_` ").lstrip("=: ")
    text = re.sub(r"\s+", " ", text)
    if _THOUSANDS.fullmatch(text):
        text = re.sub("(?<=[0-9])[, '’](?=[0-9])", "", text)
    text = _OF_A_LIST.sub(",\0", text)
    text = re.sub(r"(?<![a-zA-Z0-9]) | (?![a-zA-Z0-9])", "", text).replace("\0", " ")
    text = _WORD.sub(lambda word: word[0].lower(), text)
    text = text.removesuffix("°") if _DEGREES.fullmatch(text) else text
    letter = re.fullmatch(r"\(([a-zA-Z])\)", text)
    return letter[1] if letter else text


def in_plain_characters(text: str) -> str:
    """The first steps of `normalised`: characters and LaTeX's markup; words, spaces and emphasis stay."""
    text = re.sub(r"\s+", " ", _ascii(text))  # first: the patterns below take time with the square of a run of spaces
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return text


def _ascii(text: str) -> str:
    if text.isascii():
        return text
    text = _AFTER_A_DIGIT.sub(" ", text)
    text = _RAISED.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = _LOWERED.sub(lambda found: f"_{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)


def same_text(a: str, b: str) -> bool:
    """Whether both are the same once `normalised`; nothing is the same as an empty text."""
    a, b = normalised(a), normalised(b)
    return bool(a) and a == b


class _Applies(Enum):
    NOT = "not applicable"


NOT_APPLICABLE = _Applies.NOT
# Of normalised texts. True, False: the same or not; None: undecided; NOT_APPLICABLE: not its kind.
Same = bool | None | Literal[_Applies.NOT]

_NAMED = re.compile(
    r"([a-zA-Z](?:_(?:\{[a-zA-Z0-9]+\}|[a-zA-Z0-9]))?(?:\([a-zA-Z]\))?|[a-z]{3,20})=(?!=)(.+)", re.DOTALL
)


def without_name(text: str) -> tuple[str | None, str]:
    """Name and value of `x=5` or `f(x)=2x`; (None, text) of everything else, such as `x=1,y=2`."""
    found = _NAMED.fullmatch(text)
    return (found[1], found[2]) if found and "=" not in found[2] else (None, text)


_OPTION = re.compile(
    r"(?P<said>(?:option|choice|answer) ?)?(?:[(\[]?(?P<option>[A-J])[)\].:](?!\()(?P<rest>.*)|(?P<letter>[A-J]))",
    re.DOTALL,
)


def same_option(a: str, b: str) -> Same:
    """Options of a multiple choice by their letters: "B" and "(B) 3"; at least one must look like an option."""
    first, second = _OPTION.fullmatch(a), _OPTION.fullmatch(b)
    if not first or not second or not any(found["said"] or found["option"] for found in (first, second)):
        return NOT_APPLICABLE
    if (first["option"] or first["letter"]) != (second["option"] or second["letter"]):
        return False
    return True if not first["rest"] or not second["rest"] or first["rest"] == second["rest"] else None


_POLAR = re.compile(r"(yes|no|true|false)(?:[,.;:!-](.*))?", re.DOTALL)
_HEDGES = re.compile(r"\b(?:not|but|however|although|except|unless|no|yes|true|false|partly|n't)\b|n't\b")


def same_polarity(a: str, b: str) -> Same:
    """Yes and no, true and false, alone or at the start of a sentence."""
    first, second = _POLAR.fullmatch(a), _POLAR.fullmatch(b)
    if not first or not second:
        return NOT_APPLICABLE
    if any(found[2] and _HEDGES.search(found[2]) for found in (first, second)):
        return None
    if first[1] == second[1]:
        return True if not first[2] or not second[2] else None
    return False if {first[1], second[1]} in ({"yes", "no"}, {"true", "false"}) else None


_CLOCK = re.compile(r"([0-9]{1,2})(?::([0-9]{2}))?(?::([0-9]{2}))? ?(?:([apAP])\.?[mM]\.?)?")
_SEQUENCE = re.compile(r"[0-9]+([-:/])[0-9]+((?:\1[0-9]+)*)")


def same_clock(a: str, b: str) -> Same:
    """Times of the day; what could be a ratio as well is told apart only where both readings agree."""
    first, second = _CLOCK.fullmatch(a), _CLOCK.fullmatch(b)
    if not first or not second or not all(found[2] or found[4] for found in (first, second)):
        return NOT_APPLICABLE
    (time_a, half_a), (time_b, half_b) = _time(first), _time(second)
    if (half_a is None) == (half_b is None):
        if time_a == time_b:
            return True
        return None if half_a is None and time_a[0] * time_b[1] == time_b[0] * time_a[1] else False
    return None if time_a[0] % 12 == time_b[0] % 12 and time_a[1:] == time_b[1:] else False


def _time(found: re.Match[str]) -> tuple[tuple[int, int, int], str | None]:
    hour, minute, second = (int(found[group] or 0) for group in (1, 2, 3))
    half = found[4].lower() if found[4] else None
    if half is not None:
        return (hour % 12 + 12 * (half == "p"), minute, second), half
    return (hour, minute, second), "24" if hour > 12 else None


def same_sequence(a: str, b: str) -> Same:
    """Ratios, dates and ranges of whole numbers: 3:4, 2023-01-31, 5-8. Proportional ratios stay undecided."""
    first, second = _SEQUENCE.fullmatch(a), _SEQUENCE.fullmatch(b)
    if not any(found and found[1] + found[2] != "/" for found in (first, second)):
        return NOT_APPLICABLE
    if not first or not second or first[1] != second[1] or max(len(a), len(b)) > 100:
        return None
    parts = [[int(part) for part in text.split(first[1])] for text in (a, b)]
    if parts[0] == parts[1]:
        return True
    if sorted(parts[0]) == sorted(parts[1]) or len(parts[0]) != len(parts[1]):
        return None
    ratios = {x * parts[1][0] == y * parts[0][0] for x, y in zip(*parts, strict=True)}
    if first[1] == ":" and ratios == {True}:
        return None
    return (
        None
        if first[1] == "-" and len(parts[0]) == 2 and parts[0][0] - parts[0][1] == parts[1][0] - parts[1][1]
        else False
    )


_DECIMAL = re.compile(r"[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?")
_PLURAL = re.compile(r"(?<=[a-z]{3})s(?![a-z])")


def same_numbers_in_words(a: str, b: str) -> Same:
    """Texts of the same words around other numbers, such as "5 ft 4 in" and "3 apples and 5 pears"."""
    if max(len(a), len(b)) > 500:
        return NOT_APPLICABLE
    frames = [_PLURAL.sub("", _DECIMAL.sub("#", text)) for text in (a, b)]
    if frames[0] != frames[1] or "#" not in frames[0] or re.search(r"[-+*/^_=<>\\|]", frames[0]):
        return NOT_APPLICABLE
    if not re.search(r"[^\W\d_]{2,}|[^\x00-\x7f]", frames[0]):
        return NOT_APPLICABLE
    numbers = [[_trimmed(found) for found in _DECIMAL.findall(text)] for text in (a, b)]
    if numbers[0] == numbers[1]:
        return True
    return None if sorted(numbers[0]) == sorted(numbers[1]) else False


def _trimmed(decimal: str) -> str:
    whole, _, rest = decimal.replace(",", "").partition(".")
    return f"{whole.lstrip('0') or '0'}.{rest.rstrip('0')}"


def same_word(a: str, b: str) -> Same:
    """Two different words are different; not said of anagrams, abbreviations and forms of one word."""
    a, b = a.lower(), b.lower()
    if not all(re.fullmatch("[a-z]+", word) for word in (a, b)):
        return NOT_APPLICABLE
    if sorted(a) == sorted(b) or a[:4] == b[:4] or (min(len(a), len(b)) > 1 and (a.startswith(b) or b.startswith(a))):
        return None
    return False if len(a) == len(b) == 1 or (len(a) > 2 and len(b) > 2) or {a, b} & {"no"} else None


COMPARISONS: tuple[Callable[[str, str], Same], ...] = (
    same_clock,
    same_sequence,
    same_option,
    same_polarity,
    same_numbers_in_words,
)
