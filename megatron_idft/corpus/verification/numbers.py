"""Answers as exact numbers, with or without a unit."""

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_idft.corpus.verification.texts import NOT_APPLICABLE, TEXT_COMMANDS, Same, normalised, without_name

MAX_NUMBER = 400  # characters of a number, and
MAX_EXPONENT = 1000  # its power of ten: 1e999999999 may not become a billion digits

_WHOLE = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+"
_DECIMAL = rf"(?:(?:{_WHOLE})(?:\.[0-9]*)?|\.[0-9]+)"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<whole>[0-9]+)?\\frac\{{(?P<p>-?{_DECIMAL})\}}\{{(?P<q>-?{_DECIMAL})\}}"
    rf"|(?:(?P<whole_of_slash>[0-9]+) )?(?P<above>{_DECIMAL})/(?P<below>{_DECIMAL})"
    rf"|(?:(?P<factor>{_DECIMAL})\s*(?:\\times|\\cdot|\*)\s*)?10\^(?:\{{(?P<power>[-+]?[0-9]+)\}}|(?P<bare_power>[-+]?[0-9]+))"
    rf"|(?P<decimal>{_DECIMAL})(?:[eE](?P<e>[-+]?[0-9]+))?)"
)
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_ONES, _TENS = (
    {word: value for value, word in zip(values, words.split(), strict=True)}
    for values, words in (
        (range(1, 20), "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
            " sixteen seventeen eighteen nineteen"),
        (range(20, 100, 10), "twenty thirty forty fifty sixty seventy eighty ninety"),
    )
)  # fmt: skip
_BELOW_10 = "|".join(list(_ONES)[:9])
_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})(?:[- ](?:{_BELOW_10}))?|{'|'.join(_ONES)})"
_BELOW_1000 = rf"(?:(?:{_BELOW_10}|a)[- ]hundred(?:(?: and)? {_BELOW_100})?|{_BELOW_100})"
_MILLIONS, _THOUSANDS = (f"(?:{_BELOW_1000}|a) {scale}" for scale in ("million", "thousand"))
_REST = f"(?:(?: and)? {_BELOW_1000})?"
IN_WORDS = re.compile(
    rf"(?:(?:minus|negative) )?(?:zero|{_MILLIONS}(?: {_THOUSANDS})?{_REST}|{_THOUSANDS}{_REST}|{_BELOW_1000})"
)
_SCALED = re.compile(rf"(.+?) ?({'|'.join(SCALES)})")


def number(text: str) -> Fraction | None:
    r"""The exact value of a number, or None.

    Integers, decimals, 1e-3, 3 \times 10^{8}, a/b, \frac{a}{b}, mixed numbers (1 1/2, 1\frac{1}{2}: three halves),
    "5 million", and whole numbers below 10^9 in English words, "minus twenty-one". 50% is 50: `same_number` treats per
    cents. None, too, for numbers of more than `MAX_NUMBER` characters or beyond 10^±`MAX_EXPONENT`.
    """
    return None if len(text) > 4 * MAX_NUMBER else _value(normalised(text).removesuffix("%"))


def _value(text: str) -> Fraction | None:
    """Of a normalised text without a per cent sign."""
    if len(text) > MAX_NUMBER:
        return None
    if IN_WORDS.fullmatch(text):
        return _of_words(text)
    scaled = _SCALED.fullmatch(text)
    found = NUMBER.fullmatch(scaled[1] if scaled else text)
    value = None if found is None else _exact(found)
    return value * SCALES[scaled[2]] if scaled and value is not None else value


def _of_words(text: str) -> Fraction:
    total = group = 0
    for word in re.split("[- ]", text):
        group += _ONES.get(word, 0) + _TENS.get(word, 0)
        if word == "hundred":
            group = 100 * max(group, 1)  # "a hundred"
        elif word in ("thousand", "million"):
            total, group = total + max(group, 1) * SCALES[word], 0
    return Fraction(-(total + group) if text.startswith(("minus", "negative")) else total + group)


def _exact(found: re.Match[str]) -> Fraction | None:
    whole = found["whole"] or found["whole_of_slash"] or "0"
    above = found["p"] or found["above"] or found["factor"] or found["decimal"] or "1"
    below = _fraction(found["q"] or found["below"] or "1")
    exponent = int(found["power"] or found["bare_power"] or found["e"] or 0)
    if abs(exponent) > MAX_EXPONENT or below == 0:
        return None
    part = _fraction(above) * Fraction(10) ** exponent / below
    if part < 0 and whole != "0":
        return None
    return (-1 if found["sign"] == "-" else 1) * (int(whole) + part)


def _fraction(decimal: str) -> Fraction:
    return Fraction(decimal.replace(",", ""))


