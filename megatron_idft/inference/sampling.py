"""Tokens from a distribution whose vocabulary is split over tensor-parallel ranks; the vocabulary is never gathered.

Every draw is the inversion of the cumulative distribution, in the order of token ids, by one uniform number (draws.py).
What ranks exchange per row: a few numbers, or with top-p or top-k the largest candidates of each shard. Every rank
computes the same tokens from the same exchanged bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_idft.inference.requests import Sampling
from megatron_idft.loss.shard import VocabShard

FIRST_CANDIDATES = 64  # of each shard; four times as many until they are enough
_BLOCK = 256  # columns that a draw from the whole distribution first passes over at once


class Chosen(NamedTuple):
    """The tokens of a step, the same on every rank.

    Attributes:
        tokens: int64 [n].
        log_prob: float64 [n], of the token in `log_probs`.
        kept: the most tokens that a row's cut left, 0 without a cut.
    """

    tokens: Tensor
    log_prob: Tensor
    kept: int = 0


def choose(
    scores: Tensor,
    log_probs: Tensor,
    sampling: Sampling,
    draws: Tensor,
    shard: VocabShard,
    *,
    candidates: int = FIRST_CANDIDATES,
) -> Chosen:
    """One token per row, with probability proportional to exp(scores), cut and tempered as `sampling` says.

    Args:
        scores, log_probs: fp32 [n, valid columns of this shard], finite; log_probs is only looked up at the token.
        draws: float64 [n] in [0, 1).
        candidates: how many of a shard's largest are looked at first for top-p and top-k. The result does not depend on
            it: where they turn out not to hold the whole cut, more are taken. Twice what was kept last is a good guess.

    Collectives: one all-gather for temperature 0, two for the whole distribution, two or more for a cut one. With a cut
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
        index = scores.max(-1, keepdim=True).indices  # of equals the first; on a CPU faster than argmax
        packet = torch.cat([scores.gather(1, index), index + shard.start, log_probs.gather(1, index)], -1).double()
    gathered = shard.gather_states(packet)  # [R, n, 3]
    rank = gathered[..., 0].argmax(0, keepdim=True)  # the first of equals: the smaller id
    _, token, log_prob = gathered.gather(0, rank.unsqueeze(-1).expand(-1, -1, 3))[0].unbind(-1)
    return Chosen(token.long(), log_prob)


def _from_all(scores: Tensor, log_probs: Tensor, temperature: float, draws: Tensor, shard: VocabShard) -> Chosen:
    n, columns = scores.shape
    maximum = scores.new_full((n,), -torch.inf, dtype=torch.float64)
    mass = torch.zeros_like(maximum)
    if columns:
        top = scores.amax(-1, keepdim=True)
        weights = _blocks_of_weights(scores, top, temperature)  # [n, blocks, _BLOCK]
        block_masses = weights.sum(-1).double()
        cumulative = block_masses.cumsum(-1)
        maximum, mass = top[:, 0].double() / temperature, cumulative[:, -1]
    states = shard.gather_states(torch.stack([maximum, mass], -1))  # [R, n, 2]
    masses = states[..., 1] * (states[..., 0] - states[..., 0].amax(0)).exp()
    ends = masses.cumsum(0)
    total = ends[-1]
    target = torch.minimum(draws * total, _below(total))
    owner = (ends <= target).sum(0)  # [n]
    mine = shard.tp_group.rank() if shard.tp_group is not None else 0
    packet = torch.zeros(n, 2, dtype=torch.float64, device=scores.device)
    if columns:
        # The target within this shard, in units of its own largest weight; then within a block.
        inside = (target - (ends[mine] - masses[mine])) / masses[mine].clamp_min(1e-300) * mass
        block = (cumulative <= inside.unsqueeze(1)).sum(-1, keepdim=True).clamp_(max=block_masses.shape[1] - 1)
        begin = (cumulative - block_masses).gather(1, block)
        parts = weights[torch.arange(n, device=scores.device), block[:, 0]].double().cumsum(-1)
        # Bounded, as the sum of the block was rounded: what is drawn has a weight.
        inside = torch.minimum((inside.unsqueeze(1) - begin).clamp_min(0), _below(parts[:, -1:]))
        index = block * _BLOCK + (parts <= inside).sum(-1, keepdim=True)
        found = torch.cat([index + shard.start, log_probs.gather(1, index)], -1).double()
        packet = found * (owner == mine).unsqueeze(1)
    token, log_prob = shard.gather_states(packet).sum(0).unbind(-1)
    return Chosen(token.long(), log_prob)


