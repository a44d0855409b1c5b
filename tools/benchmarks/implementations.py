"""What the loss benchmark compares: this repository's backends and plain torch. `peers` adds other libraries.

Bytes per logit element are counted from the source: every pass of every kernel over a tensor of the logits' shape, with
the width of what it reads and writes. Per-token tensors are left out: they are less than 1/100 of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from emulated_group import EmulatedGroup
from torch import Tensor

from megatron_idft import vocab_parallel_loss
from megatron_idft.statistics import LOWEST

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# (bytes of a logit, share of trained tokens) -> bytes per element
Bytes = Callable[[int, float], float]


@dataclass(frozen=True)
class Implementation:
    """One way to compute a loss.

    Attributes:
        formula: the name of an objective (objectives.py), or "statistics" (log_prob + entropy, forward only).
        run: logits [s, b, V/tp], labels [s, b], group -> [s, b] of the formula's values, differentiable.
        forward_bytes, backward_bytes: counted bytes per element; None where nobody has counted.
        ours: belongs to this repository; goals and ratios are about one of these.
        reads_ignored_labels: takes negative labels. Others get a valid label there, and an upstream gradient of 0.
        needs_group: wants a group without tensor parallelism too.
        empty_state: what its all-gather brings from a rank without columns (emulated_group.py).
        dtypes: of logits that it takes.
    """

    name: str
    formula: str
    run: Callable[[Tensor, Tensor, EmulatedGroup | None], Tensor]
    forward_bytes: Bytes | None = None
    backward_bytes: Bytes | None = None
    ours: bool = False
    reads_ignored_labels: bool = True
    needs_group: bool = False
    empty_state: tuple[float, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS


def ours() -> list[Implementation]:
    """The Triton backend four times over, and the reference backend."""

    def loss(objective: str, backend: str, overwrite: bool) -> Callable[..., Tensor]:
        def run(logits: Tensor, labels: Tensor, group: EmulatedGroup | None) -> Tensor:
            settings = {"tp_group": group, "backend": backend, "overwrite_logits": overwrite}
            return vocab_parallel_loss(logits, labels, objective, **settings).loss

        return run

    def phi(backend: str) -> Callable[..., Tensor]:
        def run(logits: Tensor, labels: Tensor, group: EmulatedGroup | None) -> Tensor:
            out = vocab_parallel_loss(logits, labels, "idft", group, backend=backend)
            return out.log_prob + out.entropy

        return run

    state = {"ours": True, "empty_state": (LOWEST, 0.0, 0.0, LOWEST)}
    # Reads trained rows once in forward; reads trained rows and writes all rows in backward, in place or elsewhere.
    triton = {
        **state,
        "forward_bytes": lambda width, trained: width * trained,
        "backward_bytes": lambda width, trained: width * (trained + 1),
    }
    # Passes over an fp32 block, all rows alike. Forward: convert (unless fp32), max, subtract, exp, sum, multiply,
    # nansum. Backward: convert, subtract, exp, multiply, mask, convert. A block that stays in the L2 cache is cheaper.
    reference = {
        **state,
        "forward_bytes": lambda width, trained: (0 if width == 4 else width + 4) + 40,
        "backward_bytes": lambda width, trained: 32 if width == 4 else 2 * (width + 4) + 32,
    }
    return [
        Implementation("triton idft, overwriting", "idft", loss("idft", "triton", True), **triton),
        Implementation("triton ce, overwriting", "ce", loss("ce", "triton", True), **triton),
        Implementation("triton idft, copying", "idft", loss("idft", "triton", False), **triton),
        Implementation("triton ce, copying", "ce", loss("ce", "triton", False), **triton),
        Implementation("reference idft, overwriting", "idft", loss("idft", "reference", True), **reference),
        Implementation("triton log_prob+entropy", "statistics", phi("triton"), **triton),
        Implementation("reference log_prob+entropy", "statistics", phi("reference"), **reference),
    ]


def plain_torch() -> list[Implementation]:
    """The formulas written down as they stand, for torch.compile and without it. One shard only."""

    def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        return log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1), entropy

    def idft(logits: Tensor, labels: Tensor) -> Tensor:
        log_prob, entropy = statistics(logits, labels)
        gamma = torch.exp(-(log_prob + entropy)).clamp(0.1, 2.0)
        weight = torch.exp(gamma * log_prob).detach()
        return torch.where(labels >= 0, -weight * log_prob, 0.0)

    def phi(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.where(labels >= 0, sum(statistics(logits, labels)), 0.0)

    def without_group(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda logits, labels, group: function(logits, labels)

    return [
        Implementation("torch.compile idft", "idft", without_group(torch.compile(idft, dynamic=False))),
        Implementation(
            "torch.compile log_prob+entropy", "statistics", without_group(torch.compile(phi, dynamic=False))
        ),
        Implementation("torch eager log_prob+entropy", "statistics", without_group(phi)),
    ]


def expected(formula: str, logits: Tensor, labels: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
    """Float64 values [T] and gradient [T, V] (None for statistics) of rows [T, V], written down naively."""
    z = logits.double()
    log_probs = torch.log_softmax(z, dim=-1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(dim=-1)
    trained = labels >= 0
    target = labels.clamp(min=0).unsqueeze(-1)
    log_prob = log_probs.gather(-1, target).squeeze(-1)
    if formula == "statistics":
        return torch.where(trained, log_prob + entropy, 0.0), None
    if formula not in ("ce", "idft"):
        from objectives import expected_objective

        return expected_objective(formula, logits, labels, upstream)
    weight = torch.ones_like(log_prob)
    if formula == "idft":
        weight = torch.exp(torch.exp(-(log_prob + entropy)).clamp(0.1, 2.0) * log_prob)
    scale = torch.where(trained, weight * upstream.double(), 0.0).unsqueeze(-1)
    onehot = torch.zeros_like(probs).scatter_(-1, target, 1.0)
    return torch.where(trained, -weight * log_prob, 0.0), scale * (probs - onehot)