def same_number(a: str, b: str) -> Same:
    """Whether both are the same number, exactly: 1/3 is not 0.333. None: at least one is no number.

    A per cent sign may be left out or worked out: 50% is the same as 50 (as graders of the MATH data set have it, where
    the question asks for per cents) and as 0.5. "5 million" cannot be told from 5, which may count millions.
    """
    first, second = number(a), number(b)
    if first is None or second is None:
        return None
    if first == second:
        return True
    texts = normalised(a), normalised(b)
    scales = [SCALES[found[2]] if (found := _SCALED.fullmatch(text)) else 1 for text in texts]
    if scales[0] != scales[1] and first * scales[1] == second * scales[0]:
        return None
    per_cent = [text.endswith("%") for text in texts]
    if per_cent[0] == per_cent[1]:
        return False
    return first == 100 * second if per_cent[0] else second == 100 * first


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with its unit.

    Attributes:
        unit: as written, singular.
        plain: the unit only says what is counted, so that the number may stand by itself.
    """

    value: Fraction
    unit: str
    plain: bool


_LETTERS = {"m", "g", "s", "h", "L", "l", "N", "J", "W", "V", "A", "K", "C", "F", "T"}
_SHORT_UNITS = (
    "mm cm dm km in ft yd mi mg kg lb lbs oz ml mL dL sec min hr hrs mph kmh kph ms ns Pa kPa Hz kHz MHz GHz kJ kN kW"
    " kWh cal kcal mol rad cc sq usd eur gbp inr day men pie egg cup bag box toy car cat dog cow pig hen bus hat jar"
    " pen boy bee ant"
)
_UNITS = _LETTERS.union(_SHORT_UNITS.split())
_CURRENCIES = {"€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "rs": "rupee", "usd": "dollar", "eur": "euro"}
_MONEY_FIRST = re.compile(r"(-?)(€|£|¥|₹|rs\.?|USD|usd|EUR|eur) ?(?=[0-9.])", re.IGNORECASE)
_UNIT = re.compile(r"(?:(?:square|cubic|sq) )?[a-zA-Z]+(?:\^(?:[23]|\{-?[1-4]\}))?(?: (?:squared|cubed)(?![a-z]))?")
_SENTENCE = re.compile(r"[a-zA-Z]+(?: [a-zA-Z]+)*")
# With one of these, the number is not what is stated, or may be only a part of it.
_ALTERING_WORDS = (
    "a an the and or not no nor but is are was were isnt if than then more less fewer under plus minus times of"
    " to by from off out about around nearly almost least most half halves third thirds quarter quarters fifth tenth"
    " tenths hundredth hundredths thousandths double twice triple point squared cubed mod modulo pair pairs score gross"
    " hundred thousand million billion trillion dozen percent percentage factorial root log sin cos tan exp sqrt"
    " alpha beta gamma delta theta lambda sigma omega epsilon that which so wrong incorrect false too remainder"
)
_ALTERING = set(_ALTERING_WORDS.split())
_NEGATING = {"not", "no", "nor", "wrong", "incorrect", "false", "percent", "percentage"} | set(SCALES)


def quantity(raw: str) -> Quantity | None:
    """A number with a unit, in a few words at most: "18 bananas", "€5", "5 km/h", "112 bananas left over"."""
    if len(raw) > MAX_NUMBER:
        return None
    text = _MONEY_FIRST.sub(r"\1", found := without_name(normalised(raw))[1], count=1)
    money = _MONEY_FIRST.match(found)
    prefix = NUMBER.match(text)
    value = None if prefix is None else _exact(prefix)
    if prefix is None or value is None:
        return None
    unit = text[prefix.end() :].strip().removesuffix("°") if text != prefix[0] else ""
    if money or (not unit and re.search(r"\\\$", raw)) or (not unit and raw.count("$") % 2):
        named = "dollar" if money is None else _CURRENCIES[money[2].lower().rstrip(".")]
        return Quantity(value, named, True) if not unit else None
    return _with_unit(value, unit, text[prefix.end() : prefix.end() + 1], raw)


def _with_unit(value: Fraction, unit: str, first: str, raw: str) -> Quantity | None:
    if not unit:
        return Quantity(value, "", True)
    if unit in _CURRENCIES:
        return Quantity(value, _CURRENCIES[unit], True)
    if re.fullmatch("°[CF]", unit):
        return Quantity(value, unit, True)
    apart = first == " " or re.search(TEXT_COMMANDS + r"\s*\{", raw) is not None
    parts = re.split(r"/| per ", unit)
    if all(_UNIT.fullmatch(part) and _is_unit(part, apart) for part in parts) and len(parts) <= 3:
        sure = all(part not in _LETTERS for part in parts) or len(parts) > 1 or "\\text" in raw or "mathrm" in raw
        return Quantity(value, "/".join(map(_singular, parts)), sure)
    words = unit.split(" ")
    if not apart or not _SENTENCE.fullmatch(unit) or len(words) > 8 or not _is_unit(words[0], apart):
        return None
    plain = len(words) <= 4 and not _ALTERING & {word.lower() for word in words}
    return None if _NEGATING & {word.lower() for word in words} else Quantity(value, " ".join(words), plain)


def _is_unit(part: str, apart: bool) -> bool:
    words = re.sub(r" (?:squared|cubed)\Z|\^.*", "", part).split(" ")
    word = words[-1]
    if word in _UNITS:
        return True
    looks_like_a_word = len(word) >= 4 and re.search("[aeiouy]", word) and word not in "abcdefghijklmnopqrstuvwxyz"
    return bool(apart and looks_like_a_word and word.lower() not in _ALTERING)


def _singular(unit: str) -> str:
    unit = _CURRENCIES.get(unit, unit)
    return unit.removesuffix("s") if len(unit) > 3 else unit


def same_quantity(a: str, b: str) -> Same:
    """Numbers with units: NOT_APPLICABLE where at least one is none, None where the units leave it open."""
    first, second = quantity(a), quantity(b)
    if first is None or second is None:
        return NOT_APPLICABLE
    same = first.value == second.value
    if first.unit == second.unit:
        return same
    if first.unit and second.unit:
        return None
    if not same:
        return False
    return True if first.plain and second.plain else None
