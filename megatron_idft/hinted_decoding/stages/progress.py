"""How far the records at hand are, for who shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class StageProgress:
    """The records at hand, and the stages that their turns are in. Another thread may read it at any time.

    Attributes:
        stages: that a turn goes through at most; each counts as the same share of its work.
        tokens: how many the engine has decoded so far.
        records, turns: at hand.
        settled: turns of them that need no further stage.
        doing: in plain words, what is done meanwhile beside writing responses.
    """

    stages: int
    tokens: Callable[[], int]
    records: int = 0
    turns: int = 0
    settled: int = 0
    doing: str = ""
    _open: Counter[str] = field(default_factory=Counter)  # responses that stages still need
    _reached: dict[int, float] = field(default_factory=dict)  # of each record, stages that its turn has been through
    _portion: dict[int, float] = field(default_factory=dict)  # of a stage, that is one response of it

    def begin(self, records: int, turns: int) -> None:
        """So many more are at hand."""
        self.records += records
        self.turns += turns

    def end(self, records: int, turns: int) -> None:
        """So many are not at hand any more; all their turns are settled."""
        self.records -= records
        self.turns -= turns
        self.settled -= turns

    def settle(self, record: int, turns: int) -> None:
        """So many turns of a record need no further stage."""
        self.settled += turns
        self._reached.pop(record, None)
        self._portion.pop(record, None)

    def enter(self, record: int, stage: str, place: int, responses: int) -> None:
        """A turn comes to a stage, or to a further part of it.

        Args:
            record: its number.
            stage: its name.
            place: of the stage among those of a turn, from 0.
            responses: that the turn needs of it.
        """
        self._open[stage] += responses
        self._reached[record] = max(self._reached.get(record, 0.0), place)
        self._portion[record] = max(place + 1 - self._reached[record], 0.0) / responses

    def wrote(self, record: int, stage: str) -> None:
        """One of those responses is there."""
        self._open[stage] -= 1
        self._reached[record] += self._portion[record]

    @property
    def share(self) -> float:
        """Of the work on the records at hand, 0 to 1; what later stages will cost is not known, so it is rough."""
        if not self.turns:
            return 0.0
        begun = sum(list(self._reached.values())) / self.stages
        return min((self.settled + begun) / self.turns, 1.0)

    def describe(self) -> str:
        left = [f"{stage} ({count})" for stage, count in list(self._open.items()) if count]
        return self.doing or (f"to write: {', '.join(left)}" if left else "")
