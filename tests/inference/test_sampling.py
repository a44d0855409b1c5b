"""`choose` against dense float64 arithmetic, with the vocabulary in one piece and in shards of uneven use."""

import numpy as np
import pytest
import torch

from megatron_idft.inference.draws import draw
from megatron_idft.inference.requests import Sampling
from megatron_idft.inference.sampling import choose
from megatron_idft.loss.shard import vocab_shard
from tests.inference import reference_decoding as reference
from tests.ranks import run_ranks

ROWS, PEAKED = 60, 40
SAMPLINGS = [
    Sampling(0.0),
    Sampling(1.0),
    Sampling(0.3),
    Sampling(0.3, top_p=0.95, cut_before_temperature=True),
    Sampling(0.3, top_p=0.95),
    Sampling(2.0, top_p=0.5, cut_before_temperature=True),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=7),
    Sampling(0.7, top_p=0.9, top_k=20, cut_before_temperature=True),
    Sampling(1.0, top_p=1.0, top_k=10_000),
]


def scores_and_draws(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    # From nearly uniform rows to nearly certain ones, and one with equal largest values in different shards.
    scores = torch.randn(ROWS, vocab, generator=generator) * torch.logspace(-2, 1.5, ROWS)[:, None]
    scores[0] = 0.0
    scores[1, [0, vocab // 2, vocab - 1]] = 50.0
    scores[2, 1:] = -1e30
    return scores, torch.tensor([draw(1, f"row {i}", 0) for i in range(ROWS)], dtype=torch.float64)


def tokens_of(vocab: int, padded: int, candidates: int) -> list[tuple[list[int], list[float]]]:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    group = torch.distributed.group.WORLD if world > 1 else None
    shard, _ = vocab_shard(padded // world, vocab, group)
    scores, draws = scores_and_draws(vocab)
    mine = scores[:, shard.start : shard.start + shard.valid_columns]
    found = []
    for sampling in SAMPLINGS:
        # The flat rows need the whole vocabulary, the peaked ones a few candidates.
        parts = [
            choose(mine[rows].clone(), mine[rows] * 2, sampling, draws[rows], shard, candidates=candidates)
            for rows in (slice(0, PEAKED), slice(PEAKED, ROWS))
        ]
        found.append(([t for p in parts for t in p.tokens.tolist()], [x for p in parts for x in p.log_prob.tolist()]))
    return found


@pytest.mark.parametrize("candidates", [1, 8, 1000])
@pytest.mark.parametrize(("world", "vocab", "padded"), [(1, 300, 300), (2, 300, 384), (4, 257, 512), (4, 8, 8)])
def test_tokens_are_those_of_the_dense_distribution(world, vocab, padded, candidates):
    if world == 1:
        results = [tokens_of(vocab, padded, candidates)]
    else:
        results = run_ranks(tokens_of, world, vocab, padded, candidates)
    assert all(result == results[0] for result in results)
    scores, draws = scores_and_draws(vocab)
    for sampling, (tokens, log_probs) in zip(SAMPLINGS, results[0], strict=True):
        for row in range(ROWS):
            probs = reference.cut_and_temper(
                scores[row].double().numpy(),
                sampling.temperature,
                sampling.top_p,
                sampling.top_k,
                sampling.cut_before_temperature,
            )
            wanted = reference.invert(probs, float(draws[row]))
            assert tokens[row] == wanted, (sampling, row)
            assert log_probs[row] == pytest.approx(2 * float(scores[row, wanted]), rel=1e-6)


def test_of_equal_tokens_the_first_is_taken_and_ties_are_cut_in_the_order_of_ids():
    scores = torch.zeros(2, 10)
    shard, _ = vocab_shard(10, None, None)
    draws = torch.tensor([0.0, 0.999], dtype=torch.float64)
    assert choose(scores, scores, Sampling(0.0), draws, shard).tokens.tolist() == [0, 0]
    assert choose(scores, scores, Sampling(1.0, top_k=4), draws, shard).tokens.tolist() == [0, 3]
    assert choose(scores, scores, Sampling(1.0, top_p=0.35), draws, shard).tokens.tolist() == [0, 3]


def test_draws_depend_on_seed_id_and_step_only_and_are_uniform():
    draws = np.array([draw(1, f"record {i}", step) for i in range(300) for step in range(10)])
    assert ((draws >= 0) & (draws < 1)).all() and len(set(draws)) == len(draws)
    counts, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert ((counts - 300) ** 2 / 300).sum() < 27.9  # chi-square with 9 degrees of freedom, p = 0.001
    assert len({draw(*key) for key in ((1, "a", 2), (2, "a", 2), (1, "b", 2), (1, "a", 3))}) == 4


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
