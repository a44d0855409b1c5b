"""Blocks of keys and values: the allocator and the scheduler without tensors, and a CPU's attention over blocks."""

import numpy as np
import pytest
import torch

from megatron_idft.inference.block_runs import BlockRuns
from megatron_idft.inference.blocks import NOBODYS, BlockPool, Row
from megatron_idft.inference.requests import DecodeSettings, Request, Sampling, Stopping
from megatron_idft.inference.scheduler import Response, Scheduler

SIZE = 4


def opened(pool, tokens, drawn=()):
    row = Row(np.array(tokens), list(drawn))
    assert pool.fits([row], 0)
    pool.open(row)
    return row


def decode(pool, row, token):
    assert pool.grow(row)
    row.drawn.append(token)
    pool.advance(row)


def test_a_row_takes_a_block_when_it_needs_one_and_gives_all_back():
    pool = BlockPool(10, SIZE)
    row = opened(pool, [1, 2, 3, 4])  # three before the first step, whose token goes to the fourth position
    assert len(row.blocks) == 1 and pool.used == 1 and row.length == 3
    for token in range(5):
        decode(pool, row, token)
    assert row.length == 8 and len(row.blocks) == 2
    assert pool.grow(row) and len(row.blocks) == 3
    assert NOBODYS not in row.blocks and len(set(row.blocks)) == 3
    pool.close(row)
    assert pool.used == 0 and pool.available == 9


def test_rows_that_begin_alike_hold_the_same_full_blocks_and_copy_the_tail():
    pool = BlockPool(30, SIZE)
    prompt = list(range(11))
    first = opened(pool, prompt)
    second = opened(pool, prompt)  # while the first is being computed: nothing is left to compute
    assert second.blocks[:2] == first.blocks[:2] and second.blocks[2] != first.blocks[2]
    assert second.found == 10 and second.awaited
    assert second.copy == (first.blocks[2], second.blocks[2], 2, False)
    other = opened(pool, [*range(8), 50, 51])
    assert other.blocks[:2] == first.blocks[:2] and other.found == 8 and other.copy is None and other.awaited
    pool.computed()
    third = opened(pool, [*prompt, 60])  # one token more is there than the first's prompt had
    assert third.found == 8 and third.copy is None and not third.awaited, "two tokens are not worth a copy"
    for row in (first, second, other):
        pool.close(row)
    again = opened(pool, prompt)  # from what no row holds any more
    assert again.found == 10 and again.copy is not None and again.copy.computed
    assert pool.prompt_tokens == 10 + 10 + 9 + 11 + 10 and pool.found_tokens == 0 + 10 + 8 + 8 + 10


def test_a_long_common_part_of_a_block_is_copied_once_it_is_computed():
    pool = BlockPool(30, 64)
    first = opened(pool, [*range(40), 90, 91])
    waits = opened(pool, [*range(40), 80, 81])
    assert waits.found == 0, "both go through the model together"
    pool.computed()
    copies = opened(pool, [*range(40), 70, 71])
    assert copies.found == 40 and copies.copy is not None and copies.copy.source in (*first.blocks, *waits.blocks)


def test_what_a_row_wrote_itself_is_found_again():
    pool = BlockPool(30, SIZE)
    row = opened(pool, [1, 2, 3])
    pool.computed()
    for token in range(10, 20):
        decode(pool, row, token)
    written = list(row.blocks)
    pool.close(row)
    again = opened(pool, [1, 2, 3, *range(10, 20)])
    assert again.found == 12 and again.blocks[:3] == written[:3]


def test_known_contents_give_way_least_recently_used_first_and_weights_that_change_end_them():
    pool = BlockPool(7, SIZE)
    for start in (0, 100, 200):
        row = opened(pool, range(start, start + 6))
        pool.computed()
        pool.close(row)
    assert pool.used == 0 and pool.available == 6
    assert opened(pool, range(100, 106)).found == 5
    taken = opened(pool, range(300, 313))  # four blocks: those of the first prompt go, and of the last
    assert taken.found == 0
    pool.close(taken)
    assert opened(pool, range(6)).found == 0
    pool.forget()
    assert opened(pool, range(100, 106)).found == 0


