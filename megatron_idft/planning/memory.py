"""Memory of one rank of every pipeline stage, item by item, at the worst moment of a training step.

Why not megatron/training/theoretical_memory_usage.py: it knows only bf16 weights with an fp32 optimizer, gives every
stage the same share of the layers, leaves scores, the gate of SwiGLU, query groups and experts out of the activations,
knows no recompute but the attention's, and refuses HybridModel.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from megatron_idft.errors import PlanError
from megatron_idft.planning.activations import INPUT, Kept, Sizes, kept_by
from megatron_idft.planning.head import Head, head
from megatron_idft.planning.parameters import Count, check_divisions, layers_count, matrix_before_output, stage_count
from megatron_idft.planning.shape import Layer, Sublayer, Training, sublayers, total

Costs = dict[Sublayer, Kept]
_FP32 = 4
_BATCH_BYTES = 28  # of a token: ids, labels, positions as int64, the loss mask as fp32


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank of a pipeline stage.

    Attributes:
        parameters: of the rank.
        items: name -> bytes; they add up to `bytes`. "activations" and "logits and loss" are those of the worst moment
            (`moment`), and 0 where that moment is the optimizer's step.
        in_flight: forward passes of chunks whose backward pass is still to come, at most.
        detail: name -> bytes of one micro-batch in all layers of the stage, before recompute takes anything away.
    """

    stage: int
    parameters: Count
    items: dict[str, int]
    moment: str
    in_flight: int
    detail: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return total(self.items)


def plan_memory(training: Training, ends: bool = False) -> list[StageMemory]:
    """The memory of every pipeline stage, or with `ends` of the first and the last: the fullest is always one of them.

    Raises:
        PlanError: a layout that does not divide model, batch or GPUs.
    """
    check_layout(training)
    costs = {sublayer: kept_by(training, sublayer) for sublayer in dict.fromkeys(sublayers(training.model.layers))}
    stages = range(training.layout.pipeline)
    return [_stage(training, stage, costs) for stage in (sorted({stages[0], stages[-1]}) if ends else stages)]


def worst(stages: list[StageMemory]) -> StageMemory:
    return max(stages, key=lambda stage: stage.bytes)


def check_layout(training: Training) -> None:
    """Refuse a layout that cannot be.

    Raises:
        PlanError: GPUs, batch, sequence or model cannot be divided as the layout wants.
    """
    layout, batch = training.layout, training.batch
    model_parallel = layout.tensor * layout.pipeline * layout.context
    if layout.gpus % model_parallel:
        raise PlanError(
            f"{layout.gpus} GPUs cannot be divided by TP {layout.tensor} x PP {layout.pipeline} x CP {layout.context}"
            f" = {model_parallel}: change --gpus or a parallel size"
        )
    experts = layout.expert_tensor * layout.expert * layout.pipeline
    if training.model.experts and layout.gpus % experts:
        raise PlanError(f"{layout.gpus} GPUs cannot be divided by expert TP x EP x PP = {experts}: change one of them")
    if batch.global_ % (batch.micro * layout.data):
        raise PlanError(
            f"--global-batch-size {batch.global_} is no multiple of --micro-batch-size {batch.micro} x {layout.data}"
            f" data-parallel ranks: choose a multiple of {batch.micro * layout.data}"
        )
    if layout.context > 1 and batch.seq_length % (2 * layout.context):
        raise PlanError(
            f"--seq-length {batch.seq_length} is no multiple of 2 x --context-parallel-size {layout.context}: choose a"
            f" multiple of {2 * layout.context}"
        )
    if layout.virtual > 1 and batch.micro_batches(layout) % layout.pipeline:
        raise PlanError(
            f"{batch.micro_batches(layout)} micro-batches are no multiple of --pipeline-model-parallel-size"
            f" {layout.pipeline}, which virtual stages need: change --global-batch-size, or leave virtual stages out"
        )
    if training.model.experts and layout.tensor > 1 and not layout.sequence_parallel:
        raise PlanError("experts with tensor parallelism need --sequence-parallel: add it")  # moe_layer.py refuses
    check_divisions(training.model, layout)


