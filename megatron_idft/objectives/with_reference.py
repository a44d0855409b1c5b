"""Objectives that are anchored in a reference: a model whose log q of each label is known before training begins.

With p the probability of the label under the model that is trained, q under the reference, and r = q / p. The reference
is usually the model that training starts from.
"""

import math

import torch
from torch import Tensor

from megatron_idft.objectives.objective import KernelFormula, Objective, TokenFunction
from megatron_idft.objectives.registry import register
from megatron_idft.statistics import TokenStatistics

_LOG_PROB = frozenset({"reference_log_prob"})
MAX_TILT = 80.0  # e^80 is a finite fp32 number


@register
def prift() -> Objective:
    """PriFT-prob: w = q, in [0, 1] (arXiv 2606.09396).

    DFT with the weight of the frozen pretrained model, as `prift_prob_weights` in the authors' code, wang-kee/PriFT
    verl/verl/trainer/prift_weights.py, which runs that model beside the one that is trained. Their other form,
    PriFT-mass, needs the reference's mass of less likely tokens and is not here.
    """
    formula = KernelFormula("prift", lambda statistics: statistics.require("reference_log_prob").exp())
    return Objective("prift", formula, reference_statistics=_LOG_PROB)


@register
def asft(coefficient: float = 0.03, cap: float = 10.0) -> Objective:
    """Anchored SFT by the k3 estimate: w = p + coefficient (min(r, cap) - 1); negative where r < 1 - p / coefficient.

    The gradient of DFT's loss plus coefficient k3, k3 = r - 1 - log r, as in NVIDIA-NeMo/RL #3302, whose coefficient is
    the default here; cap is ours. The paper's anchor (arXiv 2509.23753) and that of the authors' code and
    LLaMA-Factory is the KL divergence KL(q || p) over the whole vocabulary: `asft_topk`. k3 estimates KL(p || q), and
    only for tokens drawn from p, which those of a corpus are not; so coefficients do not carry over.

    Args:
        coefficient: of the anchor, >= 0; 0 is exactly DFT.
        cap: of r, >= 1. Without one, a token that the reference expects and the model has lost would outweigh its
            batch: r has no bound. With it, w <= p + coefficient (cap - 1).
    """
    return _with_k3("asft", lambda statistics: statistics.log_prob.exp(), coefficient, cap, largest_positive=0.0)


@register
def sft_k3(coefficient: float = 0.03, cap: float = 10.0) -> Objective:
    """Cross-entropy with the k3 anchor alone: w = 1 + coefficient (min(r, cap) - 1).

    The gradient of cross-entropy plus coefficient k3, as TorchRL's `SFTLoss(kl_to_ref_coeff=...)`, which has no cap and
    no default; negative only for a coefficient above 1. On k3 and on cap see `asft`.

    Args:
        coefficient: of the anchor, >= 0; 0 is exactly cross-entropy.
        cap: of r, >= 1.
    """
    return _with_k3(
        "sft_k3", lambda statistics: torch.ones_like(statistics.log_prob), coefficient, cap, largest_positive=1.0
    )


