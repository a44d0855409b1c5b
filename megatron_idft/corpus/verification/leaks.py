"""Phrases by which a response betrays that its writer was shown a hint."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from megatron_idft.errors import InputError

# On the side of finding too much: what is found costs one more try, what is missed teaches a model to speak of hints.
DEFAULT_LEAK_PHRASES = (
    "reference answer",
    "reference solution",
    "reference response",
    "reference text",
    "provided answer",
    "provided solution",
    "provided analysis",
    "provided response",
    "provided hint",
    "the given answer",
    "the given solution",
    "the given analysis",
    "the given hint",
    "given final answer",
    "supplied answer",
    "expected answer",
    "ground truth",
    "gold answer",
    "answer key",
    "model answer",
    "official solution",
    "original answer",
    "original response",
    "known answer",
    "the answer provided",
    "the answer given",
    "the solution provided",
    "as the hint",
    "the hint",
    "as hinted",
    "according to the analysis",
    "according to the answer",
    "according to the solution",
    "based on the analysis",
    "based on the answer",
    "following the analysis",
    "from the analysis above",
    "the analysis says",
    "the analysis above",
    "the above analysis",
    "# analyze",
    "# analysis",
    "# cot",
)


class LeakFilter:
    """Looks for phrases at word boundaries, in any letter case, over any white space, line breaks included."""

    def __init__(self, phrases: Iterable[str] = DEFAULT_LEAK_PHRASES):
        """Raises InputError where there is no phrase, or an empty one."""
        self.phrases = tuple(phrases)
        if not self.phrases or not all(phrase.strip() for phrase in self.phrases):
            raise InputError("leak phrases: pass at least one, and none that is empty")
        self._patterns = [re.compile(_pattern(phrase), re.IGNORECASE) for phrase in self.phrases]

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        r"""One phrase per line; empty lines and lines that start with # do not count, `\#` starts a phrase with #.

        Raises:
            InputError: the file cannot be read or holds no phrase.
        """
        try:
            lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"leak phrases {path}: {error}; name a UTF-8 text file with one phrase per line"
            ) from error
        phrases = [line.removeprefix("\\") if line.startswith("\\#") else line for line in lines if line[:1] != "#"]
        phrases = [phrase for phrase in phrases if phrase]
        if not phrases:
            raise InputError(f"leak phrases {path}: no phrase in it; write one per line")
        return cls(phrases)

    def find(self, text: str, question: str = "") -> str | None:
        """The first of the phrases that stands in the text; None: no leak. One that the question uses is no leak."""
        for phrase, pattern in zip(self.phrases, self._patterns, strict=True):
            if pattern.search(text) and not pattern.search(question):
                return phrase
        return None


def _pattern(phrase: str) -> str:
    phrase = phrase.strip()
    before = r"(?<!\w)" if re.match(r"\w", phrase) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", phrase) else ""
    return before + r"\s+".join(re.escape(word) for word in phrase.split()) + after
