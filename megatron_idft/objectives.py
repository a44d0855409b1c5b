"""Objectives: per-token statistics -> a detached weight w of the token's loss -w log_prob.

The gradient of every objective with respect to the logits is w (softmax - onehot). The weight never carries gradient:
with w = p^gamma attached, tokens below p = e^(-1/gamma) would be un-learned.

To add an objective, write one function here that returns an `Objective`, decorate it with `@register`, and give it a
row in objective_table.py.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatron_idft.statistics import EXTRA_STATISTICS, REFERENCE_STATISTICS, TokenStatistics

TokenFunction = Callable[[TokenStatistics], Tensor]

MAX_POWER = 100.0  # beyond, a token of p = 0.9 has a weight below 3e-5: nothing is trained
DEFT_EPSILON = 1e-6  # of the authors' code


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

    def _checked(self, weight: Tensor, labels: Tensor) -> Tensor:
        if not isinstance(weight, Tensor):
            raise TypeError(f"objective {self.name!r} must return a tensor, got {type(weight).__name__}")
        if weight.shape != labels.shape or not weight.is_floating_point() or weight.device != labels.device:
            raise ValueError(
                f"objective {self.name!r} must return one floating-point weight per token, shaped "
                f"{tuple(labels.shape)} on {labels.device}; got {tuple(weight.shape)} {weight.dtype} on {weight.device}"
            )
        return weight.float()


_REGISTRY: dict[str, Callable[..., Objective]] = {}


def register(constructor: Callable[..., Objective]) -> Callable[..., Objective]:
    """Make the function's name a name of an objective, for `resolve_objective` and `--sft-loss`."""
    _REGISTRY[constructor.__name__] = constructor
    return constructor


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
    beta: float = 1.0, gamma_min: float = 0.1, gamma_max: float = 2.0, gamma_lambda: float | Tensor = 1.0
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

    def raw_gamma(statistics: TokenStatistics) -> Tensor:
        return (statistics.centered_log_likelihood / -beta).exp().clamp(gamma_min, gamma_max)

    def gamma(statistics: TokenStatistics) -> Tensor:
        raw = raw_gamma(statistics)
        return torch.lerp(torch.ones_like(raw), raw, gamma_lambda)  # exact at both ends, unlike 1 + lambda (raw - 1)

    def weight(statistics: TokenStatistics) -> Tensor:
        return (gamma(statistics) * statistics.log_prob).exp()

    hyperparameters = {"beta": beta, "gamma_min": gamma_min, "gamma_max": gamma_max, "gamma_lambda": gamma_lambda}
    return Objective("idft", KernelFormula("idft", weight, hyperparameters), gamma, raw_gamma, hyperparameters)


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
        concentration = statistics.sum_squared_prob
        if concentration is None:
            raise ValueError("objective 'deft' reads TokenStatistics.sum_squared_prob, which is None; give it")
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


def objective_names() -> tuple[str, ...]:
    """Names that `resolve_objective` accepts, in the order of this file."""
    return tuple(_REGISTRY)


def resolve_objective(
    objective: str | Objective,
    *,
    weight_floor: float | None = None,
    exempt_token_ids: Iterable[int] | None = None,
    **hyperparameters: Any,
) -> Objective:
    """An `Objective` from a name, an `Objective`, or a user's function given as "module:function".

    Args:
        objective: a name such as "idft"; an `Objective`; or "package.module:function", where function maps
            `TokenStatistics` to a weight [...], or is itself an `Objective`.
        weight_floor, exempt_token_ids: modifiers that go with every objective; None leaves them as they are.
        hyperparameters: arguments of a named objective, for example beta=1.0.

    Raises:
        ValueError, TypeError: the specification does not name an objective, or does not take these hyper-parameters.
    """
    if isinstance(objective, str) and ":" not in objective:
        resolved = _build(objective, hyperparameters)
    else:
        if hyperparameters:
            raise TypeError(
                f"hyper-parameters {', '.join(sorted(hyperparameters))} go with a named objective "
                f"({', '.join(_REGISTRY)}) only; set them where {objective!r} is built"
            )
        if isinstance(objective, str):
            resolved = _load(objective)
        elif isinstance(objective, Objective):
            resolved = objective
        else:
            raise TypeError(
                f"objective must be a name ({', '.join(_REGISTRY)}), an Objective or 'module:function', got "
                f"{type(objective).__name__}; wrap a function as Objective(name, function)"
            )
    if weight_floor is not None:
        resolved = resolved.with_weight_floor(weight_floor)
    if exempt_token_ids is not None:
        resolved = resolved.with_exempt_tokens(exempt_token_ids)
    return resolved


