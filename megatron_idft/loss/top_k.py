"""KL(q || p) to a reference of which the K most probable tokens are known, in plain torch; everything is [..., K].

With p the model's and q the reference's distribution, q_k of the K tokens given, Q = 1 - sum q_k and P = 1 - sum p_k
the masses of all others:

    KL = sum_k q_k log(q_k / p_k) + Q log(Q / P)

The rest counts as one token, so this is a lower bound of the KL over the whole vocabulary, and equal to it where the
rest of q has the shape of the rest of p. A loss -w log p_y + c KL has the gradient, with s the softmax:

    (w + c (1 - Q / P)) s_v - w [v = y]            for all others
    (w + c) s_k - c q_k - w [k = y]                for the K tokens

A row's coefficient is thus another than its weight, and K of its elements are written once more. No tensor has the
logits' size. Masses below 1e-5 count as 1e-5: fp32 sums of K probabilities near 1 know others to 1e-7, so that Q / P is
good to a hundredth there and better above.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_idft.loss.shard import VocabShard
from megatron_idft.statistics import LOWEST, Reference

LEAST_MASS = 1e-5


class TopTerm(NamedTuple):
    """What forward knows of the term, fp32; zeros at ignored positions.

    Attributes:
        kl: [...], the KL above, in nats.
        coefficient: [...], c.
        row_coefficient: [...], w + c (1 - Q / P).
        probs: [..., K], p_k.
        reference_probs: [..., K], q_k.
    """

    kl: Tensor
    coefficient: Tensor
    row_coefficient: Tensor
    probs: Tensor
    reference_probs: Tensor


def gather_logits(logits: Tensor, columns: Tensor, shard: VocabShard) -> Tensor:
    """[..., K] fp32 logits of these global ids; LOWEST for an id outside the true vocabulary.

    Collectives: one all-reduce (max) of fp32 [T, K] over `tp_group`; none without tensor parallelism or tokens.
    """
    local, is_here = _local(columns, shard)
    found = torch.where(is_here, logits.gather(-1, local).float(), LOWEST)
    if shard.tp_group is None or shard.tp_group.size() == 1 or found.numel() == 0:
        return found
    if torch.compiler.is_compiling():
        # It imports the compiler.
        from torch.distributed._functional_collectives import all_reduce  # noqa: PLC0415

        reduced: Tensor = all_reduce(found, "max", group=shard.tp_group)
        return reduced
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=shard.tp_group)
    return found


def top_term(
    logits: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    weight: Tensor,
    coefficient: Tensor,
    reference: Reference,
    trained: Tensor,
) -> TopTerm:
    """The term of each token.

    Args:
        logits: [..., K], of `gather_logits`.
        maximum, sum_exp: [...] fp32, of the whole vocabulary.
        weight: [...] fp32, w.
        coefficient: [...] fp32, c.
        reference: with top_log_prob; anything where nothing is trained.
        trained: [...] bool.
    """
    assert reference.top_log_prob is not None
    each = trained.unsqueeze(-1)
    log_probs = torch.where(each, (logits - maximum.unsqueeze(-1)) - sum_exp.unsqueeze(-1).log(), 0.0)
    log_reference = torch.where(each, reference.top_log_prob.float().clamp(min=LOWEST), 0.0)
    probs, reference_probs = log_probs.exp(), log_reference.exp()
    rest, reference_rest = ((1 - mass.sum(-1)).clamp(min=LEAST_MASS) for mass in (probs, reference_probs))
    ratio = reference_rest / rest
    kl = (reference_probs * (log_reference - log_probs)).sum(-1) + reference_rest * ratio.log()
    kl, coefficient, row_coefficient = (
        torch.where(trained, value, 0.0) for value in (kl, coefficient, weight + coefficient * (1 - ratio))
    )
    return TopTerm(kl, coefficient, row_coefficient, probs, reference_probs)


def top_gradient(
    columns: Tensor,
    coefficient: Tensor,
    probs: Tensor,
    reference_probs: Tensor,
    labels: Tensor,
    weight: Tensor,
    log_prob: Tensor,
    upstream: Tensor,
) -> Tensor:
    """[..., K] fp32, the gradient with respect to the K logits.

    Args:
        columns: [..., K], their global ids.
        coefficient, probs, reference_probs: of the `TopTerm`.
        labels, weight, log_prob, upstream: [...], as in forward and backward of the loss.
    """
    weight, coefficient, log_prob = (value.unsqueeze(-1) for value in (weight, coefficient, log_prob))
    towards_reference = coefficient * (probs - reference_probs)
    # As in the kernels: p - 1 by expm1, which does not cancel for a label of p near 1.
    own = torch.where(columns == labels.unsqueeze(-1), log_prob.expm1(), probs)
    return upstream.unsqueeze(-1) * (weight * own + towards_reference)


def local_columns(columns: Tensor, labels: Tensor, shard: VocabShard, vocab_size: int) -> Tensor:
    """[..., K] int64, the columns in this shard; -1 for those of other shards and where nothing is trained."""
    local, is_here = _local(columns, shard)
    trained = (labels >= 0) & (labels < vocab_size)
    return torch.where(is_here & trained.unsqueeze(-1), local, -1)


def _local(columns: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Columns of this shard that are safe to index, and whether each is meant."""
    local = columns.long() - shard.start
    is_here = (local >= 0) & (local < shard.valid_columns)
    return torch.where(is_here, local, 0), is_here
