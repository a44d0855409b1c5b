"""Hidden states, an output layer and labels, and what the fused head must make of them, in float64."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.loss.oracle import Expected, expected_loss


class LinearCase(NamedTuple):
    """hidden [..., H], weight [V, H] of one dtype; labels [...] and the loss_mask [...] that losses are multiplied by.

    Attributes:
        vocab: the true vocabulary.
        bias: [V], or None.
        logit_scale: of the logits.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    loss_mask: Tensor
    vocab: int
    bias: Tensor | None = None
    logit_scale: float = 1.0

    @property
    def num_trained(self) -> int:
        return int((self.labels >= 0).sum())

    def on(self, device: str) -> "LinearCase":
        return LinearCase(*(value.to(device) if isinstance(value, Tensor) else value for value in self))

    def leaves(self) -> list[Tensor]:
        """Fresh hidden, weight and maybe bias that require gradient."""
        given = (self.hidden, self.weight, self.bias)
        return [value.clone().requires_grad_() for value in given if value is not None]

    def settings(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab, "logit_scale": self.logit_scale, "loss_mask": self.loss_mask}


def make_linear_case(
    shape: tuple[int, ...] = (7, 3),
    width: int = 16,
    padded: int = 97,
    vocab: int = 90,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    logit_scale: float = 1.0,
    seed: int = 0,
    trained: float = 0.7,
) -> LinearCase:
    """Labels from likely to hopeless; padding columns that would win every maximum, and weights of both signs."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=generator).to(dtype)
    weight = torch.randn(padded, width, generator=generator).to(dtype)
    weight[vocab:] *= 20
    offsets = torch.randn(padded, generator=generator).to(dtype) if bias else None
    labels = torch.randint(0, vocab, shape, generator=generator)
    likely = torch.rand(shape, generator=generator) < 0.4
    labels = torch.where(likely, (hidden.float() @ weight[:vocab].float().T).argmax(-1), labels)
    labels = torch.where(torch.rand(shape, generator=generator) < trained, labels, -100)
    mask = torch.rand(shape, generator=generator) + 0.5
    mask = torch.where(torch.rand(shape, generator=generator) < 0.3, -mask, mask)
    return LinearCase(hidden, weight, labels, mask, vocab, offsets, logit_scale)


class ExpectedLinear(NamedTuple):
    """As `LossOutput`, and the gradients of sum(factor * loss_mask * loss)."""

    values: Expected
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def expected_linear(case: LinearCase, objective: str, upstream: Tensor) -> ExpectedLinear:
    """In float64. upstream: [...] of the losses."""
    hidden, weight = case.hidden.double(), case.weight.double()
    logits = hidden @ weight.T
    if case.bias is not None:
        logits = logits + case.bias.double()
    values = expected_loss(logits * case.logit_scale, case.labels, objective, case.vocab, upstream)
    gradient = values.grad.flatten(0, -2) * case.logit_scale
    of_weight = gradient.T @ hidden.flatten(0, -2)
    of_bias = None if case.bias is None else gradient.sum(0)
    return ExpectedLinear(values, (gradient @ weight).view(hidden.shape), of_weight, of_bias)


def assert_close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """By norms: within fp32 sums, and in 16 bits a few roundings of 2^-9 or 2^-12 of terms that partly cancel.

    A gradient of nothing is exactly 0.
    """
    error, size = (actual.double() - expected).norm(), expected.norm()
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert error <= tolerance * size, f"{name}: off by {error / size:.3g}"
