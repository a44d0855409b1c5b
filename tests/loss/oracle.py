"""The loss in float64, written down naively: formulas, a frozen weight, autograd."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Expected(NamedTuple):
    loss: Tensor
    weight: Tensor
    log_prob: Tensor
    entropy: Tensor
    grad: Tensor


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
    weight = naive_weight(objective, log_prob.detach(), entropy.detach(), squares, vocab_size, gamma_lambda)
    weight = weight.clamp(min=weight_floor)
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
    objective: str, log_prob: Tensor, entropy: Tensor, squares: Tensor, vocab_size: int, gamma_lambda: float
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
    assert objective == "entropy"
    return entropy / math.log(vocab_size) if vocab_size > 1 else torch.zeros_like(entropy)


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
    scale = max(expected.grad.abs().max().item(), 1.0) if grad.numel() else 1.0
    _assert_within("grad", grad, expected.grad, (half_ulp + 1e-5) * expected.grad.abs() + half_spacing + 4e-7 * scale)


def _assert_within(name: str, actual: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    assert actual.shape == expected.shape, name
    excess = (actual.double() - expected).abs() - tolerance
    if not (excess <= 0).all():  # NaN must fail
        worst = int(excess.nan_to_num(torch.inf).argmax())
        got, want, allowed = actual.flatten()[worst], expected.flatten()[worst], tolerance.flatten()[worst]
        raise AssertionError(f"{name}: {got:.9g} instead of {want:.9g} at flat index {worst}, allowed +-{allowed:.3g}")