def _blocks_of_weights(scores: Tensor, top: Tensor, temperature: float) -> Tensor:
    """exp((scores - top) / temperature), fp32 [n, blocks, _BLOCK]; 0 beyond the last column."""
    n, columns = scores.shape
    weights = scores.new_empty(n, -(-columns // _BLOCK) * _BLOCK)
    weights[:, columns:] = 0
    torch.sub(scores, top, out=weights[:, :columns])
    if temperature != 1:
        weights[:, :columns].div_(temperature)
    weights[:, :columns].exp_()
    return weights.view(n, -1, _BLOCK)


def _below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.zeros_like(x))


def _from_candidates(
    scores: Tensor, log_probs: Tensor, sampling: Sampling, draws: Tensor, shard: VocabShard, count: int
) -> Chosen | None:
    """None where the candidates do not hold the whole cut for certain."""
    # Every shard sends as much, also one that has fewer columns of the true vocabulary. Finding the largest of many
    # costs more than sending all.
    width = shard.padded_columns if 4 * count >= shard.padded_columns else count
    cut_scale = 1.0 if sampling.cut_before_temperature else 1 / sampling.temperature
    value, token, log_prob = _candidates(scores, log_probs, width, shard)
    maximum = value.amax(-1)
    shifted = scores - maximum.unsqueeze(1)
    if cut_scale != 1:
        shifted.mul_(cut_scale)
    mass = shifted.exp_().sum(-1).double()
    # What this shard keeps back is no larger.
    kept_back = value.amin(-1) if width < scores.shape[1] else torch.full_like(maximum, -torch.inf)
    maximum, mass, kept_back = _gather([x.unsqueeze(1) for x in (maximum, mass, kept_back)], shard)  # [n, R]
    value, token, log_prob = _gather([value, token, log_prob], shard)  # [n, R * width], in the order of ids
    largest = maximum.amax(1)
    normalizer = (mass * ((maximum - largest.unsqueeze(1)) * cut_scale).exp()).sum(1)
    falling, by_value = value.sort(dim=-1, descending=True, stable=True)  # equal ones still in the order of ids
    probs = ((falling - largest.unsqueeze(1)) * cut_scale).exp() / normalizer.unsqueeze(1)
    before = probs.cumsum(-1, dtype=torch.float64) - probs
    keep = (before < sampling.top_p) & torch.isfinite(falling)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    # Complete down to the largest value that some shard may have kept back: a cut that ends above it is exact.
    last_kept = falling.where(keep, torch.inf).amin(-1)
    exact, kept = torch.stack([(last_kept > kept_back.amax(1)).all(), keep.sum(-1).amax()]).tolist()
    if not exact:
        return None
    keep = torch.zeros_like(keep).scatter_(1, by_value, keep)
    weights = ((value - largest.unsqueeze(1)).double() / sampling.temperature).exp() * keep
    cumulative = weights.cumsum(-1)
    index = (cumulative <= (draws * cumulative[:, -1]).unsqueeze(1)).sum(-1, keepdim=True)
    last = (keep * torch.arange(1, keep.shape[1] + 1, device=keep.device)).amax(-1, keepdim=True) - 1
    index = torch.minimum(index, last)
    return Chosen(token.gather(1, index)[:, 0].long(), log_prob.gather(1, index)[:, 0], int(kept))


def _candidates(scores: Tensor, log_probs: Tensor, width: int, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """The largest scores of this shard, their ids and log_probs, each [n, width] in the order of ids.

    Where there are fewer: scores of -inf with ids between this shard's and the next one's.
    """
    n, columns = scores.shape
    if columns > width:
        index = scores.topk(width, -1).indices.sort(-1).values
        return scores.gather(1, index), index + shard.start, log_probs.gather(1, index)
    token = torch.arange(shard.start, shard.start + columns, device=scores.device).expand(n, -1)
    missing = (0, width - columns)
    return (
        pad(scores, missing, value=-torch.inf),
        pad(token, missing, value=shard.start + shard.padded_columns),
        pad(log_probs, missing),
    )


def _gather(columns: Sequence[Tensor], shard: VocabShard) -> list[Tensor]:
    """[n, w] of this shard -> [n, R * w] of all shards in rank order, for several at once. One all-gather."""
    if shard.tp_group is None or shard.tp_group.size() == 1:
        return list(columns)
    gathered = shard.gather_states(torch.stack([column.double() for column in columns]))  # [R, columns, n, w]
    return [part.transpose(0, 1).flatten(1) for part in gathered.unbind(1)]
