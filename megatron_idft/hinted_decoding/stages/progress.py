"""How far the records at hand are, for who shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megatron_idft.hinted_decoding.settings import RealignSettings
from megatron_idft.inference.requests import Completion


@dataclass(slots=True)
class StageProgress:
    """The stage that the turns at hand are in. Another thread may read it at any time.

    Attributes:
        stages: that a turn goes through at most; each counts as the same share of its work.
        turns: of the records at hand.
        settled: turns that need no further stage.
        stage: in plain words; empty between calls.
        requests, done: responses that the stage writes, and those that it has.
        tokens: how many the engine has decoded so far.
    """

    stages: int
    tokens: Callable[[], int]
    turns: int = 0
    settled: int = 0
    stage: str = ""
    requests: int = 0
    done: int = 0
    _number: int = 0
    _open: int = 0
    _most_tokens: int = 0
    _tokens_before: int = 0

    @classmethod
    def of(cls, settings: RealignSettings, tokens: Callable[[], int]) -> StageProgress:
        """For a job with these settings."""
        retries = settings.retries if settings.fallback == "retry" else 0
        return cls(2 + (settings.template.marker is not None) + retries, tokens)

    def begin(self, turns: int) -> None:
        """Records with so many turns are at hand now; none with 0."""
        self.turns, self.settled, self.stage = turns, 0, ""
        self._open = self._number = self.requests = self.done = 0

    def begin_turns(self, turns: int) -> None:
        """So many of them are worked on now."""
        self._open, self._number, self.requests = turns, 0, 0

    def settle(self, turns: int) -> None:
        """So many of those worked on need no further stage."""
        self.settled += turns
        self._open -= turns

    def enter(self, stage: str, requests: int, longest: int) -> None:
        """The next stage begins.

        Args:
            stage: its name.
            requests: responses that it writes.
            longest: tokens of one of them, at most.
        """
        self.stage, self.requests, self.done = stage, requests, 0
        self._most_tokens, self._tokens_before = requests * longest, self.tokens()
        self._number += 1

    def count(self, completions: Iterable[Completion]) -> Iterator[Completion]:
        """The completions, counted as they come."""
        for completion in completions:
            self.done += 1
            yield completion

    @property
    def share(self) -> float:
        """Of the work on the records at hand, 0 to 1; what later stages will cost is not known, so it is rough."""
        in_stage = 0.0
        if self.requests:  # where all responses are written side by side, the first one ends late
            in_stage = max(self.done / self.requests, (self.tokens() - self._tokens_before) / self._most_tokens)
        of_a_turn = min((max(self._number - 1, 0) + in_stage) / self.stages, 1.0)
        return min((self.settled + self._open * of_a_turn) / self.turns, 1.0) if self.turns else 0.0

    def describe(self) -> str:
        return f"{self.stage}, {self.done} of {self.requests}" if self.requests else self.stage
