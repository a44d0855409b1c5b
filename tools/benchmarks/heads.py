"""What the benchmark of the output head compares: this repository and torch. head_peers.py adds other libraries.

Every head gets the same hidden states, weight and labels, and returns the sum of the trained tokens' losses times a
scale, as a trainer hands it to backward. Those that compute cross-entropy have less to do than those of IDFT, which
need the entropy of each token for its weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from emulated_group import EmulatedGroup
from torch import Tensor

from megatron_idft import vocab_parallel_loss
from megatron_idft.loss.linear import UpstreamWatch, vocab_parallel_linear_loss
from megatron_idft.statistics import LOWEST

IGNORED = -100


class Inputs(NamedTuple):
    """Of one call.

    Attributes:
        hidden: [T, H], a leaf.
        weight: [V/tp, H], a leaf, with a `main_grad` [V/tp, H] fp32, as in a training.
        labels: [T], -100 where ignored; all of them among this rank's columns.
        trained: number of labels that are not ignored.
        scale: what the losses' sum is multiplied with: 1 / trained.
        group: the tensor-parallel group; None without, but for heads that want one always.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    trained: int
    scale: float
    group: EmulatedGroup | None


@dataclass(frozen=True)
class Head:
    """One way from hidden states to a loss and its gradients.

    Attributes:
        formula: "idft" or "ce", of the loss.
        run: inputs -> 0-dim sum of the formula's values over the trained tokens, times `scale`.
        kind: of ours, what goals are about: "forward" (the gradients are computed there, the weight's into main_grad),
            "returned" (the same, but the weight's to autograd), "recompute", "frozen", "materialised".
        chunk: tokens of a chunk where they were chosen; 0: the default.
        products: matrix products of a call, each of 2 T H V/tp operations.
        counts_trained: untrained tokens are not multiplied.
        rounds_logits: statistics are taken of logits that were rounded to the dtype of the hidden states.
        tensor_parallel: takes a group.
        needs_group: wants a group without tensor parallelism too.
        opaque: one operation of torch, whose memory only the allocator of a GPU sees.
        empty_state: what its all-gather brings from a rank without columns (emulated_group.py).
    """

    name: str
    formula: str
    run: Callable[[Inputs], Tensor]
    ours: bool = False
    kind: str = ""
    chunk: int = 0
    products: int = 3
    counts_trained: bool = False
    rounds_logits: bool = True
    tensor_parallel: bool = False
    needs_group: bool = False
    opaque: bool = False
    empty_state: tuple[float, ...] = ()


def fused(name: str, kind: str = "forward", chunk: int = 0, backend: str = "auto", products: int = 3) -> Head:
    """Ours, IDFT with entropy and weight."""

    def run(inputs: Inputs) -> Tensor:
        device = inputs.hidden.device
        out = vocab_parallel_linear_loss(
            inputs.hidden,
            inputs.weight,
            inputs.labels,
            "idft",
            inputs.group,
            backend=backend,
            num_trained=inputs.trained,
            chunk_tokens=chunk or None,
            gradients_in_forward=kind != "recompute",
            loss_scale=inputs.scale,
            watch=UpstreamWatch(on_host=False, misfits=torch.zeros((), dtype=torch.int32, device=device)),
            fuse_wgrad_accumulation=kind in ("forward", "recompute"),
        )
        return out.loss.sum() * inputs.scale

    return Head(
        name,
        "idft",
        run,
        ours=True,
        kind=kind,
        chunk=chunk,
        products=products,
        counts_trained=True,
        rounds_logits=False,
        tensor_parallel=True,
        empty_state=(LOWEST, 0.0, 0.0, LOWEST),
    )


def ours(chunks: tuple[int, ...], backend: str = "auto") -> list[Head]:
    """The fused head with the default chunk and with these, its other forms, and the loss on materialised logits."""

    def materialised(inputs: Inputs) -> Tensor:
        logits = torch.nn.functional.linear(inputs.hidden, inputs.weight)
        settings: dict[str, Any] = {"backend": backend, "overwrite_logits": True}
        return vocab_parallel_loss(logits, inputs.labels, "idft", inputs.group, **settings).loss.sum() * inputs.scale

    return [
        fused("fused", backend=backend),
        *(fused(f"fused, chunks of {chunk}", chunk=chunk, backend=backend) for chunk in chunks),
        fused("fused, dW to autograd", "returned", backend=backend),
        fused("fused, recomputing", "recompute", backend=backend, products=4),
        fused("fused, frozen head", "frozen", backend=backend, products=2),
        Head(
            "materialised, overwriting",
            "idft",
            materialised,
            ours=True,
            kind="materialised",
            tensor_parallel=True,
            empty_state=(LOWEST, 0.0, 0.0, LOWEST),
        ),
    ]


def torch_heads() -> list[Head]:
    """torch's own chunked head, where this torch has one (from 2.13)."""
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        return []

    def run(inputs: Inputs) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
        named = {"reduction": "sum", "ignore_index": IGNORED, "options": options}
        loss: Tensor = function(inputs.hidden, inputs.weight, inputs.labels, **named)
        return loss * inputs.scale

    return [Head("torch linear_cross_entropy", "ce", run, opaque=True)]
