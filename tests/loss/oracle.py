"""The loss in float64, written down naively: formulas, a frozen weight, autograd."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_idft import Objective, Reference, asft, idft, resolve_objective
from megatron_idft.objectives import objective_names


class Expected(NamedTuple):
    loss: Tensor
    weight: Tensor
    log_prob: Tensor
    entropy: Tensor
    grad: Tensor


# Beside the names: settings that make another formula of an objective.
VARIANTS = {
    "idft of the reference": idft(weights="reference"),
    "asft, strong": asft(coefficient=2.0),  # most of its weights are negative
}


def objective_of(name: str | Objective) -> Objective:
    """The objective of this name, a variant included."""
    return VARIANTS[name] if name in VARIANTS else resolve_objective(name)


_READ_REFERENCE = {name: bool(objective_of(name).reference_statistics) for name in (*objective_names(), *VARIANTS)}


def reads_reference(objective: str | Objective) -> bool:
    return (
        bool(objective.reference_statistics)
        if isinstance(objective, Objective)
        else _READ_REFERENCE.get(objective, False)
    )


def reference_of(labels: Tensor) -> Reference:
    """What some reference says of labels [...]: near p or far from it, sure or not, NaN where nothing is trained."""
    generator = torch.Generator().manual_seed(labels.numel())
    log_prob = -12 * torch.rand(labels.shape, generator=generator) ** 3 - 1e-4
    entropy = 4 * torch.rand(labels.shape, generator=generator)
    return Reference(*(torch.where(labels >= 0, value, torch.nan) for value in (log_prob, entropy)))


def expected_loss(
    logits: Tensor,
    labels: Tensor,
    objective: str,
    vocab_size: int | None = None,
    upstream: Tensor | None = None,
    gamma_lambda: float = 1.0,
    weight_floor: float = 0.0,
    exempt: tuple[int, ...] = (),
) -> Expected:
    """Everything in float64, from the whole (padded) logits [..., V]; `grad` [..., V] is for d sum(upstream * loss)."""
    vocab_size = vocab_size or logits.shape[-1]
    trained = labels >= 0
    z = logits.detach().double()[..., :vocab_size]
    z = torch.where(trained.unsqueeze(-1), z, torch.zeros_like(z)).requires_grad_()
    log_probs = z.log_softmax(-1)
    probs = log_probs.exp()
    entropy = -torch.where(probs > 0, probs * log_probs, torch.zeros_like(probs)).sum(-1)
    log_prob = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    squares = probs.detach().square().sum(-1)
    weight = naive_weight(objective, log_prob.detach(), entropy.detach(), squares, vocab_size, gamma_lambda, labels)
    weight = torch.where(trained, weight, 0.0)  # a reference is NaN where nothing is trained
    weight = weight.clamp(min=weight_floor) if weight_floor else weight
    for token_id in exempt:
        weight = torch.where(labels == token_id, torch.ones_like(weight), weight)
    zero = torch.zeros_like(weight)
    loss = torch.where(trained, -(weight * log_prob), zero)
    upstream = torch.ones_like(loss) if upstream is None else upstream.double()
    (grad,) = torch.autograd.grad((upstream * loss).sum(), z)
    padded = torch.zeros(logits.shape, dtype=torch.float64)
    padded[..., :vocab_size] = grad
    return Expected(
        loss.detach(),
        torch.where(trained, weight, zero),
        torch.where(trained, log_prob, zero).detach(),
        torch.where(trained, entropy, zero).detach(),
        padded,
    )


def naive_weight(
    objective: str,
    log_prob: Tensor,
    entropy: Tensor,
    squares: Tensor,
    vocab_size: int,
    gamma_lambda: float,
    labels: Tensor,
) -> Tensor:
    if objective == "ce":
        return torch.ones_like(log_prob)
    if objective == "dft":
        return log_prob.exp()
    if objective == "idft":
        gamma = (-(log_prob + entropy)).exp().clamp(0.1, 2.0)
        return ((1 + gamma_lambda * (gamma - 1)) * log_prob).exp()
    if objective == "power":
        return log_prob.exp().sqrt()
    if objective == "chord":
        return log_prob.exp() * -log_prob.expm1()
    if objective == "deft":
        return log_prob.exp() ** squares * squares / (squares + 1e-6)
    if objective == "cll":
        return (log_prob + entropy).exp().clamp(max=1.0)
    if objective != "entropy":
        return _naive_reference_weight(objective, log_prob, labels)
    return entropy / math.log(vocab_size) if vocab_size > 1 else torch.zeros_like(entropy)


def _naive_reference_weight(objective: str, log_prob: Tensor, labels: Tensor) -> Tensor:
    q, entropy = (value.double() for value in reference_of(labels)[:2])
    q, p = q.exp(), log_prob.exp()
    anchor = torch.where(q < 10 * p, q / p, 10.0) - 1
    if objective == "idft of the reference":
        return q ** (1 / (q * entropy.exp())).clamp(0.1, 2.0)
    return {
        "prift": q,
        "asft": p + 0.03 * anchor,
        "asft, strong": p + 2 * anchor,
        "sft_k3": 1 + 0.03 * anchor,
        "minor_sft": 2 / (1 + (p / q) ** 0.1),
        "iw": (p / q).clamp(0.2, 1.8),
        "psft": torch.where(p < 1.2 * q, p / q, 0.0),
    }[objective]


def assert_matches(actual: "dict[str, Tensor]", expected: Expected) -> None:
    """Values and gradient within fp32 arithmetic, the gradient rounded once to its dtype.

    An fp32 sum of exponentials is good to a few 2^-24 = 6e-8 relative and its logarithm to the same absolutely, hence
    the absolute part; a log_prob adds half an ulp of its own size, hence the relative part; a weight p^gamma amplifies
    that by gamma log p, and the loss multiplies the weight's error by log_prob. Storing a gradient costs half an ulp of
    its dtype: 2^-8 relative in bf16, 2^-11 in fp16 with a spacing of 2^-24 near 0. A second rounding doubles that and
    is caught.
    """
    for name in ("loss", "weight", "log_prob", "entropy"):
        assert actual[name].dtype == torch.float32
        tolerance = 1e-5 * getattr(expected, name).abs() + 1e-6
        if name == "loss":
            tolerance = tolerance + 1e-6 * expected.log_prob.abs()
        _assert_within(name, actual[name], getattr(expected, name), tolerance)
    grad = actual["grad"]
    half_ulp, half_spacing = {torch.float32: (0, 0), torch.bfloat16: (2**-8, 0), torch.float16: (2**-11, 2**-25)}[
        grad.dtype
    ]
    scale = max(expected.grad.abs().max().item(), expected.weight.max().item(), 1.0) if grad.numel() else 1.0
    _assert_within("grad", grad, expected.grad, (half_ulp + 1e-5) * expected.grad.abs() + half_spacing + 4e-7 * scale)


def _assert_within(name: str, actual: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    assert actual.shape == expected.shape, name
    excess = (actual.double() - expected).abs() - tolerance
    if not (excess <= 0).all():  # NaN must fail
        worst = int(excess.nan_to_num(torch.inf).argmax())
        got, want, allowed = actual.flatten()[worst], expected.flatten()[worst], tolerance.flatten()[worst]
        raise AssertionError(f"{name}: {got:.9g} instead of {want:.9g} at flat index {worst}, allowed +-{allowed:.3g}")
