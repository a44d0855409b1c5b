"""Numbers that sentences state: "So she has 42 apples left." against a reference that is a number.

A sentence is right where it holds this number and no other, and no word that changes what the number says. It is wrong
where it cannot mean this number. What lies between stays undecided: "about 42", "12 or 13", "2 hours and 30 minutes".
"""

import re
from dataclasses import dataclass
from itertools import pairwise

from megatron_idft.corpus.verification.answers import behind_thoughts
from megatron_idft.corpus.verification.numbers import IN_WORDS, NUMBER, SCALES, number, same_number
from megatron_idft.corpus.verification.texts import in_plain_characters

MAX_SENTENCE = 1000  # characters that are looked at

_NUMBER = re.sub(r"\?P<[a-z_]+>", "?:", NUMBER.pattern)
_WORDS = rf"(?<![a-z0-9-])(?:{IN_WORDS.pattern})(?![a-z-])"
_TOKEN = re.compile(
    rf"(?<![\w.,^{{\\])(?:{_NUMBER})(?: ?%| (?:{'|'.join(SCALES)})s?(?![a-z]))?|{_WORDS}", re.IGNORECASE
)
_LIST_SIGN = re.compile(r"(?:(?:[-*+•>]|[0-9]{1,2}[.)]|#{1,6}|(?:step|part) [0-9]{1,2}[:.)])\s+)+", re.IGNORECASE)
_NEXT_SENTENCE = re.compile(r"(?<=[.!?。])[*_`\"')]*\s+(?=[^\sa-z])")
_EMPHASIS = re.compile(r"\*\*|__|`|(?<![\w\s])\*|\*(?![\w\s(])")
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")
# Beside a number these make something else of it: 3:45, 10-15, 5/7/9, x_2, 7!, 2x, 12-inch, 5 m.
_JOINED_BEFORE = re.compile(r"(?:\w ?[:/^_]|[\w)]-|[a-zA-Z])\Z")
_JOINED_AFTER = re.compile(r" ?[:/^_!]\w|-\w|\^|[a-zA-Z]| [a-zA-Z](?![a-zA-Z])|\(")
_FORMULA = re.compile(r"[\\^_{}|<>√π∞]|\b(?:log|ln|sin|cos|tan|sqrt|exp|gcd|lcm|mod|pi|infinity)\b")
_UNKNOWN_IN_IT = re.compile(r"(?<![a-zA-Z])[a-zA-Z] ?[-+*/] ?#|# ?[-+*/] ?[a-zA-Z](?![a-zA-Z])")  # x + 1 = 0
_OPERATION = re.compile(r"# ?[-+*/x×÷] ?#")
_CHANGED = re.compile(
    r"\b(?:not|no|never|nor|neither|cannot|without|except|if|unless|suppose|assume|or|either|between|about|around|"
    r"roughly|nearly|almost|approximately|approx|least|most|over|under|exceeds?|than|more|less|fewer|too|up to|off|"
    r"instead|maybe|perhaps|might|could|would|should|need(?:s|ed)? to|have to|has to|let|let's|find|calculate|"
    r"add|subtract|multiply|divide|remainder|wrong|incorrect|mistake|sorry|wait|check|[ap]\.?m|o'clock)\b|"
    r"\bthat #|n't\b|[?~≈]",
    re.IGNORECASE,
)
# With these, another number may be meant than those that are written.
_WORKED_OUT = re.compile(
    r"\b(?:half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|eighths?|tenths?|hundredths?|thousandths?|dozens?|"
    r"pairs?|couple|twice|double|triple|times|once|both|percent|percentage|squared|cubed|root|factorial|plus|minus|"
    r"sum|product|difference|hundreds?|thousands?|millions?|billions?|score|gross|point)\b|%|\w{3}ties\b",
    re.IGNORECASE,
)
_NONE_OR_ONE = re.compile(r"\b(?:none|nothing|no|nobody|all|every|each|an?|single|only)\b", re.IGNORECASE)
_UNIT = (
    r"(?:seconds?|minutes?|hours?|days?|weeks?|months?|years?|sec|min|hrs?|feet|foot|ft|inch(?:es)?|in|yards?|miles?|cm|"
    r"mm|km|(?:centi|milli|kilo)?met(?:er|re)s?|(?:kilo)?grams?|kg|g|m|pounds?|ounces?|lbs?|oz|lit(?:er|re)s?|ml|dollars?|"
    r"cents?|degrees?|gallons?|quarts?|pints?|cups?|R|remainder)"
)
_COMPOUND = re.compile(rf"\A[^#]*#(?: ?{_UNIT},?(?: and)? #)+[^#]*\Z")  # one amount in several units


