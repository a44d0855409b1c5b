import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_idft.statistics import (
    LOWEST,
    TokenStatistics,
    centered_log_likelihood,
    merge_shard_states,
    neutral_shard_state,
)


def naive_state(logits: Tensor, target: Tensor, start: int) -> Tensor:
    """[T, 4] state of the columns `logits` [T, n] that begin at global id `start`, token by token."""
    rows = []
    for row, label in zip(logits.tolist(), target.tolist(), strict=True):
        maximum = max(row)
        exps = [math.exp(x - maximum) for x in row]
        shifted = sum(e * (x - maximum) for e, x in zip(exps, row, strict=True))
        rows.append([maximum, sum(exps), shifted, row[label - start] if start <= label < start + len(row) else LOWEST])
    return torch.tensor(rows, dtype=torch.float32)


def naive_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log_prob, entropy and log_sum_exp in float64."""
    log_probs = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, target[:, None])[:, 0], entropy, logits.double().logsumexp(-1)


@settings(deadline=None, max_examples=60)
@given(
    # 1 column per shard is the smallest a rank can hold; uneven shards do not occur in Megatron but must merge as well.
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    offset=st.sampled_from([0.0, 50.0, -300.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_merged_shards_equal_the_whole(widths: list[int], scale: float, offset: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocab = sum(widths)
    logits = torch.randn(5, vocab, generator=generator) * scale + offset
    target = torch.randint(0, vocab, (5,), generator=generator)
    starts = [sum(widths[:i]) for i in range(len(widths))]
    states = torch.stack([naive_state(logits[:, s : s + w], target, s) for s, w in zip(starts, widths, strict=True)])
    merged = merge_shard_states(states)
    log_prob, entropy, log_sum_exp = naive_statistics(logits, target)
    # fp32 states of logits around |offset|: the inputs' own rounding is 2^-24 |x|, and nothing may amplify it.
    tolerance = {"rtol": 1e-6, "atol": 2e-6}
    torch.testing.assert_close(merged.log_prob.double(), log_prob, **tolerance)
    torch.testing.assert_close(merged.entropy.double(), entropy, **tolerance)
    torch.testing.assert_close(merged.log_sum_exp.double(), log_sum_exp, **tolerance)


def test_a_shard_without_valid_columns_is_neutral_to_the_bit() -> None:
    logits, target = torch.randn(4, 6), torch.tensor([0, 5, 3, 1])
    state = naive_state(logits, target, 0)
    neutral = neutral_shard_state(target.shape, torch.device("cpu"))
    alone = merge_shard_states(state[None])
    for states in ([state, neutral], [neutral, state], [neutral, state, neutral, neutral]):
        for merged, expected in zip(merge_shard_states(torch.stack(states))[:4], alone[:4], strict=True):
            assert torch.equal(merged, expected)


def test_shards_far_apart_merge_without_nan() -> None:
    # The second shard has no weight at all next to the first; exp(m_r - M) underflows to 0.
    near, far = torch.tensor([[3.0, 1.0]]), torch.tensor([[-5e4, -6e4]])
    target = torch.tensor([0])
    merged = merge_shard_states(torch.stack([naive_state(near, target, 0), naive_state(far, target, 2)]))
    alone = merge_shard_states(naive_state(near, target, 0)[None])
    assert torch.equal(merged.log_prob, alone.log_prob) and torch.equal(merged.entropy, alone.entropy)


def test_a_row_without_distribution_is_nan_and_never_a_number() -> None:
    # All logits -inf: probabilities do not exist, and a finite loss would hide it.
    merged = merge_shard_states(neutral_shard_state(torch.Size([2]), torch.device("cpu"))[None])
    assert merged.log_prob.isnan().all() and merged.entropy.isnan().all()


@pytest.mark.parametrize("vocab", [1, 2, 1000])
def test_entropy_of_a_constant_row_is_the_log_of_its_length(vocab: int) -> None:
    merged = merge_shard_states(naive_state(torch.full((1, vocab), 7.0), torch.tensor([0]), 0)[None])
    assert merged.entropy.item() == pytest.approx(math.log(vocab), rel=1e-6, abs=1e-7)
    assert merged.log_prob.item() == pytest.approx(-math.log(vocab), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 20.0])  # from almost uniform to almost one-hot
def test_expected_cll_under_the_models_own_distribution_is_zero(scale: float) -> None:
    vocab = 97
    logits = (torch.randn(vocab, generator=torch.Generator().manual_seed(0)) * scale).expand(vocab, vocab)
    merged = merge_shard_states(naive_state(logits, torch.arange(vocab), 0)[None])  # row v asks for token v
    phi = centered_log_likelihood(merged.log_prob, merged.entropy).double()
    expectation = (merged.log_prob.double().exp() * phi).sum()
    assert abs(expectation.item()) < 2e-6  # fp32 rounding of log_prob, at most 2^-24 |log_prob| per unit of probability


def test_cll_is_log_prob_plus_entropy() -> None:
    statistics = TokenStatistics(torch.tensor([-2.0, 0.0]), torch.tensor([0.5, 0.0]), torch.tensor([3, -100]), 10)
    assert statistics.centered_log_likelihood.tolist() == [-1.5, 0.0]
