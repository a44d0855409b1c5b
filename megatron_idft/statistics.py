"""Per-token statistics of a next-token distribution, and their merge over vocabulary shards.

For logits z over the true vocabulary, p = softmax(z) and target y, in nats at temperature 1:

    log_prob = log p_y        entropy H = -sum_v p_v log p_v        phi = log_prob + H

phi is the centered log-likelihood of Distribution Discriminant Theory (arXiv 2602.12222, section 2): its expectation is
0 for tokens drawn from p itself, and it is far below 0 for a token that is improbable for how certain the model is.

A shard of the vocabulary is summarised by four fp32 numbers per token, its *state*. States of all shards merge exactly,
so that tensor-parallel ranks need to exchange 16 bytes per token and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Stands in for minus infinity in maxima and target logits. Being finite, it never makes 0 * inf = NaN in the merge.
LOWEST = -1e30

# Columns of a packed shard state [..., 4]; x are the shard's logits.
MAX = 0  # m = max x
SUM_EXP = 1  # sum exp(x - m)
SUM_EXP_SHIFTED = 2  # sum exp(x - m) (x - m)
TARGET_LOGIT = 3  # x_y, or LOWEST where another shard holds the target
STATE_SIZE = 4

# Statistics that an objective may ask for beside log_prob and entropy. Those that need a column of their own lengthen
# the state when they are asked for; max p needs none, being 1 / sum exp(x - m) of the whole vocabulary.
EXTRA_STATISTICS = ("max_prob", "sum_squared_prob", "argmax")
# Statistics of a reference model that an objective may ask for: given with the labels, never computed here.
REFERENCE_STATISTICS = ("reference_log_prob", "reference_entropy")


def extra_state_columns(extra_statistics: frozenset[str]) -> dict[str, int]:
    """Name -> column of a shard's state, for those of `extra_statistics` that have one.

    sum_squared_prob: sum exp(2 (x - m)). argmax: the global id of the first largest logit, exact in fp32 up to 2^24.
    """
    asked = [name for name in ("sum_squared_prob", "argmax") if name in extra_statistics]
    return {name: STATE_SIZE + index for index, name in enumerate(asked)}


def centered_log_likelihood(log_prob: Tensor, entropy: Tensor) -> Tensor:
    """phi = log p_y + H (arXiv 2602.12222, section 2), in nats; same shape as the arguments."""
    return log_prob + entropy


class Reference(NamedTuple):
    """What a reference model, which need not be in memory, said of the same tokens in the same context.

    Attributes:
        log_prob: [...] floating, log q of the label in nats; anything at ignored positions.
        entropy: [...] floating, of the reference's distribution in nats; None where it is not known.
        top_ids: [..., K] int32 or int64, the reference's K most probable tokens, no id twice; None: not known.
        top_log_prob: [..., K] floating, their log q.
    """

    log_prob: Tensor
    entropy: Tensor | None = None
    top_ids: Tensor | None = None
    top_log_prob: Tensor | None = None

    def transposed(self) -> "Reference":
        """Views with the first two dimensions exchanged, as Megatron's logits [s, b, V] have those of labels [b, s]."""

        def turned(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.transpose(0, 1)

        log_prob, *others = self
        return Reference(log_prob.transpose(0, 1), *map(turned, others))


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """The statistics of each token that an objective may use.

    Attributes:
        log_prob: [...] fp32, log p_y in nats; 0 at ignored positions.
        entropy: [...] fp32, H in nats over the true vocabulary; 0 at ignored positions.
        labels: [...] int64 global token ids; negative = ignored.
        vocab_size: size of the true vocabulary, without the columns that padding added.
        max_prob: [...] fp32, the largest p_v; 0 at ignored positions.
        sum_squared_prob: [...] fp32, sum_v p_v^2; 0 at ignored positions.
        argmax: [...] int64, the first v with the largest p_v; -1 at ignored positions.
        reference_log_prob: [...] fp32, log q of the label under a reference model, in nats; 0 at ignored positions.
        reference_entropy: [...] fp32, the entropy of the reference's distribution, in nats; 0 at ignored positions.

    The statistics from max_prob on are None unless the objective's `extra_statistics` or `reference_statistics` ask
    for them.
    """

    log_prob: Tensor
    entropy: Tensor
    labels: Tensor
    vocab_size: int
    max_prob: Tensor | None = None
    sum_squared_prob: Tensor | None = None
    argmax: Tensor | None = None
    reference_log_prob: Tensor | None = None
    reference_entropy: Tensor | None = None

    @property
    def centered_log_likelihood(self) -> Tensor:
        """phi, [...] fp32 in nats; 0 at ignored positions."""
        return centered_log_likelihood(self.log_prob, self.entropy)

    def require(self, name: str) -> Tensor:
        """The statistic of this name.

        Raises:
            ValueError: it is None: nobody asked for it, or there is no reference.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"TokenStatistics.{name} is None, and the objective reads it: give it")
        return value


class MergedState(NamedTuple):
    """Statistics of the whole vocabulary, each [...] fp32.

    `max` and `sum_exp` are kept apart because exp(x - max) / sum_exp stays exact for logits of any size, where
    x - log_sum_exp would lose the bits by which a large max outweighs log(sum_exp). The last two are None unless the
    states hold them.
    """

    log_prob: Tensor
    entropy: Tensor
    max: Tensor
    sum_exp: Tensor
    sum_squared_prob: Tensor | None = None
    argmax: Tensor | None = None

    @property
    def log_sum_exp(self) -> Tensor:
        return self.max + self.sum_exp.log()


def neutral_shard_state(shape: torch.Size, device: torch.device, size: int = STATE_SIZE) -> Tensor:
    """[*shape, size] fp32 state of a shard without any valid column: merging it changes nothing."""
    state = torch.zeros(*shape, size, dtype=torch.float32, device=device)
    state[..., MAX] = LOWEST
    state[..., TARGET_LOGIT] = LOWEST
    return state


def merge_shard_states(states: Tensor, extra_columns: Mapping[str, int] | None = None) -> MergedState:
    """Merge the states of R shards, in the order given.

    With M = max_r m_r, D = sum_r d_r e^(m_r - M) and S = sum_r (s_r + d_r (m_r - M)) e^(m_r - M):
    log_prob = (x_y - M) - log D and H = log D - S / D. Both terms of H are >= 0, so nothing cancels.

    Args:
        states: [R, ..., S] fp32. The same bits in give the same bits out, on every rank.
        extra_columns: what `extra_state_columns` said when the states were made.

    Returns:
        statistics of shape [...]. A row whose valid logits are all -inf, or hold NaN or +inf, has no distribution and
        yields NaN. A target logit of -inf yields a log_prob of about -1e30.
    """
    shard_max, shard_sum, shard_shifted, target_logit = states[..., :STATE_SIZE].unbind(-1)
    maximum = shard_max.amax(0)
    shift = shard_max - maximum
    scale = shift.exp()
    sum_exp = (shard_sum * scale).sum(0)
    shifted_sum = ((shard_shifted + shard_sum * shift) * scale).sum(0)
    sum_exp = torch.where(sum_exp > 0, sum_exp, torch.nan)
    log_normalizer = sum_exp.log()
    extra_columns = extra_columns or {}
    sum_squared_prob = argmax = None
    if "sum_squared_prob" in extra_columns:
        squares = (states[..., extra_columns["sum_squared_prob"]] * scale.square()).sum(0)
        sum_squared_prob = squares / sum_exp.square()
    if "argmax" in extra_columns:
        argmax = torch.where(shard_max == maximum, states[..., extra_columns["argmax"]], torch.inf).amin(0)
    return MergedState(
        log_prob=(target_logit.amax(0) - maximum) - log_normalizer,
        entropy=log_normalizer - shifted_sum / sum_exp,
        max=maximum,
        sum_exp=sum_exp,
        sum_squared_prob=sum_squared_prob,
        argmax=argmax,
    )
