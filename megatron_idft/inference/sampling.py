"""Tokens from a distribution whose vocabulary is split over tensor-parallel ranks; the vocabulary is never gathered.

Every draw is the inversion of the cumulative distribution, in the order of token ids, by one uniform number (draws.py).
What ranks exchange per row: a few numbers, or with top-p or top-k the largest candidates of each shard. Every rank
computes the same tokens from the same exchanged bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_idft.inference.requests import Sampling
from megatron_idft.loss.shard import VocabShard

_FIRST_CANDIDATES = 128  # of each shard; four times as many until they are enough


class Chosen:
    """tokens: int64 [n]. log_prob: float64 [n], of the token in `log_probs`. Both the same on every rank."""

    __slots__ = ("log_prob", "tokens")

    def __init__(self, tokens: Tensor, log_prob: Tensor) -> None:
        self.tokens, self.log_prob = tokens, log_prob


def choose(
    scores: Tensor,
    log_probs: Tensor,
    sampling: Sampling,
    draws: Tensor,
    shard: VocabShard,
    *,
    candidates: int = _FIRST_CANDIDATES,
) -> Chosen:
    """One token per row, with probability proportional to exp(scores), cut and tempered as `sampling` says.

    Args:
        scores, log_probs: fp32 [n, valid columns of this shard], finite; log_probs is only looked up at the token.
        draws: float64 [n] in [0, 1).
        candidates: how many of a shard's largest are looked at first for top-p and top-k. The result does not depend on
            it: where they turn out not to hold the whole cut, more are taken.

    Collectives: one all-gather for temperature 0, two for the whole distribution, one or more for a cut one. With a cut
    there is one synchronisation with the host.
    """
    if sampling.temperature == 0:
        return _largest(scores, log_probs, shard)
    if not sampling.cuts:
        return _from_all(scores, log_probs, sampling.temperature, draws, shard)
    while True:
        chosen = _from_candidates(scores, log_probs, sampling, draws, shard, candidates)
        if chosen is not None:
            return chosen
        candidates *= 4


def _largest(scores: Tensor, log_probs: Tensor, shard: VocabShard) -> Chosen:
    packet = scores.new_zeros(len(scores), 3, dtype=torch.float64)
    packet[:, 0] = -torch.inf
    if scores.shape[1]:
        index = scores.argmax(-1, keepdim=True)  # of equals the first
        packet = torch.cat([scores.gather(1, index), index + shard.start, log_probs.gather(1, index)], -1).double()
    gathered = shard.gather_states(packet)  # [R, n, 3]
    rank = gathered[..., 0].argmax(0, keepdim=True)  # the first of equals: the smaller id
    _, token, log_prob = gathered.gather(0, rank.unsqueeze(-1).expand(-1, -1, 3))[0].unbind(-1)
    return Chosen(token.long(), log_prob)


def _from_all(scores: Tensor, log_probs: Tensor, temperature: float, draws: Tensor, shard: VocabShard) -> Chosen:
    maximum = scores.new_full((len(scores),), -torch.inf, dtype=torch.float64)
    weights = scores.double() / temperature
    if scores.shape[1]:
        maximum = weights.amax(-1)
        weights = (weights - maximum.unsqueeze(1)).exp_()
    cumulative = weights.cumsum(-1)
    mass = cumulative[:, -1] if scores.shape[1] else torch.zeros_like(maximum)
    states = shard.gather_states(torch.stack([maximum, mass], -1))  # [R, n, 2]
    masses = states[..., 1] * (states[..., 0] - states[..., 0].amax(0)).exp()
    ends = masses.cumsum(0)
    total = ends[-1]
    target = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    owner = (ends <= target).sum(0)  # [n]
    mine = shard.tp_group.rank() if shard.tp_group is not None else 0
    packet = torch.zeros(len(scores), 2, dtype=torch.float64, device=scores.device)
    if scores.shape[1]:
        # The target within this shard, in units of its own largest weight.
        begin = ends[mine] - masses[mine]
        inside = (target - begin) / masses[mine].clamp_min(1e-300) * mass
        index = (cumulative <= inside.unsqueeze(1)).sum(-1).clamp_(max=scores.shape[1] - 1)
        found = torch.stack([index + shard.start, log_probs.gather(1, index[:, None])[:, 0]], -1).double()
        packet = found * (owner == mine).unsqueeze(1)
    token, log_prob = shard.gather_states(packet).sum(0).unbind(-1)
    return Chosen(token.long(), log_prob)


def _from_candidates(
    scores: Tensor, log_probs: Tensor, sampling: Sampling, draws: Tensor, shard: VocabShard, count: int
) -> Chosen | None:
    """None where the candidates do not hold the whole cut for certain."""
    n, columns = scores.shape
    exhaustive = count >= columns
    # Every shard sends as much, also one that has fewer columns of the true vocabulary.
    packet = scores.new_zeros(n, 3 * count + 3, dtype=torch.float64)
    value, token, log_prob = (packet[:, i * count : (i + 1) * count] for i in range(3))
    maximum, mass, smallest = (packet[:, 3 * count + i] for i in range(3))
    value.fill_(-torch.inf)
    maximum.fill_(-torch.inf)
    smallest.fill_(-torch.inf)
    cut_scale = 1.0 if sampling.cut_before_temperature else 1 / sampling.temperature
    if columns:
        taken = min(count, columns)
        top, index = scores.topk(taken, -1)
        value[:, :taken] = top
        token[:, :taken] = (index + shard.start).double()
        log_prob[:, :taken] = log_probs.gather(1, index)
        maximum.copy_(top[:, 0])
        mass.copy_(((scores - top[:, :1]) * cut_scale).exp_().sum(-1, dtype=torch.float64))
        if not exhaustive:  # what this shard keeps back is no larger
            smallest.copy_(top[:, -1])
    gathered = shard.gather_states(packet)  # [R, n, 3 count + 3]
    maximum, mass, smallest = gathered[..., 3 * count :].unbind(-1)
    largest = maximum.amax(0)
    normalizer = (mass * ((maximum - largest) * cut_scale).exp()).sum(0)
    value, token, log_prob = (gathered[..., i * count : (i + 1) * count].transpose(0, 1).flatten(1) for i in range(3))
    # In the order of ids, then by falling value, equal ones still in the order of ids.
    by_id = token.argsort(dim=-1, stable=True)
    value, token, log_prob = (x.gather(1, by_id) for x in (value, token, log_prob))
    by_value = value.argsort(dim=-1, descending=True, stable=True)
    falling = value.gather(1, by_value)
    probs = ((falling - largest.unsqueeze(1)) * cut_scale).exp() / normalizer.unsqueeze(1)
    before = probs.cumsum(-1) - probs
    keep = (before < sampling.top_p) & torch.isfinite(falling)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    # Complete down to the largest value that some shard may have kept back: a cut that ends above it is exact.
    last_kept = falling.where(keep, torch.inf).amin(-1)
    if not bool((last_kept > smallest.amax(0)).all()):
        return None
    keep = torch.zeros_like(keep).scatter_(1, by_value, keep)
    weights = ((value - largest.unsqueeze(1)) / sampling.temperature).exp() * keep
    cumulative = weights.cumsum(-1)
    index = (cumulative <= (draws * cumulative[:, -1]).unsqueeze(1)).sum(-1, keepdim=True)
    last = (keep * torch.arange(1, keep.shape[1] + 1, device=keep.device)).amax(-1, keepdim=True) - 1
    index = torch.minimum(index, last)
    return Chosen(token.gather(1, index)[:, 0].long(), log_prob.gather(1, index)[:, 0])
