"""Layouts of the same training that would fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_idft.errors import PlanError
from megatron_idft.planning.memory import plan_memory, worst
from megatron_idft.planning.shape import Recompute, Training
from megatron_idft.planning.throughput import Machine, bubble

FULL = 0.9  # share of the memory less the reserve from which a layout is marked, and comes after the others
SMALL_SHARE = 0.25  # of that memory: where one GPU needs less, cutting the model further is no alternative
RULE = (
    "at most 90 % full before fuller ones, then the"
    " least recompute, then experts within a node, then the fewest GPUs that share one model (TP x PP x CP), then the"
    " least context and pipeline parallelism, then the smallest pipeline bubble, then the largest micro-batch, then the"
    " least expert parallelism"
)
MICRO_BATCHES = (1, 2, 4, 8)
CONTEXTS = (1, 2, 4, 8)
_RECOMPUTE = (
    Recompute(),
    Recompute("selective", modules=frozenset({"core_attn"})),
    Recompute("full", "uniform", 1),
)


@dataclass(frozen=True)
class Candidate:
    """A layout that fits: bytes of its worst rank, their share of the room, and the flags that ask for it."""

    training: Training
    bytes: int
    bubble: float
    spans_nodes: bool
    share: float = 0.0

    @property
    def is_full(self) -> bool:
        return self.share > FULL

    @property
    def flags(self) -> list[str]:
        layout, recompute = self.training.layout, self.training.recompute
        words = ["--tensor-model-parallel-size", str(layout.tensor)]
        words += ["--sequence-parallel"] * layout.sequence_parallel
        words += ["--pipeline-model-parallel-size", str(layout.pipeline)]
        words += ["--context-parallel-size", str(layout.context)] * (layout.context > 1)
        if self.training.model.experts:
            words += ["--expert-model-parallel-size", str(layout.expert)]
            words += ["--expert-tensor-parallel-size", str(layout.expert_tensor)]
        words += ["--use-distributed-optimizer"] * layout.distributed_optimizer
        if recompute.granularity == "full":
            words += ["--recompute-granularity", "full", "--recompute-method", recompute.method]
            words += ["--recompute-num-layers", str(recompute.layers)]
        elif recompute.granularity == "selective":
            words += ["--recompute-granularity", "selective", "--recompute-modules", *sorted(recompute.modules)]
        return [*words, "--micro-batch-size", str(self.training.batch.micro)]


def fitting_layouts(training: Training, machine: Machine, limit: int) -> list[Candidate]:
    """The first `limit` layouts by `RULE`, of those that fit into a GPU's memory less the reserve.

    Searched: TP within a node, PP without virtual stages, CP with Transformer Engine, EP with expert TP 1, the
    distributed optimizer where there is data parallelism, no, selective and full recompute, micro-batches of 1 to 8.
    Of layouts that differ only in the micro-batch, the one that comes first by the rule is kept. A model of which a
    rank is less than `SMALL_SHARE` full without being cut is not cut by pipeline or context parallelism.
    """
    if machine.memory is None:
        return []
    room = machine.memory - machine.reserve
    best: dict[tuple[object, ...], Candidate] = {}
    for changed in _variants(training, machine):
        try:
            stage = worst(plan_memory(changed, ends=True))
        except PlanError:
            continue
        if stage.bytes > room:
            continue
        experts = changed.layout.expert * changed.layout.expert_tensor
        share = stage.bytes / room
        candidate = Candidate(changed, stage.bytes, bubble(changed), experts > machine.gpus_per_node, share)
        key = (changed.layout, changed.recompute)
        if key not in best or _order(candidate) < _order(best[key]):
            best[key] = candidate
    found = sorted(best.values(), key=_order)
    if any(_is_whole(each) and each.share < SMALL_SHARE for each in found):
        found = [each for each in found if each.training.layout.pipeline * each.training.layout.context == 1]
    return found[:limit]


def _is_whole(candidate: Candidate) -> bool:
    layout = candidate.training.layout
    return layout.tensor * layout.pipeline * layout.context == 1


def _order(candidate: Candidate) -> tuple[float, ...]:
    layout, recompute = candidate.training.layout, candidate.training.recompute
    level = ("none", "selective", "full").index(recompute.granularity)
    return (
        candidate.is_full,
        level,
        candidate.spans_nodes,
        layout.tensor * layout.pipeline * layout.context,
        layout.context,
        layout.pipeline,
        round(candidate.bubble, 2),
        -candidate.training.batch.micro,
        layout.expert,
    )


def _divisors(number: int, limit: int) -> list[int]:
    return [size for size in range(1, min(number, limit) + 1) if number % size == 0]


def _variants(training: Training, machine: Machine) -> Iterator[Training]:
    model, gpus, engine = training.model, training.layout.gpus, training.implementation.transformer_engine
    tensor_sizes = [
        size
        for size in _divisors(gpus, machine.gpus_per_node)
        if model.heads % size == 0 and model.groups % size == 0 and model.vocab % size == 0
    ]
    pipeline_sizes = [size for size in _divisors(len(model.layers), gpus) if gpus % size == 0]
    context_sizes = [size for size in CONTEXTS if size == 1 or (engine and gpus % size == 0)]
    expert_sizes = _divisors(model.experts, gpus) if model.experts else [1]
    recomputes = [each for each in _RECOMPUTE if not (engine and each.granularity == "selective")]
    for tensor, pipeline, context, expert, recompute, micro in product(
        tensor_sizes, pipeline_sizes, context_sizes, expert_sizes, recomputes, MICRO_BATCHES
    ):
        shared = tensor * pipeline * context
        if gpus % shared or gpus % (expert * pipeline):
            continue
        layout = replace(
            training.layout,
            tensor=tensor,
            pipeline=pipeline,
            virtual=1,
            context=context,
            expert=expert,
            expert_tensor=1 if model.experts else tensor,
            sequence_parallel=tensor > 1,
            distributed_optimizer=gpus // (shared // context) > 1,
            first_stage_layers=None,
            last_stage_layers=None,
            pieces=None,
            embedding_counts=False,
            loss_counts=False,
        )
        if training.batch.global_ % (micro * layout.data) == 0:
            yield replace(training, layout=layout, recompute=recompute, batch=replace(training.batch, micro=micro))
