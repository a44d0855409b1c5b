"""The refusals of `vocab_parallel_loss`, each with its remedy."""

import torch
from torch import Tensor

from megatron_idft.objectives import Objective
from megatron_idft.statistics import Reference

LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_tensors(logits: Tensor, labels: Tensor) -> None:
    """Whether logits [..., V/tp] and labels [...] go together.

    Raises:
        TypeError, ValueError: they do not.
    """
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V/tp] with at least one column, got shape {tuple(logits.shape)}")
    if logits.dtype not in LOGITS_DTYPES:
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


def checked_reference(reference: Reference | None, objective: Objective, labels: Tensor) -> tuple[Tensor | None, ...]:
    """log_prob and entropy [...], top_ids and top_log_prob [..., K], each None where the objective does not read it.

    Raises:
        TypeError, ValueError: the objective reads what is not given, or it does not go with the labels.
    """
    has_kl = objective.kl_coefficient is not None
    if not (objective.reference_statistics or has_kl):
        return None, None, None, None
    reads = {
        "log_prob": True,
        "entropy": "reference_entropy" in objective.reference_statistics,
        "top_ids": has_kl,
        "top_log_prob": has_kl,
    }
    given = [
        _checked(name, None if reference is None else getattr(reference, name), objective, labels) if read else None
        for name, read in reads.items()
    ]
    log_prob, entropy, top_ids, top_log_prob = given
    if top_ids is not None and top_log_prob is not None and top_ids.shape != top_log_prob.shape:
        raise ValueError(f"top_ids {tuple(top_ids.shape)} and top_log_prob {tuple(top_log_prob.shape)} must be alike")
    return log_prob, entropy, top_ids, top_log_prob


def _checked(name: str, value: Tensor | None, objective: Objective, labels: Tensor) -> Tensor:
    """One of the reference's tensors."""
    if value is None:
        raise ValueError(
            f"objective {objective.name!r} reads {name} of the reference model: pass it in reference=Reference(...),"
            " its values of the same labels"
        )
    whole = name == "top_ids"
    if value.is_floating_point() == whole:
        raise TypeError(f"{name} must be of {'an integer' if whole else 'a floating'} dtype, got {value.dtype}")
    shape = value.shape[:-1] if name.startswith("top") else value.shape
    if shape != labels.shape or value.device != labels.device:
        raise ValueError(
            f"{name} must have the labels' shape {tuple(labels.shape)}{' and K' * name.startswith('top')} on"
            f" {labels.device}, got {tuple(value.shape)} on {value.device}"
        )
    return value.detach()


def check_overwritable(logits: Tensor) -> None:
    """Whether the gradient may be written into the memory of logits [..., V/tp].

    Raises:
        ValueError: the logits are a leaf or a view of one, or their elements share memory.
    """
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


def reject_invalid_labels(labels: Tensor, vocab_size: int) -> None:
    """Whether all labels [...] int64 on the CPU are below `vocab_size`.

    Raises:
        ValueError: one is not.
    """
    invalid = labels[labels >= vocab_size]
    if invalid.numel():
        raise ValueError(
            f"{invalid.numel()} of {labels.numel()} labels are >= vocab_size {vocab_size}, the first being "
            f"{int(invalid[0])}; check that data and model use one tokenizer, or set vocab_size"
        )


def under_hooks_on_saved_tensors() -> bool:
    """Whether autograd hands what it saves to hooks. It then does not notice that a saved tensor has changed."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def reject_hooks_on_saved_tensors() -> None:
    """Whether a compiled graph may overwrite its logits here.

    Raises:
        RuntimeError: it runs under saved-tensor hooks.
    """
    if under_hooks_on_saved_tensors():
        raise RuntimeError(
            "overwrite_logits=True in a compiled function cannot run under saved-tensor hooks (activation "
            "checkpointing, offloading): autograd would not notice that the logits have changed. Pass "
            "overwrite_logits=False there"
        )
