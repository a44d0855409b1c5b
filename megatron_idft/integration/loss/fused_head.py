"""The output head fused with the loss on a Megatron model: in training and evaluation its logits are never computed.

Replaced is the bound method `forward` of the model instance's `output_layer`. The module's `__call__` stays, and with
it its forward pre-hooks, by which DDP waits for gathered parameters. While a forward pass with labels waits for its
loss, the layer answers with `DeferredLogits`; everywhere else, in inference for one, it computes what it always did.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_idft.errors import UnsupportedModelError
from megatron_idft.integration.loss.deferred_logits import DeferredLogits
from megatron_idft.integration.loss.publishing import print_rank_last
from megatron_idft.loss import LossOutput
from megatron_idft.loss.linear import UpstreamWatch, vocab_parallel_linear_loss
from megatron_idft.objectives import Objective
from megatron_idft.statistics import Reference

HEADS = ("materialized", "fused")
_REMEDY = ". Use --sft-loss-head materialized (head='materialized' of install)"


class FusedHead:
    """The fused output head of one model, in the place of its output layer's product and `vocab_parallel_loss`.

    Where the losses of tokens are summed (`calculate_per_token_loss`), the gradient that backward starts with is known
    in forward, which then computes all gradients. The first backward pass compares, on the host. If it was another, as
    under a loss function of the caller's own kind, that pass is made good and those after it compute the logits twice.

    Args:
        model: a Megatron language model with an output layer.
        chunk_tokens: see `vocab_parallel_linear_loss`; None: its default.

    Attributes:
        gradients_in_forward: whether forward computes the gradients.
        grad_scale_func: what Megatron's schedule scales a step's loss with; None: the function in the model's config.
        watch: compares the gradient that backward starts with.
    """

    def __init__(self, model: Any, chunk_tokens: int | None) -> None:
        refuse_unserved(model)
        self.model = model  # Any: as in LossHook
        self.chunk_tokens = chunk_tokens
        self.gradients_in_forward = bool(model.config.calculate_per_token_loss)
        self.grad_scale_func: Callable[[Tensor], Tensor] | None = None
        self.watch = UpstreamWatch()
        self._adds_in_forward = False
        self._graphs_gone = 0

    def attach(self, awaits_loss: Callable[[], bool]) -> Callable[[], None]:
        """Take the output layer's forward; returns what gives it back.

        Args:
            awaits_loss: whether a forward pass with labels is under way.
        """
        layer = self.model.output_layer
        original = layer.forward

        def forward(
            input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
        ) -> tuple[Any, Tensor | None]:
            if not awaits_loss() or runtime_gather_output:
                found: tuple[Tensor, Tensor | None] = original(input_, weight, runtime_gather_output)
                return found
            used = layer.weight if weight is None else weight
            return DeferredLogits(input_, used, lambda: original(input_, weight, runtime_gather_output)[0]), None

        layer.forward = forward
        return lambda: layer.__dict__.pop("forward")

    def loss(
        self,
        logits: Any,
        labels: Tensor,
        objective: Objective,
        vocab_size: int | None,
        backend: str,
        reference: Reference | None,
        loss_mask: Tensor | None,
        num_trained: int | None,
    ) -> LossOutput:
        """As `vocab_parallel_loss` with cross-entropy values, of what the output layer answered with.

        Whatever keeps the result keeps the graph, so a graph that is gone without a backward pass is noticed by the
        next call where forward has added to gradients.

        Args:
            logits: `DeferredLogits` that nobody has touched.
            labels, reference: [s, b], of the whole sequence.
            loss_mask: [s, b], what the caller multiplies each token's loss with before it sums; None: not known.
            num_trained: how many labels are trained, counted on the host; None: not known.

        Raises:
            UnsupportedModelError: the model does something to the logits, or its weight cannot be used.
        """
        deferred = _untouched(logits)
        weight: Any = deferred.weight
        layer = self.model.output_layer
        _refuse_sharded(weight)
        training = self.model.training and torch.is_grad_enabled()
        if self.watch.fitted is False and self.gradients_in_forward:
            self._recompute_from_now_on()
        if training:
            self._refuse_lost_passes(self._graphs_gone)
        in_forward = training and self.gradients_in_forward
        fuse = training and _takes_main_grad(weight)
        if fuse and self._has_other_uses(weight):
            # DDP then adds what the other uses give to .grad, which it would drop; ours is zero there.
            weight.zero_out_wgrad = True
        out = vocab_parallel_linear_loss(
            deferred.hidden,
            weight,
            labels,
            objective=objective,
            tp_group=self.model.pg_collection.tp,
            vocab_size=vocab_size,
            backend=backend,
            bias=None if layer.skip_bias_add else layer.bias,
            logit_scale=deferred.scale,
            sequence_parallel=layer.sequence_parallel,
            num_trained=num_trained,
            chunk_tokens=self.chunk_tokens,
            gradients_in_forward=in_forward,
            loss_mask=loss_mask,
            loss_scale=self._loss_scale(labels.device),
            watch=self.watch,
            fuse_wgrad_accumulation=fuse,
            cross_entropy_values=True,
            reference=reference,
        )
        if fuse and in_forward:
            self._adds_in_forward = True
            weakref.finalize(_node_of(out.loss), self._count_graph)
        return out

    def end_step(self) -> None:
        """Whether what this step has added to gradients is right; called after its passes, before the optimizer's step.

        From the first step on whose gradients were as expected, the comparison stays on the device until here.

        Raises:
            UnsupportedModelError: it is not, and the step must not be taken. Synchronises with the host.
        """
        watch = self.watch
        self._refuse_lost_passes(watch.forwards)
        if watch.misfits is not None and int(watch.misfits):
            raise UnsupportedModelError(
                "the gradient of this step's loss was not what the fused output head computes in forward: the sum of"
                " the tokens' losses, each times its loss mask. It was so in the steps before; a loss function that"
                f" changes its form is not served{_REMEDY}"
            )
        if watch.on_host and watch.fitted and self.gradients_in_forward:
            watch.on_host = False
            watch.misfits = torch.zeros((), dtype=torch.int32, device=next(self.model.parameters()).device)

    def _count_graph(self) -> None:
        self._graphs_gone += 1

    def _refuse_lost_passes(self, forwards: int) -> None:
        lost = forwards - self.watch.backwards
        if self._adds_in_forward and lost > 0:
            raise UnsupportedModelError(
                f"{lost} forward passes in training mode had no backward pass, but the fused output head has added to"
                " the gradients in forward. Call the model under torch.no_grad() where nothing is to be trained"
                f"{_REMEDY}"
            )

    def _recompute_from_now_on(self) -> None:
        self.gradients_in_forward = False
        print_rank_last(
            "> sft loss: the loss function weighs tokens in a way that the fused output head cannot know in forward, so"
            " backward computes the logits again: four matrix products in the place of three. The results are the same"
        )

    def _loss_scale(self, device: torch.device) -> Tensor | float:
        scale = self.grad_scale_func or self.model.config.grad_scale_func
        return 1.0 if scale is None else scale(torch.ones((), device=device)).reshape(())

    def _has_other_uses(self, weight: Any) -> bool:
        embedding = getattr(self.model, "embedding", None)
        tied = embedding is not None and embedding.word_embeddings.weight is weight
        return tied or bool(self.model.config.mtp_num_layers)


def refuse_unserved(model: Any) -> None:
    """Whether the model's output layer can be fused with the loss.

    Raises:
        UnsupportedModelError: names what stands against it.
    """
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    layer, config = model.output_layer, model.config
    hooked = layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks
    reasons = {
        f"it is a {type(layer).__name__}, not Megatron's ColumnParallelLinear, and computes something else"
        " (a quantised product, an adapter)": type(layer) is not ColumnParallelLinear,
        "another component already replaced its forward": "forward" in layer.__dict__,
        "hooks on it read its output": hooked,
        "it gathers the logits of all ranks (parallel_output=False)": getattr(layer, "gather_output", False),
        "it is a layer of experts": getattr(layer, "explicit_expert_comm", False),
        "it leaves the sum of its input's gradient over ranks to others (disable_grad_reduce)": getattr(
            layer, "disable_grad_reduce", False
        ),
        "its weight is split over ranks that share it (--tensor-parallel-num-weight-shards)": getattr(
            layer, "gtp_remat_size", 1
        )
        > 1,
        "the product of its weight's gradient is put off (defer_embedding_wgrad_compute)": getattr(
            config, "defer_embedding_wgrad_compute", False
        ),
        "the config asks for a log of the logits (config_logger_dir)": getattr(config, "config_logger_dir", ""),
        "the config asks for autocast, which would change its types": getattr(config, "enable_autocast", False),
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        raise UnsupportedModelError(f"the output layer cannot be fused with the loss: {reason}{_REMEDY}")


def _untouched(logits: Any) -> DeferredLogits:
    if not isinstance(logits, DeferredLogits) or logits.touched:
        raise UnsupportedModelError(
            "the fused output head has no logits to give, but between the output layer and the loss something asked for"
            f" them: the model (a soft cap, gathered logits), an adapter or a hook{_REMEDY}"
        )
    return logits


def _refuse_sharded(weight: Any) -> None:
    if hasattr(weight, "device_mesh") or hasattr(weight, "__fsdp_param__"):  # of torch's FSDP2 and Megatron's
        raise UnsupportedModelError(f"the fused output head does not take a weight that FSDP has split{_REMEDY}")


def _node_of(loss: Tensor) -> Any:
    """The object that lives as long as the graph behind the loss."""
    node: Any = loss.grad_fn
    while not isinstance(node, torch.autograd.function.BackwardCFunction):
        node = node.next_functions[0][0]
    return node


def _takes_main_grad(weight: Any) -> bool:
    """Whether DDP keeps an fp32 sum of this weight's gradients that may be added to."""
    main_grad = getattr(weight, "main_grad", None)
    adds = weight.requires_grad and hasattr(weight, "grad_added_to_main_grad")
    return adds and main_grad is not None and main_grad.dtype == torch.float32
