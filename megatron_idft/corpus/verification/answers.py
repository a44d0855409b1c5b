"""Final answers of responses, and the two comparisons that need no computer algebra: as texts and as exact numbers."""

import re
from fractions import Fraction

MAX_ANSWER = 500  # characters after "the answer is": what is longer is no final answer
MAX_NUMBER = 400  # characters of a number, and
MAX_EXPONENT = 1000  # its power of ten: 1e999999999 may not become a billion digits

_BRACES = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?P<form>\{?)|\\.|[{}]", re.DOTALL)
_BOX_IN_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}")
_BARE_BOX = re.compile(r"[^\s$]+")
_GSM8K = re.compile(r"^[ \t]*####(.*)$", re.MULTILINE)
_ANSWER_IS = re.compile(
    r"\banswer\b[ \t*_]*(?:is\b|:|=)[ \t*_:]*(?:\n?[ \t]*(?:\$\$|\\\[)[ \t]*)?\n?([^\n]*)", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?;](?=[\s*]|$)")


def final_answer(text: str) -> str | None:
    r"""What a response gives as its final answer, as it stands there; None where it gives none.

    The last `\boxed{…}` or `\fbox{…}` (of nested ones the outermost; `\boxed 5` too). Else a GSM8K line `#### X`, if it
    is the last line or X is a number: other such lines are headings. Else the last "the answer is X", "answer: X" up to
    the end of the line or sentence. A text that ends inside its last box was cut off: it has no boxed answer.
    """
    box, cut = _last_box(text)
    if box is not None:
        return box or None
    for line in reversed(list(_GSM8K.finditer(text))):
        answer = line[1].strip()
        if answer and (not text[line.end() :].strip() or number(answer) is not None):
            return answer
    for found in reversed(list(_ANSWER_IS.finditer(text))):
        end = _SENTENCE_END.search(found[1])
        answer = (found[1][: end.start()] if end else found[1]).strip(" \t*_")
        if len(answer) <= MAX_ANSWER and normalised(answer) and not (cut and _last_box(answer)[1]):
            return answer
    return None


def _last_box(text: str) -> tuple[str | None, bool]:
    """Content of the last box, if it is closed, and whether it is one that is never closed. One pass over the text."""
    opened: list[tuple[bool, int, int]] = []  # (a box, where it starts, where its content starts)
    closed: list[tuple[int, int, int]] = []  # start, content start, content end
    for token in _BRACES.finditer(text):
        what = token[0]
        if what == "{":
            opened.append((False, token.start(), token.end()))
        elif what == "}":
            if opened:
                is_box, start, content = opened.pop()
                if is_box:
                    closed.append((start, content, token.start()))
        elif token["form"]:
            opened.append((True, token.start(), token.end()))
        elif token["form"] == "":  # `\boxed 5`
            bare = _BARE_BOX.match(text, token.end())
            if bare:
                answer = bare[0] if "{" in bare[0] else bare[0].partition("}")[0]
                end = token.end() + len(answer.rstrip(".,;:!?)"))
                closed.append((token.start(), token.end(), end))
    last_opened = max((start for is_box, start, _ in opened if is_box), default=-1)
    if not closed or last_opened > max(closed)[0]:
        return None, last_opened >= 0
    box = max(closed)
    for outer in closed:  # in the order in which they close
        if outer[0] < box[0] and outer[2] > box[2]:
            box = outer
    answer = text[box[1] : box[2]].strip()
    nested = _BOX_IN_BOX.fullmatch(answer)
    return (nested[1] if nested else answer), False


_REPLACEMENTS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        ("[\u2212\u2013]", "-"),  # minus sign, en dash
        ("[\u00a0\u2009\u202f]", " "),  # spaces that do not break
        (r"\{,\}", ","),
        (r"(?<=[0-9])\\[,!](?=[0-9]{3})", ","),  # 1\,000
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),  # math delimiters, dollars
        (r"\\(?:left|right|displaystyle|textstyle|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
        (r"\\[,!;: ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}", r"\1"),
        (r"\s*(?:\^\s*\{?\s*\\circ(?![a-zA-Z])\s*\}?|°)", ""),
        (r"\\%", "%"),
    ]
]
_WORD = re.compile(r"(?<![\\a-zA-Z])(?:[a-zA-Z]{3,}|[nN][oO])(?![a-zA-Z])")
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?%?")