def _build(name: str, hyperparameters: dict[str, Any]) -> Objective:
    constructor = _REGISTRY.get(name)
    if constructor is None:
        raise ValueError(
            f"unknown objective {name!r}: choose from {', '.join(_REGISTRY)}, or give your own as 'module:function'"
        )
    accepted = inspect.signature(constructor).parameters
    unknown = sorted(set(hyperparameters) - set(accepted))
    if unknown:
        raise TypeError(
            f"objective {name!r} has no hyper-parameter {', '.join(unknown)}; it takes {', '.join(accepted) or 'none'}"
        )
    return constructor(**hyperparameters)


def _load(spec: str) -> Objective:
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"objective {spec!r} must read 'module:function', for example 'my_losses:my_weight'")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"objective {spec!r}: cannot import {module_name!r} ({error}); put its folder on PYTHONPATH"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        raise ValueError(f"objective {spec!r}: module {module_name!r} ({module.__file__}) has no {attribute!r}")
    if isinstance(function, Objective):
        return function
    if not callable(function):
        raise ValueError(
            f"objective {spec!r}: {attribute!r} is a {type(function).__name__}; it must be a function "
            "f(statistics: TokenStatistics) -> weight, or an Objective"
        )
    return Objective(spec, function)


@dataclass(frozen=True)
class LambdaSchedule:
    """gamma_lambda over training (arXiv 2602.12222): 0 during the warm-up, linear over the ramp, then 1.

    An iteration number is the count of iterations completed before the step: the first step of training has number 0,
    a run resumed from a checkpoint of iteration n continues with n. So steps 0 .. warmup_iterations - 1 train DFT; step
    warmup_iterations + k of the ramp has lambda = k / ramp_iterations; from step warmup + ramp on, lambda is 1.
    """

    warmup_iterations: int
    ramp_iterations: int

    def __post_init__(self) -> None:
        for name in ("warmup_iterations", "ramp_iterations"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0 (0 turns it off), got {getattr(self, name)}")

    @classmethod
    def from_shares(cls, warmup_share: float, ramp_share: float, train_iterations: int) -> "LambdaSchedule":
        """Shares of training as absolute iterations; both ends of the ramp are rounded to the nearest iteration."""
        for name, share in (("warmup_share", warmup_share), ("ramp_share", ramp_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be a share of training in [0, 1], got {share}")
        if warmup_share + ramp_share > 1 + 1e-9:  # 0.7 + 0.3 and the like may exceed 1 by rounding
            raise ValueError(
                f"warmup_share + ramp_share must not exceed 1, or lambda never reaches 1; "
                f"got {warmup_share} + {ramp_share}"
            )
        if train_iterations <= 0:
            raise ValueError(f"train_iterations must be > 0, got {train_iterations}")
        ramp_start = round(warmup_share * train_iterations)
        ramp_end = round((warmup_share + ramp_share) * train_iterations)
        return cls(ramp_start, ramp_end - ramp_start)

    def value(self, iteration: int) -> float:
        """lambda of the step that follows `iteration` completed iterations."""
        done = iteration - self.warmup_iterations
        if done < 0:
            return 0.0
        return 1.0 if done >= self.ramp_iterations else done / self.ramp_iterations
