"""Final answers of responses, as they stand there."""

import re
from dataclasses import dataclass

from megatron_idft.corpus.verification.texts import normalised

MAX_ANSWER = 500  # characters after "the answer is": what is longer is no final answer

_BRACES = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?P<form>\{?)|\\.|[{}]", re.DOTALL)
_BOX_IN_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}")
_BARE_BOX = re.compile(r"[^\s$]+")
_GSM8K = re.compile(r"^[ \t]*####(.*)$", re.MULTILINE)
_ANSWER_IS = re.compile(
    r"(?:\banswer\b(?:[ \t]+to[ \t][^.:\n]{1,80}?)?[ \t*_]*(?:is\b|:|=)|\banswers[ \t]+are\b|答案(?:是|为|：|:))"
    r"[\s*_:`]*(?:(?:\$\$|\\\[)\s*)?",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?。](?=[\s*]|$)|;(?=\s*[a-zA-Z]{2})")
_THOUGHT = r"think(?:ing)?|thought|reasoning|THINK"
_THOUGHT_ENDS = re.compile(rf"</(?:{_THOUGHT})>|\[/THINK\]|<\|end_of_thought\|>")
_THOUGHT_BEGINS = re.compile(rf"<(?:{_THOUGHT})>|\[THINK\]|<\|begin_of_thought\|>")
_TAGS = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)
_TAKEN_BACK = re.compile(
    r"\b(?:wait|hmm+|oops|actually|correction|scratch that|on second thought|no,|mistaken?|"
    r"(?:is|was|'s|be) (?:wrong|incorrect|false|impossible|not (?:right|correct|the (?:final )?answer))|"
    r"isn't (?:right|correct)|"
    r"(?:fails|contradiction)\b|let me (?:re\w*|check|verify|try|double))",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"(?:\bnot|n't|\bnever|\bexcept|\binstead of|\brather than|\btry|\bif|\bsuppose|\bassume)"
    r"(?:\s+(?:the|that|your|my|this|final|correct))*[\s$:(\\\[]*\Z",
    re.IGNORECASE,
)
_BETWEEN_BOXES = re.compile(
    r"[\s$,;&.]*(?:\\(?:text|quad|qquad)\b[\s{}]*)*(?:\b(?:and|or)\b)?[\s$,;}]*(?:[a-zA-Z](?:_\{?\w\}?)?\s*=)?[\s$]*",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """The answer that a response states.

    Attributes:
        text: None where there is none.
        doubt: why it cannot be counted as right even if it agrees.
    """

    text: str | None
    doubt: str | None = None


def final_answer(text: str) -> str | None:
    """The final answer of a response, as it stands there; None where it gives none. See `stated_answer`."""
    return stated_answer(text).text


def stated_answer(text: str) -> FinalAnswer:
    r"""The final answer and what makes it doubtful.

    Only text after the last end of a thought (`</think>` and its kind) counts; a thought that never ends has no answer
    after it. Of that text, the last `<answer>…</answer>`, if there is one. In it, what is stated last:

    - a `\boxed{…}` or `\fbox{…}` (of nested ones the outermost; `\boxed 5` too); boxes with nothing but "and", a comma
      or a name between them are one list;
    - a GSM8K line `#### X`, if it is the last line or X is a number: other such lines are headings;
    - "the answer is X", "answer: X" up to the end of the line or sentence; after a box only where X is short.

    A text that ends inside its last box was cut off: it has no boxed answer. An answer is doubtful where the text
    takes it back afterwards ("wait", "that is wrong"), denies it, or asks it as a question.
    """
    text = behind_thoughts(text)
    tags = _TAGS.findall(text)
    if tags:
        inner = _last_stated(tags[-1])
        return inner if inner.text is not None else FinalAnswer(tags[-1].strip() or None)
    return _last_stated(text)


def behind_thoughts(text: str) -> str:
    """The text after the last end of a thought; nothing where a thought begins and never ends."""
    ends = list(_THOUGHT_ENDS.finditer(text))
    if ends:
        text = text[ends[-1].end() :]
    return "" if _THOUGHT_BEGINS.search(text) else text


def _last_stated(text: str) -> FinalAnswer:
    box, cut = _last_box(text)
    if box is not None and not text[box[1] : box[2]].strip(" ,"):
        return FinalAnswer(None)
    said = _said(text, cut)
    if box is None or (said is not None and said[0] > box[3] and _short(text[said[1] : said[2]])):
        if said is None:
            return FinalAnswer(None)
        start, begin, end = said
        answer, after = text[begin:end].strip(" \t*_`"), text[end:]
    else:
        start, after = box[0], text[box[3] :]
        answer = _boxed(text, box)
    return FinalAnswer(answer, _doubt(text[max(0, start - 40) : start], after))


def _doubt(before: str, after: str) -> str | None:
    if re.match(r"[\s$*)\\\]]*\?", after):
        return "the answer is asked as a question"
    if _DENIED.search(before):
        return "the answer is denied, or only supposed"
    taken = _TAKEN_BACK.search(after)
    return f"the answer may be taken back after it: {taken[0]!r}" if taken else None


def _short(answer: str) -> bool:
    return len(answer) <= 40 and len(answer.split()) <= 3


def _said(text: str, cut: bool) -> tuple[int, int, int] | None:
    """The last answer outside of boxes: where it is announced, where it begins and ends."""
    found: list[tuple[int, int, int]] = []
    for line in reversed(list(_GSM8K.finditer(text))):
        if line[1].strip() and (not text[line.end() :].strip() or _begins_as_number(line[1])):
            found.append((line.start(), line.start(1), line.end()))
            break
    for head in reversed(list(_ANSWER_IS.finditer(text))):
        begin = head.end()
        line_end = text.find("\n", begin)
        end = len(text) if line_end < 0 else line_end
        stop = _SENTENCE_END.search(text, begin, min(end, begin + 2 * MAX_ANSWER))
        end = stop.start() if stop else end
        answer = text[begin:end].strip(" \t*_`")
        if 0 < len(answer) <= MAX_ANSWER and normalised(answer) and not (cut and _last_box(answer)[1]):
            found.append((head.start(), begin, end))
            break
    return max(found, default=None)


def _begins_as_number(line: str) -> bool:
    return re.fullmatch(r"\s*[-+$\\]*\s*[0-9][0-9.,/%]*\s*", line) is not None


def _boxed(text: str, box: tuple[int, int, int, int]) -> str:
    """Content of the box; of several that make one list, their contents."""
    answer = text[box[1] : box[2]].strip()
    nested = _BOX_IN_BOX.fullmatch(answer)
    answer = nested[1] if nested else answer
    parts, start = [answer], box[0]
    while len(parts) < 20:
        earlier, _ = _last_box(text[max(0, start - MAX_ANSWER) : start])
        offset = max(0, start - MAX_ANSWER)
        if earlier is None or not _BETWEEN_BOXES.fullmatch(text, offset + earlier[3], start):
            break
        if "\n" in text[offset + earlier[3] : start] or ". " in text[offset + earlier[3] : start]:
            break
        parts.insert(0, text[offset + earlier[1] : offset + earlier[2]].strip())
        start = offset + earlier[0]
    return answer if len(set(map(normalised, parts))) == 1 else ", ".join(parts)


def _last_box(text: str) -> tuple[tuple[int, int, int, int] | None, bool]:
    """The last box, if it is closed: start, content start, content end, end; and whether one is never closed.

    One pass over the text.
    """
    opened: list[tuple[bool, int, int]] = []  # (a box, where it starts, where its content starts)
    closed: list[tuple[int, int, int, int]] = []
    for token in _BRACES.finditer(text):
        what = token[0]
        if what == "{":
            opened.append((False, token.start(), token.end()))
        elif what == "}":
            if opened:
                is_box, start, content = opened.pop()
                if is_box:
                    closed.append((start, content, token.start(), token.end()))
        elif token["form"]:
            opened.append((True, token.start(), token.end()))
        elif token["form"] == "":  # `\boxed 5`
            bare = _BARE_BOX.match(text, token.end())
            if bare:
                answer = bare[0] if "{" in bare[0] else bare[0].partition("}")[0]
                end = token.end() + len(answer.rstrip(".,;:!?)"))
                closed.append((token.start(), token.end(), end, end))
    last_opened = max((start for is_box, start, _ in opened if is_box), default=-1)
    if not closed or last_opened > max(closed)[0]:
        return None, last_opened >= 0
    box = max(closed)
    for outer in closed:  # in the order in which they close
        if outer[0] < box[0] and outer[2] > box[2]:
            box = outer
    return box, False