def normalised(text: str) -> str:
    r"""The text in which differences of writing are gone.

    Gone are white space except between two letters or digits; $ signs and math delimiters; `\left`, `\right`, spaces
    of LaTeX; `\text{…}` and its kind around their content; degree signs; emphasis and a period at the end; thousands
    separators, where the whole text is one number; brackets around a single letter, as in "(C)". `\dfrac` is `\frac`,
    `\frac12` is `\frac{1}{2}`, `\%` is `%`. Words of three letters or more, and "no", are in lower case: "x" and "X"
    differ, "Yes" and "yes" do not.
    """
    text = re.sub(r"\s+", " ", text)  # first: the patterns below take time with the square of a run of spaces
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    text = text.strip().strip("*_ ").rstrip(".,;: \n\t").strip("*_ ")
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"(?<![a-zA-Z0-9]) | (?![a-zA-Z0-9])", "", text)
    text = _WORD.sub(lambda word: word[0].lower(), text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    letter = re.fullmatch(r"\(([a-zA-Z])\)", text)
    return letter[1] if letter else text


def same_text(a: str, b: str) -> bool:
    """Whether both are the same once `normalised`; nothing is the same as an empty text."""
    a, b = normalised(a), normalised(b)
    return bool(a) and a == b


_DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_PLAIN = re.compile(rf"({_DECIMAL})(?:[eE]([-+]?[0-9]+))?")
_POWER_OF_TEN = re.compile(
    rf"(?:({_DECIMAL})\s*(?:\\times|\\cdot|\*|×|·)\s*)?10\^(?:\{{([-+]?[0-9]+)\}}|([-+]?[0-9]+))"
)
_SLASH = re.compile(rf"(?:([0-9]+) )?({_DECIMAL})/({_DECIMAL})")
_FRAC = re.compile(rf"([0-9]*)\\frac\{{(-?{_DECIMAL})\}}\{{(-?{_DECIMAL})\}}")


def number(text: str) -> Fraction | None:
    r"""The exact value of a number, or None.

    Integers, decimals, 1e-3, 3 \times 10^{8}, a/b, \frac{a}{b}, and mixed numbers (1 1/2, 1\frac{1}{2}: three halves).
    50% is 50: `same_number` treats per cents. None, too, for numbers of more than `MAX_NUMBER` characters or beyond
    10^±`MAX_EXPONENT`.
    """
    if len(text) > 4 * MAX_NUMBER:
        return None
    text = normalised(text).removesuffix("%")
    if len(text) > MAX_NUMBER:
        return None
    sign, text = (-1 if text.startswith("-") else 1), re.sub(r"^[-+]", "", text)
    whole = numerator = denominator = None
    exponent: str | int = 0
    if found := _PLAIN.fullmatch(text):
        numerator, exponent = found[1], found[2] or 0
    elif found := _POWER_OF_TEN.fullmatch(text):
        numerator, exponent = found[1] or "1", found[2] or found[3]
    elif found := _SLASH.fullmatch(text) or _FRAC.fullmatch(text):
        whole, numerator, denominator = found.groups()
    if numerator is None or abs(int(exponent)) > MAX_EXPONENT:
        return None
    value = Fraction(numerator) * Fraction(10) ** int(exponent)
    if denominator is not None:
        if Fraction(denominator) == 0 or (whole and value / Fraction(denominator) < 0):
            return None
        value = value / Fraction(denominator) + Fraction(whole or 0)
    return sign * value


def same_number(a: str, b: str) -> bool | None:
    """Whether both are the same number, exactly: 1/3 is not 0.333. None: at least one is no number.

    A per cent sign may be left out or worked out: 50% is the same as 50 (as graders of the MATH data set have it, where
    the question asks for per cents) and as 0.5.
    """
    first, second = number(a), number(b)
    if first is None or second is None:
        return None
    if first == second:
        return True
    per_cent_a, per_cent_b = (normalised(text).endswith("%") for text in (a, b))
    if per_cent_a == per_cent_b:
        return False
    return first == 100 * second if per_cent_a else second == 100 * first
