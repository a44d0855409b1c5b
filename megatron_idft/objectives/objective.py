"""What an objective is: per-token statistics -> a detached weight w of the token's loss -w log_prob.

The gradient of every objective with respect to the logits is w (softmax - onehot). The weight never carries gradient:
with w = p^gamma attached, tokens below p = e^(-1/gamma) would be un-learned.

To add an objective, write one function in online.py (weights of the model that is trained) or with_reference.py that
returns an `Objective`, decorate it with `@register`, name it in __init__.py, and give it a row in objective_table.py.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_idft.statistics import EXTRA_STATISTICS, REFERENCE_STATISTICS, TokenStatistics

TokenFunction = Callable[[TokenStatistics], Tensor]


@dataclass(frozen=True, eq=False)
class KernelFormula:
    """A weight that loss kernels compute by themselves, in the launch that merges the statistics.

    Attributes:
        name: the formula, as the kernels know it.
        function: the same formula in torch.
        parameters: the numbers in it; gamma_lambda may be a 0-dim fp32 tensor.
    """

    name: str
    function: TokenFunction
    parameters: Mapping[str, float | Tensor] = field(default_factory=dict)

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        return self.function(statistics)


@dataclass(frozen=True, eq=False)
class Objective:
    """A rule that weighs tokens.

    Attributes:
        name: shown in logs and recorded in checkpoints.
        token_weight: statistics -> weight [...] of a floating dtype. Runs without gradient.
        token_gamma: statistics -> exponent [...], for objectives whose weight is p^gamma; else None.
        token_raw_gamma: the same before a schedule mixes it towards 1; else None.
        hyperparameters: what the objective was built with, by name.
        weight_floor: weights below it are raised to it; 0 is off.
        exempt_token_ids: labels whose weight is always 1 (end of turn, chat markers); empty is off.
        extra_statistics: which of max_prob, sum_squared_prob and argmax `token_weight` reads beside log_prob and
            entropy. They travel in the same collective.
        reference_statistics: which of reference_log_prob and reference_entropy `token_weight` reads.
        kl_coefficient: statistics -> coefficient c >= 0 [...] of a further term c KL(reference || model), over the
            reference's most probable tokens (loss/top_k.py); None: there is no such term. Detached, as the weight is;
            reads log_prob, entropy and the reference statistics.
        negative_weights: whether weights may be negative, which moves a token away from its label; a weight floor
            would contradict it.
    """

    name: str
    token_weight: TokenFunction
    token_gamma: TokenFunction | None = None
    token_raw_gamma: TokenFunction | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    weight_floor: float = 0.0
    exempt_token_ids: tuple[int, ...] = ()
    extra_statistics: frozenset[str] = frozenset()
    reference_statistics: frozenset[str] = frozenset()
    kl_coefficient: TokenFunction | None = None
    negative_weights: bool = False

    def __post_init__(self) -> None:
        for name, known in (("extra_statistics", EXTRA_STATISTICS), ("reference_statistics", REFERENCE_STATISTICS)):
            asked = frozenset(getattr(self, name))
            if unknown := sorted(asked - set(known)):
                raise ValueError(f"{name} may name {', '.join(known)}; got {', '.join(unknown)}")
            object.__setattr__(self, name, asked)
        if not 0.0 <= self.weight_floor <= 1.0:
            raise ValueError(f"weight_floor must lie in [0, 1] (0 turns it off), got {self.weight_floor}")
        if self.weight_floor > 0 and self.negative_weights:
            raise ValueError(
                f"a weight floor of {self.weight_floor:g} would raise the negative weights that objective"
                f" {self.name!r} is made of: leave it at 0, or take an objective without negative weights"
            )
        for token_id in self.exempt_token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise ValueError(f"exempt_token_ids must be non-negative integer token ids, got {token_id!r}")

    def with_weight_floor(self, weight_floor: float) -> "Objective":
        """The same objective with w = max(w, weight_floor), so that no trained token loses its gradient."""
        return replace(self, weight_floor=float(weight_floor))

    def with_exempt_tokens(self, token_ids: Iterable[int]) -> "Objective":
        """The same objective with weight 1 wherever the label is one of `token_ids`, which replace any set before."""
        return replace(self, exempt_token_ids=tuple(token_ids))

    @torch.no_grad()
    def weight(self, statistics: TokenStatistics) -> Tensor:
        """[...] fp32 weight without gradient, exactly 0 at ignored positions; no host synchronisation."""
        labels = statistics.labels
        weight = self._checked(self.token_weight(statistics), labels)
        if self.weight_floor > 0:
            weight = weight.clamp(min=self.weight_floor)
        if self.exempt_token_ids:
            # One comparison per id: a lookup table would need a copy to the device in every step.
            exempt = torch.zeros_like(labels, dtype=torch.bool)
            for token_id in self.exempt_token_ids:
                exempt |= labels == token_id
            weight = torch.where(exempt, 1.0, weight)
        return torch.where(labels < 0, 0.0, weight)

    @torch.no_grad()
    def gamma(self, statistics: TokenStatistics) -> Tensor | None:
        """[...] fp32 exponent as used in the weight, or None; meaningful at trained positions only."""
        return None if self.token_gamma is None else self.token_gamma(statistics)

    @torch.no_grad()
    def raw_gamma(self, statistics: TokenStatistics) -> Tensor | None:
        """[...] fp32 exponent within its clamp, before gamma_lambda, or None; meaningful at trained positions only."""
        return None if self.token_raw_gamma is None else self.token_raw_gamma(statistics)

    @torch.no_grad()
    def reference_kl_coefficient(self, statistics: TokenStatistics) -> Tensor:
        """[...] fp32 coefficient of the KL to the reference, 0 without such a term and at ignored positions."""
        if self.kl_coefficient is None:
            return torch.zeros_like(statistics.log_prob)
        coefficient = self._checked(self.kl_coefficient(statistics), statistics.labels)
        return torch.where(statistics.labels < 0, 0.0, coefficient)

    def _checked(self, weight: Tensor, labels: Tensor) -> Tensor:
        if not isinstance(weight, Tensor):
            raise TypeError(f"objective {self.name!r} must return a tensor, got {type(weight).__name__}")
        if weight.shape != labels.shape or not weight.is_floating_point() or weight.device != labels.device:
            raise ValueError(
                f"objective {self.name!r} must return one floating-point weight per token, shaped "
                f"{tuple(labels.shape)} on {labels.device}; got {tuple(weight.shape)} {weight.dtype} on {weight.device}"
            )
        return weight.float()