@dataclass(frozen=True, slots=True)
class _Token:
    """A number in a sentence. clear: it stands for itself."""

    text: str
    start: int
    end: int
    clear: bool


def last_sentence(response: str) -> str | None:
    """The last sentence of a response, after its thoughts, without the sign or number of a list in front."""
    lines = behind_thoughts(response).splitlines()
    line = next((line.strip() for line in reversed(lines) if re.search(r"\w", line)), None)
    if line is None:
        return None
    line = _LIST_SIGN.sub("", line, count=1) if _LIST_SIGN.match(line) else line
    sentences = [part for part in _NEXT_SENTENCE.split(line) if re.search(r"\w", part)]
    return sentences[-1].strip() if sentences else None


def in_words(answer: str) -> bool:
    """Whether an answer is one sentence with words in it, not a formula or a list of numbers."""
    return "\n" not in answer and re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}", answer) is not None


def holds_number(text: str) -> bool:
    """Whether there is a number in a text, in digits or words."""
    return bool(_tokens(in_plain_characters(text)))


def states_number(sentence: str, wanted: str) -> bool | None:
    """Whether a sentence states this number: True, False, or None where that is not clear.

    Args:
        sentence: a final answer in words, or the last sentence of a response.
        wanted: a number.
    """
    if len(sentence) > MAX_SENTENCE or (value := number(wanted)) is None:
        return None
    text = _EMPHASIS.sub("", in_plain_characters(sentence))
    text = re.sub(r"\s+", " ", re.sub(r"\\(?:times|cdot|div)(?![a-zA-Z])", "*", text)).strip()
    tokens = _tokens(text)
    frame = _frame(text, tokens)
    if _FORMULA.search(frame):
        return None
    if not tokens:
        few = value in (0, 1) and _NONE_OR_ONE.search(frame)
        return None if few or _WORKED_OUT.search(frame) or re.search(r"[^\x00-\x7f]", frame) else False
    same, clear = [same_number(token.text, wanted) for token in tokens], all(token.clear for token in tokens)
    place = _place_of_result(tokens, text)
    if place is not None and same[place] is not False:
        doubtful = any(pattern.search(frame) for pattern in (_CHANGED, _WORKED_OUT, _UNKNOWN_IN_IT))
        return True if same[place] and clear and not doubtful else None
    others = any(found is not False for found in same) and place is None
    if others or not clear or _WORKED_OUT.search(frame) or _COMPOUND.search(frame):
        return None
    return None if _OPERATION.search(frame) and "=" not in frame else False


def _place_of_result(tokens: list[_Token], text: str) -> int | None:
    """The place of the only number, or of the only one after the last `=`."""
    behind = [place for place, token in enumerate(tokens) if token.start > text.rfind("=")]
    values = {(number(tokens[place].text), "%" in tokens[place].text) for place in behind}
    return behind[-1] if len(values) == 1 else None


def _tokens(text: str) -> list[_Token]:
    spans = [(found.start(), found.end(), found[0]) for found in _TOKEN.finditer(text)]
    spans = [span for span in spans if not _ORDINAL.match(text, span[1])]
    crowded = {
        place for (_, end, _), (start, _, _) in pairwise(spans) if text[end:start] == " " for place in (end, start)
    }
    return [_token(text, *span, alone=not crowded & set(span[:2])) for span in spans]


def _token(text: str, start: int, end: int, name: str, *, alone: bool) -> _Token:
    before = text[:start]
    if name[0] in "+-" and re.search(r"[\w)] ?\Z", before) and not re.search(r"[a-zA-Z] \Z", before):
        name, before = name[1:], before + name[0]  # 5 -3 is a difference
        joined = False
    else:
        joined = _JOINED_BEFORE.search(before) is not None
    clear = alone and not joined and not _JOINED_AFTER.match(text, end) and name.lower() != "one"
    return _Token(name.rstrip("."), start, end, clear)


def _frame(text: str, tokens: list[_Token]) -> str:
    """The text with a # for each number."""
    parts, at = [], 0
    for token in tokens:
        parts += [text[at : token.start], "#" + "." * text[token.start : token.end].endswith(".")]
        at = token.end
    return "".join(parts) + text[at:]
