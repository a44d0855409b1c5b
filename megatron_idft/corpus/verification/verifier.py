"""Verdicts on responses: by exact comparison, as numbers, by math-verify, or by a function of the user's."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib.metadata import version
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

from megatron_idft.corpus.verification.answers import final_answer, normalised, same_number, same_text
from megatron_idft.corpus.verification.formulas import as_latex, different_words, unreadable, without_unit, words
from megatron_idft.corpus.verification.pool import WorkerPool
from megatron_idft.errors import InputError

REMEDY = 'pip install "megatron-idft[verify]"'


class Verdict(StrEnum):
    RIGHT = "right"
    WRONG = "wrong"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verification:
    """What is known of one response.

    verified_by: exact, number, math-verify or the plug-in's `module:function`, whichever was asked last; None: none.
    extracted: the final answer found in the response. reason: why it is unknown, or wrong without a comparison.
    """

    verdict: Verdict
    verified_by: str | None
    extracted: str | None
    reason: str | None = None


class Verifier:
    """Compares responses with reference answers. A context manager: leaving it ends its processes.

    plugin: `module:function`, called as function(response: str, reference) -> bool | None (None: it cannot tell), asked
    instead of all else; what it prints is dropped. workers: processes for math-verify or the plug-in, started when
    first needed. timeout_seconds: wall clock, for each response. memory_mb: address space of each process.

    Raises InputError for settings that cannot be used; for a plug-in that cannot be loaded, entering the context
    raises WorkerError (a UserError), as `verify` does without it.
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
        self._pool = WorkerPool(plugin=plugin, workers=workers, timeout_seconds=timeout_seconds, memory_mb=memory_mb)

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

    def describe(self) -> str:
        """What answers are compared by, in one line."""
        limits = f"{self.workers} processes, {self.timeout_seconds:g} s and {self.memory_mb} MB for each answer"
        if self.plugin:
            return f"answers verified by {self.plugin} ({limits})"
        start = "answers verified as texts and as exact numbers"
        if self._tool:
            return f"{start}, then by math-verify {version('math-verify')} ({limits})"
        return f"{start} only, what is neither stays unknown: math-verify is not installed, {REMEDY}"

    def verify(self, items: Sequence[tuple[str, Any]]) -> list[Verification]:
        """One verification for each (text of a response, reference answer), in order.

        A reference may be a whole solution: its final answer counts, if it gives one. None or an empty text is no
        reference. Numbers are compared exactly, so that 0.333 is not 1/3, and math-verify is not asked about them.
        """
        found: list[Verification] = []
        tasks: list[Any] = []
        places: list[int] = []
        for place, (response, reference) in enumerate(items):
            extracted = final_answer(response)
            first = self._without_asking(response, extracted, reference)
            if isinstance(first, Verification):
                found.append(first)
                continue
            found.append(Verification(Verdict.UNKNOWN, self._tool, extracted))
            tasks.append(first)
            places.append(place)
        for place, task, reply in zip(places, tasks, self._pool.run(tasks) if tasks else [], strict=True):
            asked = found[place]
            verdict, reason = Verdict(reply["verdict"]), reply.get("reason")
            if verdict is Verdict.WRONG and not self.plugin and any(words(answer) for answer in task):
                verdict, reason = Verdict.UNKNOWN, "different as formulas, but there are words in one of them"
            found[place] = replace(asked, verdict=verdict, reason=reason)
        return found

    def _without_asking(self, response: str, extracted: str | None, reference: Any) -> Verification | list[Any]:
        """The verdict, where it needs no other process; else what is to be asked: [response or answer, reference]."""

        def say(verdict: Verdict, by: str | None, reason: str | None = None) -> Verification:
            return Verification(verdict, by, extracted, reason)

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
        wanted = final_answer(reference) or reference
        given = response if extracted is None else extracted
        if same_text(given, wanted):
            return say(Verdict.RIGHT, "exact")
        same = same_number(given, wanted)
        if extracted is None and not same:
            return say(Verdict.WRONG, "exact", "no final answer in the response")
        if same is not None:
            return say(Verdict.RIGHT if same else Verdict.WRONG, "number")
        units = [without_unit(text) for text in (given, wanted)]
        if any(unit and same_number(unit, plain) for unit, plain in zip(units, (wanted, given), strict=True)):
            return say(Verdict.RIGHT, "number")
        if different_words(given, wanted):
            return say(Verdict.WRONG, "exact")
        reason = unreadable(given, wanted)
        if reason is None and not normalised(wanted):
            reason = "no reference answer"
        if reason is None and self._tool is None:
            reason = f"neither the same text nor two numbers, and math-verify is not installed: {REMEDY}"
        if reason is not None:
            return say(Verdict.UNKNOWN, None, reason)
        return [as_latex(given), as_latex(wanted)]
