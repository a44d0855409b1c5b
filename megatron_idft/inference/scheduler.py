"""Which responses are decoded now: they start while there are rows and blocks for them, and give way where not.

Nothing is set aside for how long a response may become. Where the blocks run out the youngest response gives up its
own, both rows at once, and comes back before any new one: what it has drawn stays, its keys and values are computed
again. The oldest never gives way, so every response ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from megatron_idft.inference.blocks import BlockPool, Row
from megatron_idft.inference.requests import DecodeSettings, Request

# Asked whenever there is room for another response; None: there is nothing for now.
Feed = Callable[[], Request | None]


class Response:
    """One in the making.

    Attributes:
        number: how many began before it.
        max_tokens: the longest that it may become.
        plain, hinted: its rows; hinted None where only the plain stream runs.
        values: of each token: log_prob, entropy, hint share, hinted entropy.
        tail: text of the last tokens, where a splitter is looked for.
        split_at: after so many tokens it was found.
    """

    __slots__ = (
        "hinted",
        "max_tokens",
        "number",
        "plain",
        "request",
        "settings",
        "split_at",
        "tail",
        "tokens",
        "values",
    )

    def __init__(self, number: int, request: Request, settings: DecodeSettings, max_tokens: int) -> None:
        self.number, self.request, self.settings, self.max_tokens = number, request, settings, max_tokens
        self.tokens: list[int] = []
        self.values: list[NDArray[np.float64]] = []
        self.tail = ""
        self.split_at: int | None = None
        self.plain: Row
        self.hinted: Row | None
        self.make_rows()

    def make_rows(self) -> None:
        """Rows that hold no block yet, for the prompts and the tokens so far."""
        self.plain, self.hinted = Row(self.request.prompt, self.tokens), None
        if self.request.hinted_prompt is not None and self.split_at is None:
            self.hinted = Row(self.request.hinted_prompt, self.tokens)

    def rows(self) -> Iterator[Row]:
        yield self.plain
        if self.hinted is not None:
            yield self.hinted


class Scheduler:
    """Responses, and the blocks that their rows hold. The same calls have the same results on every rank.

    Args:
        max_rows: responses at once. An eighth more may go on after their splitter, without the hint.
        accept: makes a response of a request, or refuses it; is given its number.

    Attributes:
        running: from the oldest to the youngest.
        preempted: how often a response gave way.
    """

    def __init__(self, pool: BlockPool, max_rows: int, accept: Callable[[int, Request], Response]) -> None:
        self.pool, self.max_rows, self._accept = pool, max_rows, accept
        self.running: list[Response] = []
        self.preempted = 0
        self._waiting: deque[Response] = deque()  # those that gave way, then one that there was no room for
        self._number = 0

    def grow(self) -> None:
        """Have a block for the next token of each running row; the youngest responses give way where there is none."""
        for response in list(self.running):
            for row in response.rows():
                while row.blocks and not self.pool.grow(row):
                    self._preempt(self.running[-1])

    def admit(self, feed: Feed) -> list[Row]:
        """Start responses while there is room, and return their rows in the order in which they were opened."""
        opened: list[Row] = []
        while self._has_rows() and (response := self._next(feed)) is not None:
            rows = list(response.rows())
            running = sum(1 for other in self.running for _ in other.rows())
            # A block for each running row, so that a new one does not have to give way at once.
            if not self.pool.fits(rows, spare=running):
                self._waiting.appendleft(response)
                break
            for row in rows:
                self.pool.open(row)
            opened += rows
            self.running.append(response)
        self.running.sort(key=lambda response: response.number)
        return opened

    def advance(self, response: Response) -> None:
        """Its next token stands in `response.tokens`."""
        for row in response.rows():
            self.pool.advance(row)

    def drop_hint(self, response: Response) -> None:
        """The plain stream goes on by itself."""
        if response.hinted is not None:
            self.pool.close(response.hinted)
            response.hinted = None

    def finish(self, response: Response) -> None:
        self._close(response)
        self.running.remove(response)

    def abandon(self) -> None:
        """Give back all blocks, wherever the work was left."""
        for response in self.running:
            self._close(response)
        self.running, self._waiting = [], deque()
        self.pool.forget_awaited()

    def _has_rows(self) -> bool:
        split = sum(response.split_at is not None for response in self.running)
        return len(self.running) - min(split, self.max_rows // 8) < self.max_rows

    def _next(self, feed: Feed) -> Response | None:
        if self._waiting:
            return self._waiting.popleft()
        request = feed()
        if request is None:
            return None
        self._number += 1
        return self._accept(self._number, request)

    def _preempt(self, response: Response) -> None:
        self.finish(response)
        response.make_rows()
        self._waiting.appendleft(response)
        self.preempted += 1

    def _close(self, response: Response) -> None:
        for row in response.rows():
            self.pool.close(row)
