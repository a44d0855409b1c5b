"""The refusals of `vocab_parallel_linear_loss`, each with its remedy."""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_idft.loss.checks import LOGITS_DTYPES


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sequence_group: ProcessGroup | None,
    fuse_wgrad_accumulation: bool,
) -> None:
    """Whether hidden [..., H], weight [V/tp, H], bias [V/tp] and labels [...] go together.

    Args:
        hidden, weight, bias, labels, fuse_wgrad_accumulation: of `vocab_parallel_linear_loss`.
        sequence_group: over whose ranks the first dimension of hidden is cut.

    Raises:
        TypeError, ValueError: they do not.
    """
    if hidden.dtype not in LOGITS_DTYPES or weight.dtype != hidden.dtype:
        raise TypeError(
            f"hidden and weight must both be bfloat16, float16 or float32, got {hidden.dtype} and {weight.dtype}: cast"
            " one of them"
        )
    if hidden.dim() < 2 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not len(weight):
        raise ValueError(
            f"hidden must be [..., H] and weight [V/tp, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got {tuple(bias.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}; call labels.long()")
    parts = 1 if sequence_group is None else sequence_group.size()
    first, *others = hidden.shape[:-1]
    if labels.shape != (first * parts, *others):
        raise ValueError(
            f"labels must have the shape {(first * parts, *others)} of all hidden states"
            f"{f', of which each of {parts} ranks has a part' * (parts > 1)}, got {tuple(labels.shape)}; Megatron's"
            " hidden states are [s, b, H], its labels [b, s]: transpose the labels"
        )
    devices = {value.device for value in (hidden, weight, bias, labels) if value is not None}
    if len(devices) > 1:
        raise ValueError(f"hidden, weight, bias and labels must be on one device, got {sorted(map(str, devices))}")
    main_grad = getattr(weight, "main_grad", None)
    if fuse_wgrad_accumulation and weight.requires_grad and (main_grad is None or main_grad.dtype != torch.float32):
        raise ValueError(
            "fuse_wgrad_accumulation needs weight.main_grad in fp32, as Megatron's DistributedDataParallel makes it,"
            f" got {None if main_grad is None else main_grad.dtype}: pass fuse_wgrad_accumulation=False"
        )


def check_numbers(chunk_tokens: int | None, logit_scale: float) -> None:
    """Whether these are within their ranges.

    Raises:
        ValueError: one is not.
    """
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, or None for the default, got {chunk_tokens}")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be a finite number, got {logit_scale}")


def check_mask(loss_mask: Tensor | None, labels: Tensor) -> Tensor:
    """loss_mask [...] as fp32, ones for None.

    Raises:
        ValueError: it is not of the labels' shape.
    """
    if loss_mask is None:
        return torch.ones(labels.shape, dtype=torch.float32, device=labels.device)
    if loss_mask.shape != labels.shape or loss_mask.device != labels.device:
        raise ValueError(
            f"loss_mask must have the labels' shape {tuple(labels.shape)} on {labels.device}, got"
            f" {tuple(loss_mask.shape)} on {loss_mask.device}"
        )
    return loss_mask.detach().float()


def reject_low_count(labels: Tensor, num_trained: int | None) -> None:
    """Whether labels [...] on the CPU have at most so many that are trained.

    Raises:
        ValueError: they have more.
    """
    if num_trained is not None and (found := int((labels >= 0).sum())) > num_trained:
        raise ValueError(
            f"num_trained is {num_trained}, but {found} labels are trained: pass their number, or None for all tokens"
        )
