"""The vocabulary-parallel token loss: `vocab_parallel_loss`, and `distribution_statistics`, which needs no labels.

May import statistics, objectives and torch. Begin with autograd.py; shard.py is the exchange over the ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_idft.loss.autograd import Backend, TokenLoss
from megatron_idft.loss.backends import load_backend, resolve_backend
from megatron_idft.loss.checks import (
    check_overwritable,
    check_tensors,
    checked_reference,
    reject_invalid_labels,
    under_hooks_on_saved_tensors,
)
from megatron_idft.loss.operators import Operators
from megatron_idft.loss.shard import VocabShard, vocab_shard
from megatron_idft.objectives import Objective, resolve_objective
from megatron_idft.statistics import MergedState, Reference, merge_shard_states


class LossOutput(NamedTuple):
    """Per-token results, each [...] fp32 and 0 at ignored positions; only `loss` carries gradient.

    Attributes:
        loss: -weight * log_prob.
        weight: the objective's detached weight.
        log_prob: log p of the label, in nats.
        entropy: H of the distribution over the true vocabulary, in nats.
        invalid_labels: 0-dim int64, the number of labels >= vocab_size. They count as ignored; data that holds any is
            broken, so read this where a host synchronisation is due anyway, and stop. Always 0 for labels on the CPU.
        reference_kl: KL(reference || model) over the reference's top K, in nats; None for objectives without that term.
    """

    loss: Tensor
    weight: Tensor
    log_prob: Tensor
    entropy: Tensor
    invalid_labels: Tensor
    reference_kl: Tensor | None = None


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
    reference: Reference | None = None,
) -> LossOutput:
    """Per-token loss -w log p(label) over a vocabulary that may be split over tensor-parallel ranks.

    Statistics, sums and the gradient are computed in fp32 whatever the logits' dtype; the gradient
    w (softmax - onehot) is rounded once, when it is stored in the logits' dtype. Columns >= vocab_size are padding:
    they enter no sum and get zero gradient. Ignored positions give 0 everywhere even where their logits are NaN or Inf;
    at a trained position NaN or +Inf give NaN, while -Inf is a probability of 0.

    torch.compile(fullgraph=True) takes the call whole (operators.py). Values that enter a compiled function as numbers
    become part of its graph: give a `gamma_lambda` that changes as a tensor.

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
            under saved-tensor hooks (activation checkpointing, offloading): called there, the gradient is copied; a
            compiled function raises. Without gradient nothing is overwritten. In a compiled function it saves memory
            for logits that come from outside; those made in the function are copied before they are overwritten.
        cross_entropy_values: `loss` holds the values of plain cross-entropy, -log_prob, while its gradient stays the
            objective's: for trainers that log the loss and watch it for spikes.
        reference: what a reference model said of the same labels, in the labels' shape and the same on every rank of
            `tp_group`; needed by objectives with `reference_statistics` or `kl_coefficient`, ignored by the others.
            Never differentiated.

    Returns:
        LossOutput, the same bits on every rank of `tp_group`.

    Collectives: one all-gather of fp32 [T, 4] over `tp_group` in forward, of [T, 5] where the objective asks for a sum
    of squares, as "deft" does; with a `kl_coefficient` also one all-reduce of fp32 [T, K]; none in backward. No host
    synchronisation, no data-dependent shapes (but for the check of labels on the CPU).

    Raises:
        TypeError, ValueError: arguments that do not fit together, before any collective.
        ValueError: a label >= vocab_size, for labels on the CPU. On other devices `invalid_labels` counts them.
        ValueError: overwrite_logits with logits that are a leaf or a view of one (backward would destroy what is being
            trained), or whose elements share memory (an expanded tensor).
        RuntimeError: a second backward through a graph whose logits the first one has overwritten; overwrite_logits in
            a compiled function that runs under saved-tensor hooks.
    """
    check_tensors(logits, labels)
    traced = torch.compiler.is_compiling()
    overwrite_logits = overwrite_logits and logits.requires_grad and torch.is_grad_enabled()
    if overwrite_logits:
        check_overwritable(logits)
        overwrite_logits = traced or not under_hooks_on_saved_tensors()
    objective = _traced_objective(objective) if traced else resolve_objective(objective)
    given = checked_reference(reference, objective, labels)
    name = resolve_backend(backend, logits.device)
    implementation: Backend = Operators(name, overwrite_logits) if traced else load_backend(name)
    shard, vocab_size = vocab_shard(logits.shape[-1], vocab_size, tp_group)
    if labels.device.type == "cpu" and not traced:
        reject_invalid_labels(labels, vocab_size)
    results = TokenLoss.apply(
        logits, labels, objective, shard, vocab_size, implementation, overwrite_logits, cross_entropy_values, *given
    )
    return LossOutput(*results)


def distribution_statistics(
    logits: Tensor, *, tp_group: ProcessGroup | None = None, vocab_size: int | None = None, backend: str = "auto"
) -> tuple[MergedState, VocabShard]:
    """Entropy and normaliser of each row's distribution, before any token of it is chosen; and this rank's shard.

    Arguments, errors and the one collective as in `vocab_parallel_loss`. The state's `log_prob` is that of token 0.
    """
    implementation = load_backend(resolve_backend(backend, logits.device))
    shard, vocab_size = vocab_shard(logits.shape[-1], vocab_size, tp_group)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    state = implementation.shard_state(logits, labels, shard, vocab_size, frozenset())
    return merge_shard_states(shard.gather_states(state)), shard


def _traced_objective(objective: str | Objective) -> Objective:
    if not isinstance(objective, str):
        return resolve_objective(objective)
    from megatron_idft.loss.traced_objective import traced_objective  # noqa: PLC0415  imports the compiler

    return traced_objective(objective)
