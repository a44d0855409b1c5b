"""Prepares two answers for math-verify: plain notation as LaTeX, and pairs that it would misread.

It is asked about formulas of which every sign is known to be read as meant; all else stays unknown. Math-Verify 0.9
drops primes, subscripts and powers of units, multiplies the letters of words, takes `1/2x` for 1/(2x), 3:45 for a
fraction and the end of "2x+1=0" for its value (https://github.com/huggingface/Math-Verify/issues/14).
"""

import re

from megatron_idft.corpus.verification.answers import MAX_ANSWER
from megatron_idft.corpus.verification.texts import normalised, without_name

_FUNCTIONS = "arccos arcsin arctan cos cosh cot csc exp ln log sin sinh tan tanh"  # `min` and `sec` are units
_GREEK = "alpha beta delta epsilon theta lambda mu phi pi psi rho sigma tau omega"  # gamma is read as Euler's constant
_NAMES = {
    **{name: rf"\{name} " for name in f"{_FUNCTIONS} {_GREEK} infty".split()},
    **dict.fromkeys(("infinity", "inf", "oo"), r"\infty "),
    **{"tg": r"\tan ", "ctg": r"\cot ", "arctg": r"\arctan ", "and": ",", "or": ","},
}
_NAME = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}(?![a-zA-Z])")
_COMMANDS = set(
    f"{_FUNCTIONS} {_GREEK} infty sec varphi frac sqrt cdot times div pm mp le ge ne lt gt cup cap emptyset varnothing"
    " binom lfloor rfloor lceil rceil lvert rvert mathbb".split()
)
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[pbvBV]?matrix\}")
_TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+|\\[a-zA-Z]+|\\[{}\\]|[a-zA-Z]|[-+*/^_()\[\]{},;=<>!|& ]")
_MATRIX_TOKENS = {"&", "\\\\"}
_UNSURE = [
    (re.compile(pattern), why)
    for pattern, why in [
        (r"(?<!_)[0-9] [0-9]", "digits with a space between them"),
        (r"[0-9]\.[0-9]+\.[0-9]", "a number with two points"),
        (r"[0-9] ?[ap]m\Z", "a time of the day, or a product"),
        (r"[0-9]\}?_", "a number with a subscript"),
        (r"(?<![0-9])[0-9]{1,3},[0-9]{3}(?![0-9])", "a comma that may separate thousands or a list"),
        (r"[A-Z](?:_\{?[0-9n]+\}?\^|\^\{?[0-9n]+\}?_)", "a letter with a lower and an upper number"),
        (r"(?<![\\a-zA-Z])[fghA-Z](?:_\{?\w\}?)?\(", "a function without a definition"),
        (r"(?<![\\a-zA-Z])[A-Z](?:_?\{?[0-9]*\}?)[A-Z]", "capital letters in a row"),
        (r"(?<![\\a-zA-Z])[a-zA-Z]{1,2} ?[0-9]|\)[0-9]", "a digit right after a letter or bracket"),
        (r"\^(?:\{[^{}]*\}|\w)\^", "a power of a power"),
        (r"/(?:[0-9.]+|[a-zA-Z]) ?(?=[a-zA-Z(0-9]|\\(?:sqrt|pi|frac|sin|cos|tan|ln|log))", "a slash before a product"),
        (r"\\?[0-9]-[0-9]+-", "what may be a date"),
        (r"\\log(?!_)", "a logarithm without a base"),
        (r"[-+*/^=<>]\Z|\A[*/^=<>]", "an operator at the end"),
    ]
]  # fmt: skip


