"""How far the records at hand are, for who shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megatron_idft.inference.requests import Completion


@dataclass(slots=True)
class StageProgress:
    """The stage that is run now, and the turns of the records at hand. Another thread may read it at any time.

    Attributes:
        stages: that a turn goes through at most; each counts as the same share of its work.
        tokens: how many the engine has decoded so far.
        turns: of the records at hand.
        settled: turns that need no further stage.
        stage: in plain words; empty between calls.
        requests, done: responses that the stage writes, and those that it has.
    """

    stages: int
    tokens: Callable[[], int]
    turns: int = 0
    settled: int = 0
    stage: str = ""
    requests: int = 0
    done: int = 0
    _place: int = 0
    _here: int = 0
    _elsewhere: int = 0
    _most_tokens: int = 0
    _tokens_before: int = 0
    _reached: float = 0.0

    def begin(self, turns: int) -> None:
        """Records with so many turns are at hand now; none with 0."""
        self.turns, self.settled, self.stage = turns, 0, ""
        self._here = self._elsewhere = self._place = self.requests = self.done = 0
        self._reached = 0.0

    def settle(self, turns: int) -> None:
        """So many turns need no further stage."""
        self.settled += turns
        self._here = max(self._here - turns, 0)

    def enter(self, stage: str, place: int, turns: int, requests: int, longest: int, elsewhere: int) -> None:
        """A stage begins, or is run once more for some of its turns.

        Args:
            stage: its name.
            place: of the stage among those of a turn, from 0.
            turns: that are in this stage.
            requests: responses that they need of it.
            longest: tokens of one of them, at most.
            elsewhere: the number of stages that the other turns have been through, those without settled ones.
        """
        self._reached = self.share
        self.stage, self.requests, self.done = stage, requests, 0
        self._most_tokens, self._tokens_before = requests * longest, self.tokens()
        self._place, self._here, self._elsewhere = place, turns, elsewhere

    def count(self, completions: Iterable[Completion]) -> Iterator[Completion]:
        """The completions, counted as they come."""
        for completion in completions:
            self.done += 1
            yield completion

    @property
    def share(self) -> float:
        """Of the work on the records at hand, 0 to 1; what later stages will cost is not known, so it is rough."""
        if not self.turns:
            return 0.0
        in_stage = 0.0
        if self.requests:  # where all responses are written side by side, the first one ends late
            in_stage = max(self.done / self.requests, (self.tokens() - self._tokens_before) / self._most_tokens)
        begun = (self._elsewhere + self._here * (self._place + min(in_stage, 1.0))) / self.stages
        return max(self._reached, min((self.settled + begun) / self.turns, 1.0))

    def describe(self) -> str:
        return f"{self.stage}, {self.done} of {self.requests}" if self.requests else self.stage
