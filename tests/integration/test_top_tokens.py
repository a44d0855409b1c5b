"""The most probable tokens from a vocabulary over ranks: exact, with one order among equals, whatever the split."""

import pytest
import torch

from megatron_idft.integration.offline import top_tokens as module
from megatron_idft.integration.offline.top_tokens import top_tokens
from tests.ranks import run_ranks

VOCAB, PADDED, TOP_K = 20, 32, 7


def logits(dtype):
    """[5, 2, PADDED] with many equal numbers, two zeros of other signs, and padding above everything else."""
    values = torch.randn(5, 2, PADDED, generator=torch.Generator().manual_seed(1)).mul(2).round().to(dtype)
    values[0, 0] = 0.0
    values[0, 0, ::2] = -0.0
    values[..., VOCAB:] = 100
    values[4, 1, :VOCAB] = -torch.arange(VOCAB, dtype=dtype)  # the whole K on one rank
    return values


def expected(values):
    rows = values.double()[..., :VOCAB]
    order = torch.stack(
        [torch.tensor(sorted(range(VOCAB), key=lambda i: (-row[i].item(), i))) for row in rows.flatten(0, 1)]
    )
    ids = order[:, :TOP_K].view(*values.shape[:-1], TOP_K)
    return ids, rows.log_softmax(-1).gather(-1, ids)


def of_this_rank(dtype, block_bytes):
    module._BLOCK_BYTES = block_bytes
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    shard = logits(dtype).chunk(torch.distributed.get_world_size(), -1)[rank]
    return top_tokens(shard, TOP_K, tp_group=group, vocab_size=VOCAB, backend="reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_the_whole_vocabulary_under_every_split(dtype):
    ids, log_prob = expected(logits(dtype))
    one = top_tokens(logits(dtype), TOP_K, tp_group=None, vocab_size=VOCAB, backend="reference")
    many = run_ranks(of_this_rank, 2, dtype, 1 << 26) + run_ranks(of_this_rank, 4, dtype, 1)
    for found in (one, *many):  # of four shards one has fewer tokens than K, and one none at all
        assert torch.equal(found[0], ids)
        torch.testing.assert_close(found[1].double(), log_prob, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(found[1], many[0][1]) for found in many[:2])
    assert ids[0, 0].tolist() == list(range(TOP_K)), "the two zeros are one number"