def test_rows_with_the_same_tokens_after_different_beginnings_share_nothing():
    pool = BlockPool(30, SIZE)
    opened(pool, [9, 9, 9, 9, 1, 2, 3, 4, 5])
    assert opened(pool, [8, 8, 8, 8, 1, 2, 3, 4, 5]).found == 0


def settings(max_tokens):
    return DecodeSettings(Sampling(0), Stopping((), max_tokens))


def run(pool, requests, lengths, max_rows=100):
    """Decode `requests` without a model, each to its length; rows at once in each step, and how many gave way."""
    pending = iter(requests)
    scheduler = Scheduler(pool, max_rows, lambda number, request: Response(number, request, settings(10**6), 10**6))
    counts, done = [], []
    while True:
        oldest = scheduler.running[:1]
        scheduler.grow()
        assert scheduler.running[:1] == oldest, "the oldest never gives way"
        scheduler.admit(lambda: next(pending, None))
        pool.computed()
        running = list(scheduler.running)
        if not running:
            return counts, done, scheduler.preempted
        held = {block for response in running for row in response.rows() for block in row.blocks}
        assert pool.used == len(held)
        assert [response.number for response in running] == sorted(response.number for response in running)
        counts.append(sum(1 for response in running for _ in response.rows()))
        for response in running:
            response.tokens.append(len(response.tokens))
            scheduler.advance(response)
            if len(response.tokens) == lengths[response.request.id]:
                scheduler.finish(response)
                done.append(response.request.id)


@pytest.mark.parametrize("hinted", [False, True])
def test_every_response_ends_where_the_blocks_run_out_and_pairs_give_way_whole(hinted):
    rng = np.random.default_rng(0)
    requests = [
        Request(str(i), rng.integers(0, 9, 7), rng.integers(0, 9, 12) if hinted else None, settings=settings(99))
        for i in range(20)
    ]
    lengths = {request.id: int(rng.integers(1, 40)) for request in requests}
    blocks = 1 + 2 * -(-(12 + 40) // SIZE)  # the longest pair, by itself
    pool = BlockPool(blocks, SIZE)
    counts, done, preempted = run(pool, requests, lengths)
    assert sorted(done, key=int) == [request.id for request in requests]
    assert preempted > 0 and max(counts) > 2
    assert pool.used == 0
    free, _, never = run(BlockPool(2000, SIZE), requests, lengths)
    assert never == 0 and len(free) < len(counts)


def expected(query, keys, values, tables, lengths, scale):
    found = []
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        k, v = (x[torch.from_numpy(table).long()].flatten(0, 1)[: length + 1].double() for x in (keys, values))
        scores = torch.einsum("hgd,lhd->hgl", query[row].double(), k) * scale
        found.append(torch.einsum("hgl,lhd->hgd", scores.softmax(-1), v).flatten())
    return torch.stack(found)


@pytest.mark.parametrize("case", ["mixed", "one block each", "all shared"])
def test_attention_over_runs_of_blocks_equals_float64(case):
    torch.manual_seed(0)
    size, kv_heads, group, d = 8, 3, 2, 16
    tables, lengths = {
        # blocks out of order, held by one, two and three rows, with blocks of nobody between them
        "mixed": ([[4, 5, 9], [4, 5, 7, 2], [4, 11], [13], [12, 3]], [17, 30, 8, 0, 15]),
        "one block each": ([[3], [1], [2]], [7, 0, 3]),
        "all shared": ([[1, 2, 3], [1, 2, 4], [1, 2, 5]], [16, 23, 17]),
    }[case]
    tables = [np.array(table, dtype=np.int32) for table in tables]
    keys, values = torch.randn(2, 15, size, kv_heads, d)
    query = torch.randn(len(tables), kv_heads, group, d)
    used = {int(block) for table in tables for block in table}
    for block in set(range(15)) - used:
        keys[block] = values[block] = torch.nan  # not even looked at
    found = BlockRuns(tables, np.array(lengths), size, torch.float32).attend(query, keys, values, 0.3)
    wanted = expected(query, keys, values, tables, lengths, 0.3)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
