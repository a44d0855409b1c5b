"""Every named objective as an implementation for the loss benchmark, with values of a reference where it reads them.

What the reference says is a function of the label alone, so that rows can be compared with float64 by themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
from emulated_group import EmulatedGroup
from implementations import Implementation
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_idft import Objective, Reference, idft, resolve_objective, vocab_parallel_loss
from megatron_idft.objective_table import OBJECTIVES
from megatron_idft.statistics import LOWEST, STATE_SIZE, TokenStatistics, extra_state_columns

K = 20
SECTOR = 32  # bytes that the memory moves for one element alone
NAMES = (*OBJECTIVES, "idft of the reference")


def objective_of(name: str) -> Objective:
    return idft(weights="reference") if name == "idft of the reference" else resolve_objective(name)


def every_objective() -> list[Implementation]:
    """One for each of NAMES but `ce` and `idft`, which the benchmark has; the gradient overwrites the logits."""
    return [_implementation(name) for name in NAMES if name not in ("ce", "idft")]


def _implementation(name: str) -> Implementation:
    objective = objective_of(name)
    extra = len(extra_state_columns(objective.extra_statistics))
    known: dict[str, Any] = {}

    def run(logits: Tensor, labels: Tensor, group: EmulatedGroup | None) -> Tensor:
        if known.get("labels") is not labels:  # made once: in a training it comes with the batch
            known.update(labels=labels, reference=reference_of(labels, logits.shape[-1]))
        settings = {"tp_group": group, "backend": "triton", "overwrite_logits": True, "reference": known["reference"]}
        return vocab_parallel_loss(logits, labels, objective, **settings).loss

    return Implementation(
        f"triton {name}, overwriting",
        name,
        run,
        lambda width, trained: width * trained,
        lambda width, trained: width * (trained + 1),
        ours=True,
        empty_state=(LOWEST, 0.0, 0.0, LOWEST, *[0.0] * extra)[: STATE_SIZE + extra],
    )


def reference_of(labels: Tensor, columns: int) -> Reference:
    """log q from near 0 to -10, entropies up to 3, and K tokens from the label on with falling probabilities."""
    label = labels.clamp(min=0)
    k = min(K, columns - 1)
    places = torch.arange(k, device=labels.device)
    top_ids = (label.unsqueeze(-1) + places) % columns
    top_log_prob = -(places + 1) * 0.75  # 0.9 of the mass
    return Reference(
        -(label % 977) / 97.7 - 1e-3,
        (label % 31) / 10.0,
        top_ids.int(),
        top_log_prob.expand(top_ids.shape).contiguous(),
    )


def expected_objective(name: str, logits: Tensor, labels: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 values [T] and gradient [T, V] of rows [T, V], with the whole softmax."""
    objective, reference = objective_of(name), reference_of(labels, logits.shape[-1])
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    probs = log_probs.exp()
    trained = labels >= 0
    target = labels.clamp(min=0).unsqueeze(-1)
    log_prob = log_probs.gather(-1, target).squeeze(-1)
    statistics = TokenStatistics(
        log_prob,
        -(probs * log_probs).sum(dim=-1),
        labels,
        logits.shape[-1],
        sum_squared_prob=probs.square().sum(dim=-1),
        reference_log_prob=reference.log_prob.double(),
        reference_entropy=None if reference.entropy is None else reference.entropy.double(),
    )
    weight = objective.token_weight(statistics)
    onehot = torch.zeros_like(probs).scatter_(-1, target, 1.0)
    values, gradient = -weight * log_prob, weight.unsqueeze(-1) * (probs - onehot)
    if objective.kl_coefficient is not None and reference.top_ids is not None and reference.top_log_prob is not None:
        coefficient = objective.kl_coefficient(statistics)
        ids, q = reference.top_ids.long(), reference.top_log_prob.double().exp()
        rest_q, rest_p = 1 - q.sum(-1), (1 - probs.gather(-1, ids).sum(-1)).clamp(min=1e-5)
        kl = (q * (q.log() - log_probs.gather(-1, ids))).sum(-1) + rest_q * (rest_q / rest_p).log()
        # Of the others the reference knows the sum: their part of it follows the model.
        others = probs.scatter(-1, ids, 0.0) * (rest_q / rest_p).unsqueeze(-1)
        values = values + coefficient * kl
        gradient = gradient + coefficient.unsqueeze(-1) * (probs - others.scatter(-1, ids, q))
    scale = torch.where(trained, upstream.double(), 0.0).unsqueeze(-1)
    return torch.where(trained, values, 0.0), scale * gradient


class TokenBytes(TorchDispatchMode):
    """Bytes that torch's operations read and write beside kernels of ours, tensors of the logits' size left out.

    An element that is picked out of the logits counts as the sector that the memory moves for it. `stored` elements of
    the gradient are written by a kernel of ours.
    """

    def __init__(self, logits_elements: int) -> None:
        super().__init__()
        self.total, self._largest = 0, logits_elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[-1] not in _VIEWS:
            read = [value for value in args if isinstance(value, Tensor)]
            written = result if isinstance(result, tuple | list) else (result,)
            picked = any(value.numel() >= self._largest for value in read)
            for value in (*read, *written):
                if isinstance(value, Tensor) and value.numel() < self._largest:
                    self.total += value.numel() * (SECTOR if picked else value.element_size())
        return result


_VIEWS = {
    *("view", "unsqueeze", "squeeze", "expand", "transpose", "t", "select", "slice", "detach", "alias", "as_strided"),
    *("empty", "empty_like", "new_empty", "_unsafe_view", "reshape", "unbind", "split", "permute"),
}


def top_k_bytes(name: str, call: Callable[[], object], tokens: int, columns: int, width: int) -> dict[str, float]:
    """Of an objective with a divergence to a top K: counted bytes per token beside those of IDFT, and all over IDFT's.

    Args:
        name: of a formula; of others nothing is counted.
        call: runs forward and backward once.
        tokens, columns, width: of the logits, and the bytes of one.
    """
    if name == "statistics" or objective_of(name).kl_coefficient is None:
        return {}
    with TokenBytes(tokens * columns) as counted:
        call()
    # The kernel that writes the K elements reads their places and values, and moves a sector for each.
    beside = counted.total / tokens + K * (8 + 4 + SECTOR)
    idft = 3 * columns * width  # reads in forward; reads and writes in backward
    return {"token_bytes": beside, "token_bytes_over_idft": 1 + beside / idft}
