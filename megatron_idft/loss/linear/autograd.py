"""The differentiable loss of hidden states and output weight."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_idft.loss.autograd import TokenResults
from megatron_idft.loss.linear.passes import Gradients, Head, Inputs, backward_pass, forward_pass
from megatron_idft.loss.linear.sequence import gather_sequence, sum_gradient
from megatron_idft.loss.linear.tokens import spread, trained_rows
from megatron_idft.loss.linear.upstream import UpstreamWatch, fit_upstream
from megatron_idft.statistics import Reference

Found = tuple[Tensor | None, Tensor | None, Tensor | None]  # gradients of hidden states, weight and bias


@dataclass(frozen=True, eq=False)
class Settings:
    """How `LinearLoss` computes: see `vocab_parallel_linear_loss`."""

    head: Head
    sequence_parallel: bool
    num_trained: int | None
    in_forward: bool  # whether gradients are computed there
    fuse_wgrad_accumulation: bool
    watch: UpstreamWatch

    def main_grad(self, weight: Tensor) -> Tensor | None:
        """Where the weight's gradient is added to at once."""
        return weight.main_grad if self.fuse_wgrad_accumulation and weight.requires_grad else None  # type: ignore[attr-defined]


class LinearLoss(torch.autograd.Function):
    """The tensors of `LossOutput`, each [T]; only the loss carries gradient.

    Collectives: see `vocab_parallel_linear_loss`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [T, H], or [T/tp, H] under sequence parallelism
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,  # [T]
        expected: Tensor,  # [T] fp32, the upstream gradient that backward will begin with
        settings: Settings,
        *reference: Tensor | None,  # the fields of Reference, each [T] or [T, K]
    ) -> tuple[Tensor, ...]:
        rows = trained_rows(labels, settings.head.vocab_size, settings.num_trained)
        chosen, of_rows, *of_reference = (_chosen(value, rows) for value in (labels, expected, *reference))
        given = None if of_reference[0] is None else Reference(*of_reference)
        inputs = Inputs(_whole(hidden, settings), rows, weight, bias, chosen, given)
        gradients = None
        if settings.in_forward:
            gradients = Gradients(inputs, ctx.needs_input_grad[:3], settings.main_grad(weight))
            settings.watch.forwards += 1
        results, term = forward_pass(settings.head, inputs, of_rows, gradients)
        ctx.settings, ctx.tokens, ctx.done = settings, labels.numel(), False
        ctx.gradients = None if gradients is None else _summed(gradients, inputs, settings, labels.numel())
        _, *saved = results
        of_term = () if term is None else (term.coefficient, term.probs, term.reference_probs)
        top_ids = None if given is None else given.top_ids
        ctx.save_for_backward(hidden, weight, bias, rows, chosen, of_rows, top_ids, *saved, *of_term)
        tokens = labels.numel()
        loss, *others = (spread(value, rows, tokens) for value in results[:4])
        if rows is not None:  # a count that left trained tokens out shows, as nothing else may
            ours, all_of_them = (_trained(each, settings).sum() for each in (chosen, labels))
            loss = torch.where(ours == all_of_them, loss, torch.nan)
        others.append((labels >= settings.head.vocab_size).sum())
        if term is not None:
            others.append(spread(term.kl, rows, tokens))
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        settings: Settings = ctx.settings
        if ctx.done:
            raise RuntimeError(
                "backward ran a second time through vocab_parallel_linear_loss, whose gradients the first one took. Run"
                " backward once, over the sum of the losses"
            )
        ctx.done = True
        _, weight, _, rows, labels, expected, *_ = ctx.saved_tensors
        trained = _trained(labels, settings)  # what is ignored has gradient 0, whatever comes
        upstream = torch.where(trained, _chosen(upstream, rows), 0.0)
        if settings.in_forward:
            settings.watch.backwards += 1
            found = _fitted(ctx, upstream, torch.where(trained, expected, 0.0))
        else:
            found = _computed_again(ctx, upstream)
        ctx.gradients = None
        of_hidden, of_weight, of_bias = found
        if of_weight is not None:
            of_weight = _handed_over(settings, weight, of_weight)
        return of_hidden, of_weight, None if of_bias is None else of_bias.to(weight.dtype), *[None] * 7


def _computed_again(ctx: Any, upstream: Tensor) -> Found:
    """Gradients of any upstream [n], by a pass that computes the logits a second time."""
    settings: Settings = ctx.settings
    hidden, weight, bias, rows, labels, _, top_ids, *saved = ctx.saved_tensors
    size = len(TokenResults._fields) - 1
    tokens, of_term = TokenResults(upstream, *saved[:size]), saved[size:]  # the loss itself is not read
    inputs = Inputs(_whole(hidden, settings), rows, weight, bias, labels, None)
    gradients = Gradients(inputs, ctx.needs_input_grad[:3], settings.main_grad(weight))
    backward_pass(settings.head, inputs, tokens, (top_ids, *of_term) if of_term else (), upstream, gradients)
    return _summed(gradients, inputs, settings, ctx.tokens)


def _fitted(ctx: Any, upstream: Tensor, expected: Tensor) -> Found:
    """Gradients of forward, or those of an upstream gradient [n] that is another than the expected one."""
    settings: Settings = ctx.settings
    watch, main_grad = settings.watch, settings.main_grad(ctx.saved_tensors[1])
    factor, misfit = fit_upstream(upstream, expected, any_factor=main_grad is None)
    if watch.on_host:
        missed = bool(misfit.item())
        watch.fitted = watch.fitted is not False and not missed
        if missed:
            ctx.gradients = None  # of no use, and as large as those that follow
            if main_grad is not None:
                _computed_again(ctx, -expected)  # takes back what forward has added, up to the rounding of fp32
            return _computed_again(ctx, upstream)
    else:
        assert watch.misfits is not None
        watch.misfits += misfit
        factor = torch.where(misfit, torch.nan, factor)
        if main_grad is not None:
            main_grad[:1] *= factor
    for value in ctx.gradients:
        if value is not None and value is not main_grad:
            value *= factor
    found: Found = ctx.gradients
    return found


def _summed(gradients: Gradients, inputs: Inputs, settings: Settings, tokens: int) -> Found:
    """With the hidden states' gradient summed over ranks, and in the layout that they came in."""
    of_hidden = gradients.hidden
    if of_hidden is not None:
        tp_group = settings.head.shard.tp_group
        of_hidden = sum_gradient(of_hidden, inputs.rows, tokens, settings.sequence_parallel, tp_group)
    return of_hidden, gradients.weight, gradients.bias


def _handed_over(settings: Settings, weight: Tensor, gradient: Tensor) -> Tensor | None:
    """What autograd gets for the weight.

    A gradient that is in main_grad already is said to be there, as by Megatron's output layer (tensor_parallel/
    layers.py). The data-parallel hooks want to be called with some gradient: zeros, since the embedding's is added to
    it where the two share their weight. Sparse, so that there is no tensor of the weight's size.
    """
    if settings.main_grad(weight) is None:
        return gradient.to(weight.dtype)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    nowhere, nothing = weight.new_empty(2, 0, dtype=torch.int64), weight.new_empty(0)
    return torch.sparse_coo_tensor(nowhere, nothing, weight.shape, check_invariants=False)


def _whole(hidden: Tensor, settings: Settings) -> Tensor:
    return gather_sequence(hidden, settings.head.shard.tp_group) if settings.sequence_parallel else hidden


def _chosen(value: Tensor | None, rows: Tensor | None) -> Any:
    return value if value is None or rows is None else value[rows]


def _trained(labels: Tensor, settings: Settings) -> Tensor:
    return (labels >= 0) & (labels < settings.head.vocab_size)
