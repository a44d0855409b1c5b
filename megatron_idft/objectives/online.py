"""Objectives whose weight follows from the statistics of the model that is being trained."""

import math

import torch
from torch import Tensor

from megatron_idft.objectives.objective import KernelFormula, Objective
from megatron_idft.objectives.registry import register
from megatron_idft.statistics import REFERENCE_STATISTICS, TokenStatistics, centered_log_likelihood

MAX_POWER = 100.0  # beyond, a token of p = 0.9 has a weight below 3e-5: nothing is trained
DEFT_EPSILON = 1e-6  # of the authors' code


@register
def ce() -> Objective:
    """Cross-entropy, plain SFT: w = 1."""
    return Objective("ce", KernelFormula("ce", lambda statistics: torch.ones_like(statistics.log_prob)))


@register
def dft() -> Objective:
    """Dynamic Fine-Tuning: w = p_y (arXiv 2508.05629)."""
    return Objective("dft", KernelFormula("dft", lambda statistics: statistics.log_prob.exp()))


@register
def idft(
    beta: float = 1.0,
    gamma_min: float = 0.1,
    gamma_max: float = 2.0,
    gamma_lambda: float | Tensor = 1.0,
    weights: str = "online",
) -> Objective:
    """In-Distribution Finetuning (arXiv 2602.12222, section 3).

    gamma = clamp(exp(-phi / beta), gamma_min, gamma_max); gamma' = 1 + gamma_lambda (gamma - 1); w = p_y^gamma'.
    A token that fits the model's own distribution (phi = 0) is weighed as in DFT; phi < 0 suppresses it further,
    phi > 0 moves it towards plain cross-entropy. Unlike in the authors' code, p_y has no lower clamp: it would cut the
    gradient of unlikely tokens.

    Args:
        beta: temperature of the exponent, > 0.
        gamma_min, gamma_max: bounds of gamma, 0 <= gamma_min <= gamma_max.
        gamma_lambda: share of gamma in effect; 0 is exactly DFT. A float in [0, 1], or a 0-dim fp32 tensor on the
            logits' device which the caller overwrites in place as training advances: it is read on the device only.
        weights: "online" takes p and phi from the model that is trained, as the paper does; "reference" takes them from
            the reference, the recipe of PriFT (arXiv 2606.09396) applied to this weight. We know of no measurement.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a finite number > 0 (the paper uses 1.0), got {beta}")
    if not (0 <= gamma_min <= gamma_max < math.inf):
        raise ValueError(
            "gamma_min and gamma_max must satisfy 0 <= gamma_min <= gamma_max < inf (defaults 0.1 and 2.0), got "
            f"gamma_min={gamma_min}, gamma_max={gamma_max}"
        )
    if isinstance(gamma_lambda, Tensor):
        if gamma_lambda.dim() != 0 or gamma_lambda.dtype != torch.float32:
            raise ValueError(
                "gamma_lambda as a tensor must be 0-dim float32, for example torch.ones((), device=...); got shape "
                f"{tuple(gamma_lambda.shape)}, {gamma_lambda.dtype}"
            )
    elif not 0 <= gamma_lambda <= 1:
        raise ValueError(f"gamma_lambda must lie in [0, 1] (0 is DFT, 1 is IDFT), got {gamma_lambda}")
    if weights not in ("online", "reference"):
        raise ValueError(f"weights must be 'online' or 'reference', got {weights!r}")

    def weighing(statistics: TokenStatistics) -> tuple[Tensor, Tensor]:
        """log-probability of the label and entropy, of the model that the weights are taken from."""
        if weights == "online":
            return statistics.log_prob, statistics.entropy
        return statistics.require("reference_log_prob"), statistics.require("reference_entropy")

    def raw_gamma(statistics: TokenStatistics) -> Tensor:
        return (centered_log_likelihood(*weighing(statistics)) / -beta).exp().clamp(gamma_min, gamma_max)

    def gamma(statistics: TokenStatistics) -> Tensor:
        raw = raw_gamma(statistics)
        return torch.lerp(torch.ones_like(raw), raw, gamma_lambda)  # exact at both ends, unlike 1 + lambda (raw - 1)

    def weight(statistics: TokenStatistics) -> Tensor:
        log_prob, _ = weighing(statistics)
        return (gamma(statistics) * log_prob).exp()

    numbers = {"beta": beta, "gamma_min": gamma_min, "gamma_max": gamma_max, "gamma_lambda": gamma_lambda}
    return Objective(
        "idft",
        KernelFormula("idft" if weights == "online" else "idft_reference", weight, numbers),
        gamma,
        raw_gamma,
        numbers | {"weights": weights},
        reference_statistics=frozenset() if weights == "online" else frozenset(REFERENCE_STATISTICS),
    )


@register
def entropy() -> Objective:
    """Entropy gating: w = H / ln V, V the true vocabulary.

    EAFT (arXiv 2601.02151, equations 2-3) in its full-vocabulary form; the paper takes the 20 most probable tokens.
    """

    def weight(statistics: TokenStatistics) -> Tensor:
        return statistics.entropy / math.log(max(statistics.vocab_size, 2))  # a vocabulary of one token has H = 0

    return Objective("entropy", KernelFormula("entropy", weight))


@register
def power(q: float = 0.5) -> Objective:
    """Power of the probability: w = p_y^q, in [0, 1].

    The gradient of the family -(p^q - 1) / q (arXiv 2510.00526), as in the authors' code,
    GaotangLi/Beyond-Log-Likelihood main_verl/trainer/fsdp_sft_trainer.py, "GeneralFamily-q". That code divides by q and
    so has q = 0, the limit, under another name; where it splits sequences over ranks it trains plain cross-entropy.
    The paper's -p^10 has ten times the gradient of q = 10.

    Args:
        q: exponent in [0, 100]. 0 is exactly cross-entropy, 1 exactly DFT; larger values suit models that know the
            field already. The default lies between the two; the paper has none.
    """
    if not 0 <= q <= MAX_POWER:
        raise ValueError(f"q must lie in [0, {MAX_POWER:g}] (0 is ce, 1 is dft; default 0.5), got {q}")
    hyperparameters = {"q": q}
    formula = KernelFormula("power", lambda statistics: (q * statistics.log_prob).exp(), hyperparameters)
    return Objective("power", formula, hyperparameters=hyperparameters)


@register
def chord() -> Objective:
    """CHORD-phi: w = p_y (1 - p_y), in [0, 1/4] (arXiv 2508.11408).

    The weight of the paper's supervised term, detached, as in ms-swift's `compute_chord_loss` and Trinity-RFT's
    `SFTPhiLossFn`. Both can mix that term with a policy gradient, which is not part of this objective; Trinity-RFT can
    also stop training above a probability, which is off by default.
    """

    def weight(statistics: TokenStatistics) -> Tensor:
        log_prob = statistics.log_prob
        return log_prob.exp() * (0.0 - log_prob.expm1())  # 1 - p would cancel near p = 1

    return Objective("chord", KernelFormula("chord", weight))


@register
def deft() -> Objective:
    """Dynamic Entropy Fine-Tuning: w = p_y^a a / (a + 1e-6), in [0, 1], a = sum_v p_v^2 (arXiv 2602.11424).

    The gradient of -(p^a - 1) / (a + 1e-6) with a detached, as in the authors' code, luludus/DEFT
    main_verl/trainer/fsdp_sft_trainer.py. The deformed logarithm of the paper, (p^a - 1) / a, has no 1e-6, which
    matters only for nearly flat distributions over vocabularies of 10^5 tokens and more. The code sums over padding
    columns as well, and where it splits sequences over ranks it trains plain cross-entropy.
    """

    def weight(statistics: TokenStatistics) -> Tensor:
        concentration = statistics.require("sum_squared_prob")
        return (concentration * statistics.log_prob).exp() * (concentration / (concentration + DEFT_EPSILON))

    return Objective("deft", KernelFormula("deft", weight), extra_statistics=frozenset({"sum_squared_prob"}))


@register
def cll() -> Objective:
    """Centered log-likelihood: w = min(1, p_y e^H) = exp(min(phi, 0)), in [0, 1] (arXiv 2608.26735).

    The paper admits tokens to on-policy distillation with this probability; as a weight of supervised fine-tuning
    we know of no measurement. The formula is from descriptions of the paper; we found no code of it.
    """
    return Objective(
        "cll", KernelFormula("cll", lambda statistics: statistics.centered_log_likelihood.clamp(max=0.0).exp())
    )