def forward_passes(training: Training, stage: int) -> list[int]:
    """Chunks whose forward pass has been made and whose backward pass has not, when most are: 1F1B and interleaved,
    as pipeline_parallel/schedules.py counts its warm-up."""
    layout = training.layout
    micro_batches, stages, chunks = training.batch.micro_batches(layout), layout.pipeline, layout.virtual
    if chunks == 1:
        return [0] * min(micro_batches, stages - stage)
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages
    passes = min(warm_up + 1, micro_batches * chunks)
    return [position % (stages * chunks) // stages for position in range(passes)]


def _stage(training: Training, stage: int, kept_in: Costs) -> StageMemory:
    layout = training.layout
    count = stage_count(training.model, layout, stage)
    chunks = layout.chunks(training.model.layers)[stage]
    passes = forward_passes(training, stage)
    last = stage == layout.pipeline - 1
    costs = [_chunk(training, chunk, kept_in) for chunk in chunks]
    end = head(training) if last else Head(0, 0, 0, 0)
    kept = sum(costs[chunk].kept for chunk in passes)
    if last:
        kept += end.kept * passes.count(layout.virtual - 1)
    kept += len(passes) * _inputs(training, stage)
    # The newest forward pass is followed by the first backward pass, which is of the stage's last chunk.
    backward = costs[-1].backward_extra
    moments = {"loss": (kept, end.logits), "output layer": (kept, end.after), "backward": (kept + backward, end.tied)}
    if not last:
        moments = {"backward": moments["backward"]}
    optimizer_step = _optimizer_scratch(training, count, last)
    moment = max(moments, key=lambda name: sum(moments[name]))
    activations, logits = moments[moment]
    items = _states(training, count, sum(layers_count(training.model, layout, chunk).all for chunk in chunks))
    if optimizer_step > activations + logits:
        moment, activations, logits = "optimizer step", 0, 0
    items["activations"] = activations
    items["logits and loss"] = logits
    items["optimizer's temporaries"] = optimizer_step if moment == "optimizer step" else 0
    items["work buffers"] = _work_buffers(training, last)
    detail: dict[str, int] = {}
    for sublayer, times in Counter(sublayer for chunk in chunks for sublayer in sublayers(chunk)).items():
        for name, size in kept_in[sublayer].items.items():
            detail[name] = detail.get(name, 0) + size * times
    return StageMemory(stage, count, items, moment, len(passes), detail)


def _states(training: Training, count: Count, in_layers: int) -> dict[str, int]:
    """Weights, gradients, optimizer: what lies there all the time. Sharded states are rounded up to whole bytes.

    in_layers: parameters that are quantized; norms and biases, less than a thousandth of them, are not.
    """
    precision, layout = training.precision, training.layout
    state = precision.main_weight + precision.moments
    if layout.distributed_optimizer:
        optimizer = count.dense * state / (layout.data * layout.context) + count.expert * state / layout.expert_data
    else:
        optimizer = count.all * state
    return {
        "weights": count.all * precision.weight + in_layers * precision.weight_copies,
        "gradients": count.all * precision.gradient,
        "optimizer": round(optimizer * (1 - training.offload)),
    }


def _optimizer_scratch(training: Training, count: Count, last: bool) -> int:
    """In the optimizer's step, when no activation is left.

    torch's Adam has two temporaries of a weight, and still one of the weight before.
    """
    layout, precision, model = training.layout, training.precision, training.model
    share = layout.data * layout.context if layout.distributed_optimizer else 1
    # Gradients that are reduced in 16 bits become fp32 for the step.
    copies = count.all * _FP32 // share if precision.gradient < _FP32 and precision.main_weight == _FP32 else 0
    if not training.implementation.optimizer_scratch:
        return copies
    scratch = 2 * count.largest
    if last and not model.tied and count.largest == model.vocab // layout.tensor * model.hidden:
        scratch += matrix_before_output(model, layout)
    return copies + scratch * _FP32 // share


def _inputs(training: Training, stage: int) -> int:
    size = Sizes.of(training)
    ends = stage in (0, training.layout.pipeline - 1)
    positions = 4 * training.model.rope * training.batch.seq_length // training.layout.context * training.model.head_dim
    return size.t * _BATCH_BYTES * ends + positions


def _work_buffers(training: Training, last: bool) -> int:
    """Megatron's global memory buffer, which grows to the largest request and stays: local attention's scores, the
    gathered sequence of a column-parallel matrix under sequence parallelism. And one message between stages."""
    size = Sizes.of(training)
    gathered = size.t * training.model.hidden if training.layout.sequence_parallel else 0
    if training.implementation.transformer_engine:
        # Its own layers need none; the fused head's is not of this buffer.
        wanted = gathered * (last and training.implementation.head == "materialized")
    else:
        has_attention = any("attention" in layer for layer in training.model.layers)
        wanted = max(gathered, size.scores * has_attention)
    message = size.t_sp * training.model.hidden if training.layout.pipeline > 1 else 0
    return (wanted + message) * size.e


@dataclass(frozen=True)
class _ChunkCost:
    """kept: of one micro-batch until its backward pass. backward_extra: more than that at its worst moment."""

    kept: int
    backward_extra: int


def _chunk(training: Training, layers: tuple[Layer, ...], kept_in: Costs) -> _ChunkCost:
    recompute = training.recompute
    groups: list[tuple[tuple[Layer, ...], bool]]
    if recompute.granularity != "full":
        groups = [((layer,), False) for layer in layers]
    elif recompute.method == "uniform":
        step = max(1, recompute.layers)
        groups = [(layers[first : first + step], True) for first in range(0, len(layers), step)]
    else:
        groups = [((layer,), index < recompute.layers) for index, layer in enumerate(layers)]
    blocks = [([kept_in[sublayer] for sublayer in sublayers(group)], again) for group, again in groups]
    shared = training.layout.tensor if recompute.distribute_inputs else 1
    sizes = [block[0].input // shared if again else _sum(block) for block, again in blocks]
    kept, extra, freed = sum(sizes), 0, 0
    for (block, again), size in zip(reversed(blocks), reversed(sizes), strict=True):
        rebuilt = _sum(block) - block[0].items[INPUT] if again else 0
        inside = 0
        for sublayer in reversed(block):
            extra = max(extra, rebuilt + sublayer.extra - freed - inside)
            inside += sublayer.bytes
        freed += size
    return _ChunkCost(kept, extra)


def _sum(block: list[Kept]) -> int:
    return sum(sublayer.bytes for sublayer in block)
