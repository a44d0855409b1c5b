"""Verdicts on responses: by exact comparison, as numbers, by math-verify, or by a function of the user's."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib.metadata import version
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

from megatron_idft.corpus.verification.answers import FinalAnswer, behind_thoughts, stated_answer
from megatron_idft.corpus.verification.comparing_process import Reply
from megatron_idft.corpus.verification.formulas import (
    as_latex,
    decimal_comma,
    incomparable,
    members,
    names_differ,
    unreadable,
)
from megatron_idft.corpus.verification.numbers import number, same_number, same_quantity
from megatron_idft.corpus.verification.sentences import holds_number, in_words, last_sentence, states_number
from megatron_idft.corpus.verification.texts import (
    COMPARISONS,
    NOT_APPLICABLE,
    Same,
    normalised,
    same_numbers_in_words,
    same_text,
    same_word,
    without_name,
)
from megatron_idft.errors import InputError, WorkerError
from megatron_idft.processes import Failure, ProcessPool, Task

BY_LAST_SENTENCE = "number, last in text"
MAX_COMPARED = 2000  # characters of an answer that is compared otherwise than as a text
REMEDY = 'pip install "megatron-idft[verify]"'


class Verdict(StrEnum):
    RIGHT = "right"
    WRONG = "wrong"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verification:
    """The verdict on one response.

    Attributes:
        verified_by: exact; number; number, last in text; math-verify; or the plug-in's `module:function`: the last that
            was asked. None: none.
        extracted: the final answer found in the response.
        reason: why it is unknown, or wrong without a comparison.
    """

    verdict: Verdict
    verified_by: str | None
    extracted: str | None
    reason: str | None = None


class Verifier:
    """Compares responses with reference answers. A context manager: leaving it ends its processes.

    Args:
        plugin: `module:function`, called as function(response: str, reference) -> bool | None (None: undecided), asked
            instead of all else. Its output is dropped, but for the last line on stderr of a process that ended.
        workers: processes for math-verify or the plug-in, started when first needed.
        timeout_seconds: wall clock, for each response.
        memory_mb: address space of each process.

    Raises:
        InputError: settings that cannot be used.
        WorkerError: a plug-in that cannot be loaded, on entering the context, or in `verify` without it.
    """

    def __init__(
        self, *, plugin: str | None = None, workers: int = 2, timeout_seconds: float = 10.0, memory_mb: int = 2048
    ):
        if plugin is not None and not all(plugin.partition(":")):
            raise InputError(f"verifier {plugin!r} must read 'module:function', for example 'my_checks:is_right'")
        if workers < 1 or memory_mb < 1 or not 0 < timeout_seconds < float("inf"):
            raise InputError(
                f"verifier: workers {workers}, timeout_seconds {timeout_seconds} and memory_mb {memory_mb} must be"
                " positive numbers"
            )
        self.plugin, self.workers, self.timeout_seconds, self.memory_mb = plugin, workers, timeout_seconds, memory_mb
        self._tool = plugin or ("math-verify" if find_spec("math_verify") else None)
        self._pool = ProcessPool(
            "megatron_idft.corpus.verification.comparing_process",
            plugin,
            workers,
            not_started=self._not_started,
            seconds=timeout_seconds,
            memory_mb=memory_mb,
        )

    def __enter__(self) -> Self:
        if self.plugin:  # a wrong name should stop a run before anything is decoded
            self._pool.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; `verify` would start new ones."""
        self._pool.close()

    def _not_started(self, failure: Failure) -> WorkerError:
        tool = f"plug-in {self.plugin!r}" if self.plugin else "math-verify"
        return WorkerError(f"{tool}: {failure.reason}" + ("; more memory_mb may be needed" if failure.end else ""))

    def describe(self) -> str:
        """The means by which answers are compared, in one line."""
        limits = f"{self.workers} processes, {self.timeout_seconds:g} s and {self.memory_mb} MB for each answer"
        if self.plugin:
            return f"answers verified by {self.plugin} ({limits})"
        start = "answers verified as texts and as exact numbers"
        if self._tool:
            return f"{start}, then by math-verify {version('math-verify')} ({limits})"
        return f"WARNING: {start} only, formulas stay unknown: math-verify is not installed; {REMEDY}"

    def verify(self, items: Sequence[tuple[str, Any]]) -> list[Verification]:
        """One verification for each (text of a response, reference answer), in order.

        A reference may be a whole solution: its final answer counts, if it gives one. None or an empty text is no
        reference. Numbers are compared exactly, so that 0.333 is not 1/3, and math-verify is not asked about them.
        Where the reference is a number and the response states no answer, the last sentence of the response counts.
        """
        found: list[Verification] = []
        tasks: list[Task] = []
        for place, (response, reference) in enumerate(items):
            stated = stated_answer(response)
            first = self._without_asking(response, stated, reference)
            if not isinstance(first, Verification):
                tasks.append(Task(place, first))
                first = Verification(Verdict.UNKNOWN, self._tool, stated.text)
            found.append(first)
        for task, answer in self._pool.run(tasks):
            reply = _reply(answer)
            verdict = Verdict(reply["verdict"])
            found[task.number] = replace(found[task.number], verdict=verdict, reason=reply.get("reason"))
        return found

    def _without_asking(self, response: str, stated: FinalAnswer, reference: Any) -> Verification | list[Any]:
        """The verdict, where it needs no other process; else what is to be asked: [response or answers, reference]."""

        def say(verdict: Verdict, by: str | None, reason: str | None = None) -> Verification:
            if verdict is Verdict.RIGHT and stated.doubt:
                verdict, reason = Verdict.UNKNOWN, stated.doubt
            return Verification(verdict, by, stated.text, reason)

        if reference is None or (isinstance(reference, str) and not reference.strip()):
            return say(Verdict.UNKNOWN, None, "no reference answer")
        if self.plugin:
            try:
                json.dumps(reference)
            except (TypeError, ValueError) as error:
                return say(Verdict.UNKNOWN, None, f"the reference answer cannot be passed as JSON: {error}")
            return [response, reference]
        if isinstance(reference, bool | int | float):
            reference = str(reference)
        if not isinstance(reference, str):
            kind = type(reference).__name__
            return say(Verdict.UNKNOWN, None, f"the reference answer is a {kind}; verify it by a plug-in")
        of_reference = stated_answer(reference)
        wanted = of_reference.text or behind_thoughts(reference)
        stated = replace(stated, doubt=stated.doubt or of_reference.doubt)
        if not normalised(wanted):
            return say(Verdict.UNKNOWN, None, "no reference answer")
        given = behind_thoughts(response) if stated.text is None else stated.text
        same, by = _compare_directly(given, wanted)
        if stated.text is None and same is not True:
            return _by_last_sentence(response, wanted, of_reference.doubt)
        if same is not NOT_APPLICABLE:
            return say(_VERDICTS[same], by, None if same is not None else "the two can be read in more than one way")
        found = self._formulas(given, wanted, stated, say)
        if not isinstance(found, Verification):
            return found
        same = _in_words(given, wanted)
        if number(wanted) is not None and not holds_number(given):
            last = _by_last_sentence(response, wanted, stated.doubt)
            if same is False or (last.extracted is not None and holds_number(last.extracted)):
                return last  # what is announced, such as "Answer: we add all of them", is a heading
        return found if same is None else say(_VERDICTS[same], "number")

    def _formulas(
        self, given: str, wanted: str, stated: FinalAnswer, say: Callable[..., Verification]
    ) -> Verification | list[Any]:
        formulas = as_latex(given), as_latex(wanted)
        asked = [members(formula) for formula in formulas]
        reason = stated.doubt or next(filter(None, (unreadable(part) for parts in asked for part in parts)), None)
        if reason is None and names_differ(*formulas):
            reason = "values of different names"
        if reason is None and decimal_comma(given, wanted):
            reason = "a comma that may stand before decimals or in a list"
        reason = reason or incomparable(asked[0][-1], asked[1][-1])
        if reason is None and self._tool is None:
            reason = f"neither the same text nor two numbers, and math-verify is not installed: {REMEDY}"
        return asked if reason is None else say(Verdict.UNKNOWN, None, reason)


