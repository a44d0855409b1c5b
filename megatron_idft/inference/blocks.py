"""Which row holds which blocks of the keys and values, and whose contents are known: the allocator, without a tensor.

A row takes blocks as it grows and gives them back when it ends. What a full block holds is known by a digest of its
tokens and of all before them, so a row whose prompt begins alike holds the same blocks; the last, partly filled block
of a prompt is copied instead. Contents outlive their rows while no other row needs the room: the block that was used
least recently is given away first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NOBODYS = 0  # the block that is no row's: what only fills a batch is written there
_ROOT = b""  # before the first block
_LEAST_COPIED = 16  # tokens; fewer are computed as fast
_EMPTY = np.zeros(0, dtype=np.int32)
_COMPARED = 16  # blocks that continue one beginning, of which the longest common part is looked for


class Copy(NamedTuple):
    """The first `positions` positions of block `source` go to block `target`; whether they are there already."""

    source: int
    target: int
    positions: int
    computed: bool


class Row:
    """One stream of a response.

    Attributes:
        prompt: int32, what the row begins with.
        drawn: the tokens after it, a list that its owner appends to.
        length: so many positions hold keys and values; the next token goes to this one.
        blocks: in the order of positions.
        found: so many leading positions were found or are copied, not computed.
        awaited: whether some of those are still being computed, for a row that was opened just before.
        copy: of the last of them; None where there is nothing to copy.
    """

    __slots__ = ("_table", "awaited", "blocks", "copy", "digest", "drawn", "found", "length", "prompt")

    def __init__(self, prompt: NDArray[np.integer], drawn: list[int]) -> None:
        self.prompt, self.drawn = np.ascontiguousarray(prompt, dtype=np.int32), drawn
        self.length = len(prompt) + len(drawn) - 1
        self.blocks: list[int] = []
        self.digest = _ROOT  # of the full blocks
        self.found, self.awaited = 0, False
        self.copy: Copy | None = None
        self._table = _EMPTY

    @property
    def table(self) -> NDArray[np.int32]:
        """`blocks` as an array."""
        if len(self._table) != len(self.blocks):
            self._table = np.array(self.blocks, dtype=np.int32)
        return self._table

    def tokens(self, begin: int = 0, end: int | None = None) -> NDArray[np.int32]:
        prompt = len(self.prompt)
        if end is not None and end <= prompt:
            return self.prompt[begin:end]
        drawn = self.drawn[max(begin - prompt, 0) : None if end is None else end - prompt]
        return np.concatenate([self.prompt[begin:], np.array(drawn, dtype=np.int32)])


@dataclass(slots=True)
class _Contents:
    """Of a block. parent: the digest of what stands before it. digest, tails: the names it is found by."""

    parent: bytes
    tokens: NDArray[np.int32]
    digest: bytes | None = None
    tails: list[tuple[bytes, bytes]] = field(default_factory=list)


class BlockPool:
    """`blocks` blocks of `size` positions, of which rows may hold all but one.

    Attributes:
        prompt_tokens, found_tokens: of all rows so far: how many tokens stood before the first one fed, and how many of
            them had been computed for an earlier row.
    """

    def __init__(self, blocks: int, size: int) -> None:
        self.blocks, self.size = blocks, size
        self.prompt_tokens = self.found_tokens = 0
        self._users: NDArray[np.int32] = np.zeros(blocks, dtype=np.int32)
        self._free: NDArray[np.bool_] = np.ones(blocks, dtype=np.bool_)
        self._free[NOBODYS] = False
        self._num_free = blocks - 1
        self._idle: OrderedDict[int, None] = OrderedDict()  # known contents of no row, least recently used first
        self._contents: dict[int, _Contents] = {}
        self._by_digest: dict[bytes, int] = {}
        self._by_tail: dict[tuple[bytes, bytes], int] = {}
        self._children: dict[bytes, dict[int, None]] = {}  # digest -> blocks that come after it, the latest last
        self._awaited: set[int] = set()

    @property
    def available(self) -> int:
        """Blocks that the next rows can have."""
        return self._num_free + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that rows hold."""
        return self.blocks - 1 - self.available

    def needed(self, positions: int) -> int:
        """Blocks for so many positions."""
        return -(-positions // self.size)

    def fits(self, rows: Sequence[Row], spare: int) -> bool:
        """Whether `open` can give all these rows their blocks, so that `spare` others are left."""
        need = 0
        found: set[int] = set()
        for row in rows:
            blocks, _ = self._find_full(row.tokens()[:-1])
            need += self.needed(row.length + 1) - len(blocks)
            found.update(block for block in blocks if block in self._idle)
        return need + spare <= self.available - len(found)

    def open(self, row: Row) -> None:
        """Give a row its blocks for all its tokens; `fits` must have said so."""
        before = row.tokens()[:-1]
        row.blocks, row.digest = self._find_full(before)
        row.awaited = not self._awaited.isdisjoint(row.blocks)
        for block in row.blocks:
            self._hold(block)
        shared = len(row.blocks)
        full, rest = divmod(len(before), self.size)
        tail = self._find_tail(row.digest, before[shared * self.size :])
        if tail is not None:
            self._hold(tail[0])  # until it is known what is taken, which must not be this one
            if self.available < self.needed(row.length + 1) - shared:
                self._let_go(tail[0])
                tail = None
        row.blocks += self._take(full - shared, top=True)
        row.blocks += self._take(self.needed(row.length + 1) - len(row.blocks))
        row.found, row.copy = shared * self.size, None
        if tail is not None:
            source, count = tail
            row.copy = Copy(source, row.blocks[shared], count, source not in self._awaited)
            row.found += count
            self._let_go(source)
        self._awaited.update(row.blocks[shared:])
        for number in range(shared, full):
            self._know(row, number)
        if rest:
            self._know_tail(row, full, before[full * self.size :])
        self.prompt_tokens += len(before)
        self.found_tokens += row.found

    def computed(self) -> None:
        """The keys and values of all rows that were opened are there now."""
        self._awaited.clear()

    def grow(self, row: Row) -> bool:
        """Have room for the next token of a row. False: there is none."""
        if row.length < len(row.blocks) * self.size:
            return True
        if not self.available:
            return False
        row.blocks += self._take(1)
        return True

    def advance(self, row: Row) -> None:
        """The token at `row.length` has been fed, and `row.drawn` holds the one after it."""
        row.length += 1
        if row.length % self.size == 0:
            self._know(row, row.length // self.size - 1)

    def close(self, row: Row) -> None:
        """Take a row's blocks back."""
        for block in reversed(row.blocks):  # the last ones are given away before those that they continue
            self._let_go(block)
        row.blocks = []

    def forget_awaited(self) -> None:
        """What was opened last may not have been computed: forget all contents if so."""
        if self._awaited:
            self.forget()

    def forget(self) -> None:
        """No contents are known any more."""
        self._awaited.clear()
        for block in list(self._contents):
            self._forget(block)
        for block in self._idle:
            self._free[block] = True
        self._num_free += len(self._idle)
        self._idle.clear()

    def _find_full(self, tokens: NDArray[np.int32]) -> tuple[list[int], bytes]:
        """The known blocks that `tokens` begin with, and their digest."""
        blocks, digest = [], _ROOT
        for begin in range(0, len(tokens) - self.size + 1, self.size):
            longer = _digest(digest, tokens[begin : begin + self.size])
            block = self._by_digest.get(longer)
            if block is None:
                break
            blocks.append(block)
            digest = longer
        return blocks, digest

    def _find_tail(self, parent: bytes, tokens: NDArray[np.int32]) -> tuple[int, int] | None:
        """A block that begins as `tokens` do, and how far.

        One that is still being computed counts only if nothing is left to compute then: all others of a prefill go
        through the model together.
        """
        if len(tokens) < self.size:
            block = self._by_tail.get((parent, tokens.tobytes()))
            if block is not None:
                return block, len(tokens)
        best: tuple[int, int] | None = None
        for block in islice(reversed(self._children.get(parent, {})), _COMPARED):
            if block not in self._awaited:
                count = _common(self._contents[block].tokens, tokens)
                if count >= _LEAST_COPIED and (best is None or count > best[1]):
                    best = block, count
        return best

    def _take(self, count: int, top: bool = False) -> list[int]:
        """Blocks for a row to write. Those of prompts come from the top, so that the ones that grow lie together."""
        if count <= 0:
            return []
        free = np.flatnonzero(self._free)
        taken: list[int] = (free[::-1][:count] if top else free[:count]).tolist()
        self._free[taken] = False
        self._num_free -= len(taken)
        while len(taken) < count:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
            taken.append(block)
        self._users[taken] = 1
        return taken

    def _hold(self, block: int) -> None:
        self._users[block] += 1
        self._idle.pop(block, None)

    def _let_go(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block]:
            return
        if block in self._contents:
            self._idle[block] = None
        else:
            self._free[block] = True
            self._num_free += 1

    def _know(self, row: Row, number: int) -> None:
        """The row's block of this number is full, and all before it are known."""
        tokens, block = row.tokens(number * self.size, (number + 1) * self.size), row.blocks[number]
        parent, row.digest = row.digest, _digest(row.digest, tokens)
        if row.digest not in self._by_digest:
            contents = self._remember(block, parent, tokens)
            contents.digest = row.digest
            self._by_digest[row.digest] = block

    def _know_tail(self, row: Row, number: int, tokens: NDArray[np.int32]) -> None:
        """The row's block of this number begins with these."""
        name = row.digest, tokens.tobytes()
        if name not in self._by_tail:
            block = row.blocks[number]
            self._remember(block, row.digest, tokens).tails.append(name)
            self._by_tail[name] = block

    def _remember(self, block: int, parent: bytes, tokens: NDArray[np.int32]) -> _Contents:
        contents = self._contents.setdefault(block, _Contents(parent, tokens))
        contents.tokens = tokens
        self._children.setdefault(parent, {})[block] = None
        return contents

    def _forget(self, block: int) -> None:
        contents = self._contents.pop(block)
        if contents.digest is not None:
            del self._by_digest[contents.digest]
        for name in contents.tails:
            del self._by_tail[name]
        siblings = self._children[contents.parent]
        del siblings[block]
        if not siblings:
            del self._children[contents.parent]


def _digest(parent: bytes, tokens: NDArray[np.int32]) -> bytes:
    return blake2b(parent + tokens.tobytes(), digest_size=16).digest()


def _common(known: NDArray[np.int32], tokens: NDArray[np.int32]) -> int:
    """How many leading tokens are the same."""
    n = min(len(known), len(tokens))
    different = np.flatnonzero(known[:n] != tokens[:n])
    return int(different[0]) if len(different) else n
