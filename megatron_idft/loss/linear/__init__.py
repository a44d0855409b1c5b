"""The output head fused with the loss: `vocab_parallel_linear_loss`, from hidden states to the loss without logits.

May import what loss may. Begin with passes.py, the loops over tokens; autograd.py is what autograd sees of them.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_idft.loss import LossOutput
from megatron_idft.loss.backends import load_backend, resolve_backend
from megatron_idft.loss.checks import checked_reference, reject_invalid_labels
from megatron_idft.loss.linear.autograd import LinearLoss, Settings
from megatron_idft.loss.linear.checks import check_inputs, check_mask, check_numbers, reject_low_count
from megatron_idft.loss.linear.passes import Head
from megatron_idft.loss.linear.tokens import default_chunk_tokens, even_chunk
from megatron_idft.loss.linear.upstream import UpstreamWatch
from megatron_idft.loss.shard import vocab_shard
from megatron_idft.objectives import Objective, resolve_objective
from megatron_idft.statistics import Reference

__all__ = ["UpstreamWatch", "default_chunk_tokens", "vocab_parallel_linear_loss"]


def vocab_parallel_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: str | Objective = "idft",
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    sequence_parallel: bool = False,
    num_trained: int | None = None,
    chunk_tokens: int | None = None,
    gradients_in_forward: bool = True,
    loss_mask: Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    watch: UpstreamWatch | None = None,
    fuse_wgrad_accumulation: bool = False,
    cross_entropy_values: bool = False,
    reference: Reference | None = None,
) -> LossOutput:
    """`vocab_parallel_loss` of logit_scale (hidden weight^T + bias), of which only blocks of tokens exist at a time.

    A block's logits are the fp32 sums of the product, not rounded to the dtype of the hidden states, until statistics
    and gradient are taken; the gradient of a chunk is rounded once, to that dtype, and multiplied with weight and
    hidden states.

    The weight of a token is detached, so its gradient is known in forward but for the factor that backward begins with.
    That is a constant times a mask where losses are masked and summed, and then three matrix products are all. Backward
    compares: see `UpstreamWatch`.

    Args:
        hidden: [..., H] bf16, fp16 or fp32; under sequence parallelism [s/tp, ..., H], this rank's part of the first
            dimension.
        weight: [V/tp, H] of the same dtype: this rank's rows of the output layer.
        labels, objective, tp_group, vocab_size, backend, cross_entropy_values, reference: as in `vocab_parallel_loss`,
            of all s tokens. An objective sees a block of tokens at a time, in one dimension.
        bias: [V/tp], or None.
        logit_scale: factor of the logits, as of maximal update parametrization.
        sequence_parallel: whether each rank has a part of the hidden states, and gets that part's gradient.
        num_trained: how many labels are trained, or more, as the host knows. Only so many tokens are computed. None:
            all.
        chunk_tokens: tokens whose gradient is multiplied at once. None: `default_chunk_tokens` of those computed.
        gradients_in_forward: False: backward computes the logits again, so four products, and any upstream gradient is
            served alike.
        loss_mask: [...] what each token's loss will be multiplied by; None: 1.
        loss_scale: what all of them will be multiplied by: a number, or a 0-dim tensor on the device.
        watch: how the upstream gradient is compared with loss_mask times loss_scale. None: on the host.
        fuse_wgrad_accumulation: add the weight's gradient to `weight.main_grad`, [V/tp, H] fp32, in forward already,
            and set `weight.grad_added_to_main_grad` in backward where the weight has it. Then every such forward needs
            its backward. False: autograd gets it, from fp32 sums of its size that are kept until backward, and any
            common factor of the upstream gradient fits.

    Returns:
        LossOutput, the same bits on every rank of `tp_group`. The loss is NaN where `num_trained` was too small, for
        labels that are not on the CPU.

    Collectives: those of `vocab_parallel_loss` in forward, once for each block, overlapped with the next block's
    product; the gradient of the hidden states is summed once, in forward with gradients_in_forward, otherwise in
    backward: one all-reduce, or under sequence parallelism an all-gather of the hidden states and a reduce-scatter.
    No host synchronisation but that of the watch.

    Raises:
        TypeError, ValueError: arguments that do not fit together, before any collective; `num_trained` too small, for
            labels on the CPU.
        RuntimeError: a second backward; a call in code that torch.compile traces, which is not served.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("vocab_parallel_linear_loss cannot be traced by torch.compile: call it outside")
    check_inputs(hidden, weight, bias, labels, tp_group if sequence_parallel else None, fuse_wgrad_accumulation)
    check_numbers(chunk_tokens, logit_scale)
    objective = resolve_objective(objective)
    given = checked_reference(reference, objective, labels)
    implementation = load_backend(resolve_backend(backend, hidden.device))
    shard, vocab_size = vocab_shard(len(weight), vocab_size, tp_group)
    if labels.device.type == "cpu":
        reject_invalid_labels(labels, vocab_size)
        reject_low_count(labels, num_trained)
    tokens = labels.numel() if num_trained is None else min(max(num_trained, 1), labels.numel())
    chunk = default_chunk_tokens(tokens, hidden.device) if chunk_tokens is None else even_chunk(tokens, chunk_tokens)
    needs_gradient = torch.is_grad_enabled() and any(
        value is not None and value.requires_grad for value in (hidden, weight, bias)
    )
    settings = Settings(
        Head(objective, shard, vocab_size, implementation, logit_scale, chunk, cross_entropy_values),
        sequence_parallel,
        num_trained,
        gradients_in_forward and needs_gradient,
        fuse_wgrad_accumulation,
        UpstreamWatch() if watch is None else watch,
    )
    expected = check_mask(loss_mask, labels) * loss_scale
    rows = (None if value is None else value.flatten(0, labels.dim() - 1) for value in given)
    results = LinearLoss.apply(
        hidden.flatten(0, -2), weight, bias, labels.flatten(), expected.flatten(), settings, *rows
    )
    return LossOutput(*(value.view(labels.shape) if value.dim() else value for value in results))