def _in_words(given: str, wanted: str) -> bool | None:
    """Whether one of them states the number that the other is."""
    for sentence, value in ((given, wanted), (wanted, given)):
        if number(value) is not None:
            return states_number(sentence, value) if in_words(sentence) else None
    return None


def _by_last_sentence(response: str, wanted: str, doubt: str | None) -> Verification:
    """Of a response without an answer that is marked as such."""
    sentence = last_sentence(response)
    if number(wanted) is None or sentence is None or "boxed" in sentence:
        return Verification(Verdict.WRONG, "exact", None, "no final answer in the response")
    same = states_number(sentence, wanted)
    if same is True and doubt is None:
        return Verification(Verdict.RIGHT, BY_LAST_SENTENCE, sentence)
    if same is False:
        return Verification(Verdict.WRONG, BY_LAST_SENTENCE, sentence, "no final answer but another number, or none")
    reason = doubt or "no final answer, and the last sentence may state another number"
    return Verification(Verdict.UNKNOWN, BY_LAST_SENTENCE, sentence, reason)


_VERDICTS = {True: Verdict.RIGHT, False: Verdict.WRONG, None: Verdict.UNKNOWN}


def _reply(answer: Reply | Failure) -> Reply:
    if not isinstance(answer, Failure):
        return answer
    reason = f"the verifying process ended, {answer.end}" if answer.end else answer.reason
    return {"verdict": "unknown", "reason": reason}


def _compare_directly(given: str, wanted: str) -> tuple[Same, str]:
    """Whether both say the same, and how that was found: exact or number. None: undecided; NOT_APPLICABLE: ask on."""
    if same_text(given, wanted):
        return True, "exact"
    if max(len(given), len(wanted)) > MAX_COMPARED:
        return NOT_APPLICABLE, "exact"
    texts = [normalised(text) for text in (given, wanted)]
    if names_differ(*texts):
        return NOT_APPLICABLE, "exact"
    values = [without_name(text)[1] for text in texts]
    if values != texts and values[0] == values[1]:
        return True, "exact"
    if (same := same_number(*values)) is not None:
        return same, "number"
    for compare in COMPARISONS:
        if (same := compare(*values)) is not NOT_APPLICABLE:
            return same, "number" if compare is same_numbers_in_words else "exact"
    if (same := same_quantity(given, wanted)) is not NOT_APPLICABLE:
        return same, "number"
    return same_word(*values), "exact"