@register
def minor_sft(beta: float = 0.1) -> Objective:
    """MinorSFT: w = 2 sigmoid(-beta log(p / q)), in [0, 2] (arXiv 2408.10642).

    1 where the model still agrees with the reference; less for a token that it already finds likelier, more for one
    that it finds less likely. The gradient of -(2 / beta) log sigmoid(beta log(p / q)) token by token. TorchRL's
    `minor_sft_loss` has no factor 2 / beta, so its gradient is beta / 2 of this one and vanishes with beta, and it
    takes log p of the whole response.

    Args:
        beta: > 0; how soon the weight changes. The default is TorchRL's.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a finite number > 0 (default 0.1), got {beta}")

    def weight(statistics: TokenStatistics) -> Tensor:
        return 2 * torch.sigmoid(-beta * _log_ratio(statistics))

    numbers = {"beta": beta}
    formula = KernelFormula("minor_sft", weight, numbers)
    return Objective("minor_sft", formula, hyperparameters=numbers, reference_statistics=_LOG_PROB)


@register
def iw(ratio_min: float = 0.2, ratio_max: float = 1.8) -> Objective:
    """Importance-weighted SFT, token by token: w = clamp(p / q, ratio_min, ratio_max) (arXiv 2507.12856).

    The form of `IwSFTLoss(sum_over_time=False)` in the authors' code, emmyqin/iw_sft, whose bounds are the defaults.
    Their trainer takes the other form, the mean of log(p / q) over the response to the power 1, at most 16: one weight
    for all tokens of a document, which no token's statistics give.

    Args:
        ratio_min, ratio_max: bounds of the weight, 0 <= ratio_min <= ratio_max.
    """
    if not 0 <= ratio_min <= ratio_max < math.inf:
        raise ValueError(
            "ratio_min and ratio_max must satisfy 0 <= ratio_min <= ratio_max < inf (defaults 0.2 and 1.8), got "
            f"ratio_min={ratio_min}, ratio_max={ratio_max}"
        )

    def weight(statistics: TokenStatistics) -> Tensor:
        return _log_ratio(statistics).exp().clamp(ratio_min, ratio_max)

    numbers = {"ratio_min": ratio_min, "ratio_max": ratio_max}
    formula = KernelFormula("iw", weight, numbers)
    return Objective("iw", formula, hyperparameters=numbers, reference_statistics=_LOG_PROB)


@register
def psft(epsilon: float = 0.2) -> Objective:
    """Proximal SFT: w = p / q where p / q < 1 + epsilon, else 0; in [0, 1 + epsilon) (arXiv 2508.17784).

    The gradient of PPO's clipped loss at advantage 1, as the authors' code trains it in verl. There q is the policy of
    the last synchronisation, a few steps old; here it is the reference of the whole training, so a token is learned
    until it is 1 + epsilon times as likely as the reference finds it, and no further.

    Args:
        epsilon: >= 0; how far a token's probability may rise above the reference's. The default is PPO's.
    """
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be a finite number >= 0 (default 0.2), got {epsilon}")

    def weight(statistics: TokenStatistics) -> Tensor:
        ratio = _log_ratio(statistics).exp()
        return torch.where(ratio < 1 + epsilon, ratio, 0.0)

    formula = KernelFormula("psft", weight, {"ratio_max": 1 + epsilon})
    return Objective("psft", formula, hyperparameters={"epsilon": epsilon}, reference_statistics=_LOG_PROB)


@register
def asft_topk(coefficient: float = 0.1) -> Objective:
    """Anchored SFT: w = p, and coefficient KL(q || p) over the reference's top K (arXiv 2509.23753).

    The paper's anchor with the reference's K most probable tokens and one bucket for all others in the place of the
    whole vocabulary; the authors' code and LLaMA-Factory, whose coefficient is the default, hold a second model and
    fp32 distributions of both.

    Args:
        coefficient: of the KL, >= 0; 0 is exactly DFT.
    """
    return _with_kl("asft_topk", KernelFormula("dft", lambda statistics: statistics.log_prob.exp()), coefficient)


@register
def sft_topk(coefficient: float = 0.1) -> Objective:
    """Cross-entropy with the anchor of `asft_topk`: w = 1.

    Args:
        coefficient: of the KL, >= 0; 0 is exactly cross-entropy.
    """
    formula = KernelFormula("ce", lambda statistics: torch.ones_like(statistics.log_prob))
    return _with_kl("sft_topk", formula, coefficient)


@register
def distill() -> Objective:
    """Offline distillation: w = 0 and KL(q || p) over the reference's top K; labels only say which tokens are trained.

    With a reference that is the same model under another prompt, such as one that shows the answer, this is
    self-distillation (arXiv 2601.19897) with its teacher's distributions computed once.
    """
    return _with_kl("distill", KernelFormula("zero", lambda statistics: torch.zeros_like(statistics.log_prob)), 1.0)


@register
def gift(beta: float = 20.0) -> Objective:
    """GIFT: cross-entropy to the reference tilted towards the label, softmax(log q + beta [v = y]).

    That target T has T_y = 1 - c with c = (1 - T_y) / (1 - q) = 1 / (1 + q (e^beta - 1)), and c q_v elsewhere. So its
    gradient s - T is exactly (1 - c) (s - onehot) + c (s - q): w = 1 - c, and c KL(q || p) over the top K. As
    zzy1127/GIFT, which holds a second model and the whole of T.

    Args:
        beta: > 0; from 0, the reference alone, to the label alone. The default is that of the authors' code: there a
            label needs q < e^-20 before half of its weight goes to the reference.
    """
    if not 0 < beta < MAX_TILT:
        raise ValueError(f"beta must lie between 0 and {MAX_TILT:g} (default 20), got {beta}")
    tilt = math.log(math.expm1(beta))  # log(e^beta - 1)

    def weight(statistics: TokenStatistics) -> Tensor:
        return torch.sigmoid(statistics.require("reference_log_prob") + tilt)

    def kl_coefficient(statistics: TokenStatistics) -> Tensor:
        return torch.sigmoid(-(statistics.require("reference_log_prob") + tilt))

    formula = KernelFormula("gift", weight, {"tilt": tilt})
    return Objective(
        "gift",
        formula,
        hyperparameters={"beta": beta},
        reference_statistics=_LOG_PROB,
        kl_coefficient=kl_coefficient,
    )


def _with_kl(name: str, formula: KernelFormula, coefficient: float) -> Objective:
    """An objective with coefficient KL(q || p) added to its loss."""
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"coefficient must be a finite number >= 0 (default 0.1), got {coefficient}")
    return Objective(
        name,
        formula,
        hyperparameters={} if name == "distill" else {"coefficient": coefficient},
        kl_coefficient=lambda statistics: torch.full_like(statistics.log_prob, coefficient),
    )


def _log_ratio(statistics: TokenStatistics) -> Tensor:
    """log(p / q)."""
    return statistics.log_prob - statistics.require("reference_log_prob")


def _with_k3(
    name: str, token_weight: TokenFunction, coefficient: float, cap: float, largest_positive: float
) -> Objective:
    """An objective with coefficient k3 added to its loss, r capped.

    Args:
        name: of the objective and of its formula.
        token_weight: without the anchor.
        coefficient, cap: of the anchor.
        largest_positive: the largest coefficient that leaves every weight >= 0.
    """
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"coefficient must be a finite number >= 0 (default 0.03), got {coefficient}")
    if not 1 <= cap < math.inf:
        raise ValueError(f"cap must be a finite number >= 1 (default 10): r is 1 where nothing has changed, got {cap}")

    def weight(statistics: TokenStatistics) -> Tensor:
        # expm1: near r = 1, where training begins, the subtraction would cancel.
        anchor = (-_log_ratio(statistics)).clamp(max=math.log(cap)).expm1()
        return token_weight(statistics) + coefficient * anchor

    formula = KernelFormula(name, weight, {"coefficient": coefficient, "log_cap": math.log(cap)})
    return Objective(
        name,
        formula,
        hyperparameters={"coefficient": coefficient, "cap": cap},
        reference_statistics=_LOG_PROB,
        negative_weights=coefficient > largest_positive,
    )