def as_latex(answer: str) -> str:
    r"""The answer with function names, Greek letters and powers as LaTeX writes them: `pi/4` as `\pi/4`."""
    text = normalised(answer).replace("**", "^")
    text = re.sub(r"\\(?:begin|end)\{[a-z]*\}", lambda found: found[0].replace("{", "{\0"), text)
    text = _NAME.sub(lambda name: _NAMES.get(name[0], name[0]), text).replace("\0", "")
    text = re.sub(r"(?<![a-zA-Z\\])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
    return re.sub(r",\s*,", ",", text).replace("*", r"\cdot ").replace(r"\varnothing", r"\emptyset").strip()


def unreadable(answer: str) -> str | None:
    """Why math-verify must not be asked about this answer, `as_latex`; None where it may."""
    if len(answer) > MAX_ANSWER:
        return f"an answer of {len(answer)} characters is a text, not a formula"
    text, matrices = _ENVIRONMENT.subn(" ", answer)
    position = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        name = "" if token is None else token[0]
        known = not (name.startswith("\\") and name[1:].isalpha()) or name[1:] in _COMMANDS
        if token is None or not known or (name in _MATRIX_TOKENS and not matrices):
            return f"not a formula that is surely read as meant: {(name or text[position:])[:30]!r} in {answer[:60]!r}"
        position = token.end()
    word = re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}", text)
    if word:
        return f"words are no formula: {word[0][:30]!r}"
    for pattern, why in _UNSURE:
        if pattern.search(text):
            return f"{why} can be read in more than one way: {answer[:60]!r}"
    return None


def members(answer: str) -> list[str]:
    """The sides of a chain such as 3*4=12, which must all agree; of `x=5` the value; else the answer itself."""
    _, value = without_name(answer)
    parts = value.split("=")
    if len(parts) > 1 and not re.search(r"[,;<>]|\\(?:le|ge|ne|lt|gt)(?![a-z])", value):
        named = re.fullmatch(r"[a-zA-Z](?:_\{?\w+\}?)?", parts[0])
        if named or not any(re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", part) for part in parts):
            return [part.strip() for part in parts[bool(named) :]]
    return [value]


def form(formula: str) -> str:
    """equation, relation, matrix, set, tuple, list or one: what may be compared with what."""
    if "matrix" in formula:
        return "matrix"
    if re.search(r"[<>]|\\(?:le|ge|ne|lt|gt)(?![a-z])", formula):
        return "relation"
    if "=" in formula:
        return "equations" if re.search("[,;]", formula) else "equation"
    depth, commas, closes_first = 0, 0, None
    body = formula.replace("\\{", "(").replace("\\}", ")")
    for place, sign in enumerate(body):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0 and closes_first is None and sign in ")]}":
            closes_first = place
        commas += sign in ",;" and depth == 0
    if commas or "\\pm" in formula or "\\mp" in formula:
        return "list"
    whole = closes_first == len(body) - 1 and body[:1] in ("(", "[")
    if whole and re.search("[,;]", body):
        return "set" if formula.startswith("\\{") else "tuple"
    return "set" if formula in ("\\emptyset", "\\varnothing") else "one"


_COMPARABLE = [
    {"list", "set"},
    {"list", "one"},
    {"set", "one"},
    {"relation", "tuple"},
    {"relation", "one"},
    {"relation", "set"},
    {"tuple", "one"},
]


def incomparable(a: str, b: str) -> str | None:
    """Why formulas of these forms are not compared, such as a pair and a set; None where they are."""
    for formula in (a, b):
        elements = formula.removeprefix(r"\{").removesuffix(r"\}").split(",")
        if form(formula) in ("list", "set") and len(set(elements)) < len(elements):
            return "a list that repeats an element"
    forms = {form(a), form(b)}
    if len(forms) == 1 or forms in _COMPARABLE:
        return None
    return f"a comparison of forms that may differ in meaning: {' and '.join(sorted(forms))}"


def names_differ(a: str, b: str) -> bool:
    """Whether both are values of something, but not of the same: x=5 and y=5."""
    first, second = without_name(a)[0], without_name(b)[0]
    return first is not None and second is not None and first != second


def decimal_comma(a: str, b: str) -> bool:
    """Whether one answer, such as 3,5, may be a number with a decimal comma: nothing says that both are lists."""
    pairs = [re.fullmatch(r"[\s$]*-?[0-9]+,[0-9]+[\s$]*", text) is not None for text in (a, b)]
    lists = [re.search(r"[,;]\s|\band\b|\bor\b|\\\{|\\pm", text) is not None for text in (a, b)]
    return any(pairs) and not any(lists)
