"""The vocabulary-parallel token loss. One module per backend; `vocab_parallel_loss` is the only entry.

May import statistics, objectives and torch. Begin with `vocab_parallel_loss` below, then autograd.py.
"""

import functools
import importlib.util
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_idft.loss.autograd import Backend, TokenLoss
from megatron_idft.loss.shard import VocabShard, vocab_shard
from megatron_idft.objectives import Objective, resolve_objective
from megatron_idft.statistics import MergedState, merge_shard_states

# A backend is a module with the functions of `autograd.Backend`, imported when it is first used.
_BACKENDS = {"reference": "megatron_idft.loss.reference", "triton": "megatron_idft.loss.triton_backend"}

_LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class LossOutput(NamedTuple):
    """Per-token results, each [...] fp32 and 0 at ignored positions; only `loss` carries gradient.

    Attributes:
        loss: -weight * log_prob.
        weight: the objective's detached weight.
        log_prob: log p of the label, in nats.
        entropy: H of the distribution over the true vocabulary, in nats.
        invalid_labels: 0-dim int64, the number of labels >= vocab_size. They count as ignored; data that holds any is
            broken, so read this where a host synchronisation is due anyway, and stop. Always 0 for labels on the CPU.
    """

    loss: Tensor
    weight: Tensor
    log_prob: Tensor
    entropy: Tensor
    invalid_labels: Tensor


def resolve_backend(name: str = "auto", device: torch.device | str = "cpu") -> str:
    """The backend that `vocab_parallel_loss(..., backend=name)` uses for logits on `device`.

    "auto" is triton on a CUDA device where the package triton is installed, else reference.

    Raises:
        ValueError: there is no such backend, or it cannot run here.
    """
    device = torch.device(device)
    if name == "auto":
        return "triton" if device.type == "cuda" and _has_triton() else "reference"
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose from auto, {', '.join(_BACKENDS)}")
    if name == "triton":
        if not _has_triton():
            raise ValueError("backend 'triton' needs the package triton: pip install triton, or use backend='auto'")
        if device.type != "cuda" and not import_module(_BACKENDS[name]).INTERPRETED:
            raise ValueError(
                f"backend 'triton' needs logits on a CUDA device, got {device}; use backend='auto' or 'reference' (for "
                "tests, TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, slowly)"
            )
    return name


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def vocab_parallel_loss(
    logits: Tensor,
    labels: Tensor,
    objective: str | Objective = "idft",
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
    *,
    overwrite_logits: bool = False,
    cross_entropy_values: bool = False,
) -> LossOutput:
    """Per-token loss -w log p(label) over a vocabulary that may be split over tensor-parallel ranks.

    Statistics, sums and the gradient are computed in fp32 whatever the logits' dtype; the gradient
    w (softmax - onehot) is rounded once, when it is stored in the logits' dtype. Columns >= vocab_size are padding:
    they enter no sum and get zero gradient. Ignored positions give 0 everywhere even where their logits are NaN or Inf;
    at a trained position NaN or +Inf give NaN, while -Inf is a probability of 0.

    Args:
        logits: [..., V/tp] bf16, fp16 or fp32: this rank's columns, rank r of `tp_group` holding the r-th equal part of
            the (padded) vocabulary. Read where they lie, with any strides, in forward and again in backward.
        labels: [...] int64 global token ids, the same on every rank; negative = ignored.
        objective: a name, "module:function" or an `Objective`, see `resolve_objective`.
        tp_group: None without tensor parallelism.
        vocab_size: size of the true vocabulary; None: all columns count.
        backend: "auto", "reference" or "triton", see `resolve_backend`.
        overwrite_logits: write the gradient into the logits' own memory in backward instead of allocating a tensor of
            their size; the same bits. Afterwards `logits`, and every tensor that shares their memory, hold the
            gradient. Sound where the logits are an intermediate result that nobody reads after backward, as those of
            a linear output layer are. Autograd watches over its own graph: an operation that saved the logits, such as
            the tanh of a soft cap or another loss on them, raises "modified by an inplace operation". It cannot watch
            under saved-tensor hooks (activation checkpointing, offloading): called there, the gradient is copied.
            Without gradient nothing is overwritten.
        cross_entropy_values: `loss` holds the values of plain cross-entropy, -log_prob, while its gradient stays the
            objective's: for trainers that log the loss and watch it for spikes.

    Returns:
        LossOutput, the same bits on every rank of `tp_group`.

    Collectives: one all-gather of fp32 [T, 4] over `tp_group` in forward, none in backward. No host synchronisation, no
    data-dependent shapes.

    Raises:
        TypeError, ValueError: arguments that do not fit together, before any collective.
        ValueError: a label >= vocab_size, for labels on the CPU. On other devices `invalid_labels` counts them.
        ValueError: overwrite_logits with logits that are a leaf or a view of one (backward would destroy what is being
            trained), or whose elements share memory (an expanded tensor).
        RuntimeError: a second backward through a graph whose logits the first one has overwritten.
    """
    _check_tensors(logits, labels)
    overwrite_logits = overwrite_logits and logits.requires_grad and torch.is_grad_enabled()
    if overwrite_logits:
        _check_overwritable(logits)
        # Under these hooks, autograd does not notice that a tensor which another operation saved has changed.
        overwrite_logits = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    objective = resolve_objective(objective)
    implementation: Backend = import_module(_BACKENDS[resolve_backend(backend, logits.device)])
    shard, vocab_size = vocab_shard(logits.shape[-1], vocab_size, tp_group)
    if labels.device.type == "cpu":
        _reject_invalid(labels, vocab_size)
    results = TokenLoss.apply(
        logits, labels, objective, shard, vocab_size, implementation, overwrite_logits, cross_entropy_values
    )
    return LossOutput(*results)


