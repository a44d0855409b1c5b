"""Replace the language-model loss of a Megatron model, explicitly and reversibly.

What is touched is the model instance's `compute_language_model_loss(labels, logits)`
(megatron/core/models/common/language_module/language_module.py), whose signature is the same in megatron-core 0.17 to
0.19 and which GPTModel and HybridModel call under every parallel layout; with the fused output head also the forward of
its output layer (fused_head.py). Nothing is patched at import and no class or module is changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_idft.errors import UnsupportedModelError
from megatron_idft.integration.loss.deferred_logits import computed
from megatron_idft.integration.loss.fused_head import HEADS, FusedHead
from megatron_idft.integration.loss.metrics import LossMetrics
from megatron_idft.loss import LossOutput, vocab_parallel_loss
from megatron_idft.objectives import Objective, ce, resolve_objective
from megatron_idft.statistics import Reference

_ATTRIBUTE = "_megatron_idft_hook"
IGNORED_LABEL = -100


class MicroBatch(NamedTuple):
    """What came with a forward pass: tensors [b, s], and None where it was not given. See `LossHook`."""

    labels: Tensor
    loss_mask: Tensor | None
    sources: Tensor | None
    reference: Reference | None
    num_trained: int | None
    token_factors: Tensor | None


class LossHook:
    """Stands in for one model's `compute_language_model_loss`.

    In training it returns cross-entropy *values* with the *gradient* of the objective, so `lm loss`, NaN checks and
    spike checks of any `loss_func` stay plain cross-entropy. In evaluation it returns plain cross-entropy. Both are
    taken over the true vocabulary: Megatron's padding columns take no part.

    Args:
        model: a Megatron language model with an output layer (GPTModel, HybridModel and their kin).
        objective: the objective whose gradient is trained.
        vocab_size: rows of the true vocabulary; None counts every column of the padded one.
        backend: `auto`, `reference` or `triton`, as in `vocab_parallel_loss`.
        metrics: where per-token statistics are summed in training; None keeps none.
        evaluation_metrics: the same for evaluation.
        fused_head: computes the loss without logits; None: from the output layer's.

    Attributes:
        calls: training micro-batches so far.
        token_sources: the next micro-batch's sources, for metrics that keep them apart: the number of each token's,
            int64, of a shape that broadcasts to the labels' [b, s]. Whoever calls the model may set it before.
        reference: what the reference model said of the next micro-batch's labels, tensors [b, s] (and [b, s, K]) in the
            labels' layout, so of this rank's part under context parallelism. Whoever calls the model sets it before
            each forward pass, which takes it.
        num_trained: how many of the next micro-batch's labels are trained, counted on the host: the fused output head
            computes no others. Set and taken like `reference`; None, and it computes all.
        token_factors: [b, s] fp32 in the labels' layout, what the caller's loss function multiplies the next
            micro-batch's losses with beside `loss_mask`. Set and taken like `reference`; None: nothing.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        vocab_size: int | None,
        backend: str,
        metrics: LossMetrics | None,
        evaluation_metrics: LossMetrics | None = None,
        fused_head: FusedHead | None = None,
    ) -> None:
        self.model = model  # Any: megatron-core's models declare no types for what is used here
        self.objective = objective
        self.vocab_size = vocab_size
        self.backend = backend
        self.metrics = metrics
        self.evaluation_metrics = evaluation_metrics
        self.fused_head = fused_head
        self.calls = 0
        self.token_sources: Tensor | None = None
        self.reference: Reference | None = None
        self.num_trained: int | None = None
        self.token_factors: Tensor | None = None
        self._original: Callable[[Tensor, Tensor], Tensor] = model.compute_language_model_loss
        self._signature = inspect.signature(model.forward)
        # Forward passes whose loss has not been asked for yet. More than one only under schedule plans, which start the
        # next micro-batch before they finish the last.
        self._pending: list[MicroBatch] = []
        self._undo: list[Callable[[], None]] = []

    def attach(self) -> None:
        model = self.model
        model.compute_language_model_loss = self
        before = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        after = model.register_forward_hook(self._after_forward)
        self._undo = [lambda: model.__dict__.pop("compute_language_model_loss"), before.remove, after.remove]
        if hasattr(model, "build_schedule_plan"):  # --overlap-moe-expert-parallel-comm bypasses forward
            plan = model.build_schedule_plan
            plan_signature = inspect.signature(plan)

            def build_schedule_plan(*args: Any, **kwargs: Any) -> Any:
                self._capture(plan_signature, args, kwargs)
                return plan(*args, **kwargs)

            model.build_schedule_plan = build_schedule_plan
            self._undo.append(lambda: model.__dict__.pop("build_schedule_plan"))
        if self.fused_head is not None:
            self._undo.append(self.fused_head.attach(lambda: bool(self._pending)))

    def detach(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def _capture(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        if given.get("output_processor") is not None:
            raise UnsupportedModelError(
                "this forward pass was given an output_processor, which computes its own loss: pass none, or uninstall"
                " the megatron-idft loss"
            )
        labels = given.get("labels")
        if labels is not None:
            # These are taken once: the next micro-batch's labels would get wrong ones without a word.
            taken = self.reference, self.num_trained, self.token_factors
            self.reference = self.num_trained = self.token_factors = None
            self._pending.append(MicroBatch(labels, given.get("loss_mask"), self.token_sources, *taken))

    def _before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A pass that died half-way (out of memory, a rerun) must not leave its labels behind.
        self._pending.clear()
        self._capture(self._signature, args, kwargs)

    def _after_forward(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._pending:
            self._pending.clear()
            raise UnsupportedModelError(
                f"{type(module).__name__}.forward was given labels but never asked compute_language_model_loss for"
                " their loss, so the objective would not be trained. Use a model class that calls it (GPTModel,"
                " HybridModel) or train without --sft-loss"
            )

    def __call__(self, labels: Tensor, logits: Any) -> Tensor:
        """The loss of one micro-batch.

        Args:
            labels: [b, s] int64, the tensor that `forward` received; a copy of it marks an auxiliary head.
            logits: [s, b, V/tp], this rank's shard of the padded vocabulary; bf16, fp16 or fp32. Deferred ones under a
                fused head.

        Returns:
            [b, s] fp32. Collectives: one all-gather over the tensor-parallel group, none in the backward pass; those of
            `vocab_parallel_linear_loss` under a fused head.
        """
        for index, micro_batch in enumerate(self._pending):
            if labels is micro_batch.labels:
                del self._pending[index]
                return self._main_head_loss(micro_batch, logits)
        if not self._pending:
            raise UnsupportedModelError(
                "compute_language_model_loss was called outside the model's forward pass: the loss mask is not known"
                " there. Uninstall the megatron-idft loss before calling it directly"
            )
        # Multi-token prediction passes rolled copies of the labels: its heads stay plain cross-entropy.
        return self._original(labels, computed(logits))

    def _main_head_loss(self, micro_batch: MicroBatch, logits: Any) -> Tensor:
        labels, loss_mask, sources, reference, num_trained, factors = micro_batch
        if loss_mask is not None:
            loss_mask = loss_mask.reshape(labels.shape)
            labels = torch.where(loss_mask != 0, labels, IGNORED_LABEL)
        labels = labels.transpose(0, 1)  # the labels are turned, never the logits: those are thousands of times larger
        training = self.model.training
        objective = self.objective if training else ce()
        if reference is not None:
            reference = reference.transposed()
        elif objective.reference_statistics or objective.kl_coefficient is not None:
            raise _no_reference(objective)
        mask, sources, factors = (
            None if tensor is None else tensor.expand(labels.T.shape).transpose(0, 1)
            for tensor in (loss_mask, sources, factors)
        )
        if self.fused_head is None:
            out = self._loss_of_logits(logits, labels, objective, reference)
        else:
            weights = mask if factors is None else factors if mask is None else mask * factors
            settings = (self.vocab_size, self.backend, reference)
            out = self.fused_head.loss(logits, labels, objective, *settings, weights, num_trained)
        self.calls += training
        metrics = self.metrics if training else self.evaluation_metrics
        if metrics is not None:
            metrics.add(objective, labels, out, mask, sources, reference)
        return out.loss.transpose(0, 1).contiguous()

    def _loss_of_logits(
        self, logits: Tensor, labels: Tensor, objective: Objective, reference: Reference | None
    ) -> LossOutput:
        self._require_shard(logits)
        training = self.model.training
        return vocab_parallel_loss(
            logits,
            labels,
            objective=objective,
            tp_group=self.model.pg_collection.tp,
            vocab_size=self.vocab_size,
            backend=self.backend,
            # The output layer's backward reads its input and weight, never its output; but a hook may have kept that.
            overwrite_logits=training and not logits.is_leaf and not self.model.output_layer._forward_hooks,
            cross_entropy_values=True,
            reference=reference,
        )

    def _require_shard(self, logits: Tensor) -> None:
        shard_width = self.model.output_layer.output_size_per_partition
        if logits.shape[-1] != shard_width:
            raise UnsupportedModelError(
                f"the output layer returned {logits.shape[-1]} columns where this rank's vocabulary shard has"
                f" {shard_width}: gathered logits (parallel_output=False or runtime_gather_output=True) would add"
                " log(tensor parallel size) to the loss. Build the model with parallel_output=True"
            )


def install[Models](
    models: Models,
    objective: str | Objective = "idft",
    *,
    vocab_size: int | None = None,
    backend: str = "auto",
    metrics: LossMetrics | None = None,
    evaluation_metrics: LossMetrics | None = None,
    head: str = "materialized",
    chunk_tokens: int | None = None,
) -> Models:
    """Train `models` with `objective` instead of plain cross-entropy.

    Works on a model or on the list of its (virtual) pipeline chunks, wrapped (DDP, Float16Module) or not, and returns
    what it was given, so `functools.partial(install, objective="idft")` is a pre-wrap hook of Megatron-Bridge and of
    `megatron.training.models`. Chunks without an output layer need nothing and stay as they are. Installing again
    replaces the settings; it never stacks.

    Args:
        models: a Megatron language model or a sequence of its chunks.
        objective: a name of objective_table.py, `module:function`, or an `Objective`.
        vocab_size: rows of the true vocabulary; None counts every column of the padded one.
        backend: `auto`, `reference` or `triton`.
        metrics: a `LossMetrics` to sum per-token statistics of training into.
        evaluation_metrics: another for evaluation, where the loss is plain cross-entropy.
        head: `materialized`, or `fused`: the loss takes the place of the output layer's product, and the logits are
            never in memory.
        chunk_tokens: how many tokens the fused head computes at a time; None: by their number.

    Raises:
        UnsupportedModelError: the model's loss cannot be reached, or something else already owns it.
        ValueError: an unknown head.
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    resolved = resolve_objective(objective)
    found = False
    for model in language_models(models):
        found = True
        uninstall(model)
        if getattr(model, "post_process", True):
            _refuse_unsupported(model)
            for each in filter(None, (metrics, evaluation_metrics)):
                each.vocab_size = vocab_size or model.vocab_size
            fused_head = FusedHead(model, chunk_tokens) if head == "fused" else None
            hook = LossHook(model, resolved, vocab_size, backend, metrics, evaluation_metrics, fused_head)
            hook.attach()
            setattr(model, _ATTRIBUTE, hook)
    if not found:
        raise UnsupportedModelError(
            "no Megatron language model (megatron.core's LanguageModule) was found in what install() was given: pass a"
            " GPTModel, a HybridModel or the list of model chunks that Megatron's training setup returns"
        )
    return models


def uninstall[Models](models: Models) -> Models:
    """Give `models` their own loss back. A model that has no hook is left alone; returns what it was given."""
    for model in language_models(models):
        hook = model.__dict__.pop(_ATTRIBUTE, None)
        if hook is not None:
            hook.detach()
    return models


def installed_hooks(models: Any) -> list[LossHook]:
    """The hooks that sit on `models`: one per chunk with an output layer."""
    return [model.__dict__[_ATTRIBUTE] for model in language_models(models) if _ATTRIBUTE in model.__dict__]


def language_models(models: Any) -> Iterator[Any]:
    """The Megatron language models in a model, a wrapper of one, or a sequence of chunks."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    chunks = models if isinstance(models, Sequence) else [models]
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, LanguageModule))


def _no_reference(objective: Objective) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"--sft-loss {objective.name} reads what a reference model said of the labels, and this micro-batch came"
        " without. Train with `megatron-idft train` on data with a reference (prepare --reference); in a program of"
        " your own set `reference` of each of installed_hooks(model) before the model is called"
    )


def _refuse_unsupported(model: Any) -> None:
    name = type(model).__name__
    if "labels" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{name}.forward takes no `labels`, so its loss mask cannot be found. Causal language models (GPTModel,"
            " HybridModel) are served"
        )
    if "compute_language_model_loss" in model.__dict__:
        raise UnsupportedModelError(
            f"another component already replaced {name}.compute_language_model_loss (logits saving does). Remove it,"
            " or train without --sft-loss"
        )
    if getattr(model.config, "cross_entropy_loss_fusion", False):
        raise UnsupportedModelError(
            "cross_entropy_loss_fusion is on: the stock fused kernel and this loss cannot both own the logits. Drop"
            " --cross-entropy-loss-fusion; the megatron-idft loss never materialises the softmax either"
        )
    if getattr(model, "fp16_lm_cross_entropy", False):
        raise UnsupportedModelError(
            "fp16_lm_cross_entropy is on, but this loss sums in fp32 whatever the logits' dtype. Drop"
            " --fp16-lm-cross-entropy"
        )