def distribution_statistics(
    logits: Tensor, *, tp_group: ProcessGroup | None = None, vocab_size: int | None = None, backend: str = "auto"
) -> tuple[MergedState, VocabShard]:
    """Entropy and normaliser of each row's distribution, before any token of it is chosen; and this rank's shard.

    Arguments, errors and the one collective as in `vocab_parallel_loss`. The state's `log_prob` is that of token 0.
    """
    implementation: Backend = import_module(_BACKENDS[resolve_backend(backend, logits.device)])
    shard, vocab_size = vocab_shard(logits.shape[-1], vocab_size, tp_group)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    state = implementation.shard_state(logits, labels, shard, vocab_size, frozenset())
    return merge_shard_states(shard.gather_states(state)), shard


def _check_tensors(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V/tp] with at least one column, got shape {tuple(logits.shape)}")
    if logits.dtype not in _LOGITS_DTYPES:
        raise TypeError(f"logits must be bfloat16, float16 or float32, got {logits.dtype}; cast them first")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}; call labels.long()")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the logits' leading shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}; "
            "Megatron's logits are [s, b, V/tp], its labels [b, s]: transpose the labels"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels must be on the logits' device {logits.device}, got {labels.device}")


def _check_overwritable(logits: Tensor) -> None:
    owner = logits if logits._base is None else logits._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            "overwrite_logits=True would destroy the values of a leaf that requires grad: the logits are one, or a "
            "view of one. Pass overwrite_logits=False, or logits.clone()"
        )
    span = 0  # of the dimensions so far, from the least stride: a stride beyond it leads to memory of its own
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride <= span:
            raise ValueError(
                f"overwrite_logits=True needs logits whose elements lie in memory of their own, got shape "
                f"{tuple(logits.shape)} with strides {logits.stride()}, as an expanded tensor has. Pass "
                "overwrite_logits=False, or logits.contiguous()"
            )
        span += (size - 1) * stride


def _reject_invalid(labels: Tensor, vocab_size: int) -> None:
    invalid = labels[labels >= vocab_size]
    if invalid.numel():
        raise ValueError(
            f"{invalid.numel()} of {labels.numel()} labels are >= vocab_size {vocab_size}, the first being "
            f"{int(invalid[0])}; check that data and model use one tokenizer, or set vocab_size"
        )
