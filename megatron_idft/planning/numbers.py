"""The plan as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypedDict

from megatron_idft.planning.layouts import RULE
from megatron_idft.planning.parameters import active_count, model_count
from megatron_idft.planning.plan import Plan
from megatron_idft.planning.throughput import bubble, checkpoint_bytes


class Parameters(TypedDict):
    """Counts of parameters.

    Attributes:
        active: those that one token meets.
        per_rank: by pipeline stage.
    """

    model: int
    active: int
    per_rank: list[int]


class Stage(TypedDict):
    """Memory of a rank of one pipeline stage at its worst moment, in bytes."""

    stage: int
    bytes: int
    items: Mapping[str, int]
    moment: str
    chunks_in_flight: int
    activations_of_a_micro_batch: Mapping[str, int]


class Memory(TypedDict):
    """Memory of the ranks, in bytes.

    Attributes:
        limit: of a GPU, null where it is not known.
    """

    worst_stage: int
    worst_bytes: int
    limit: float | None
    reserve: float
    stages: list[Stage]


class BatchNumbers(TypedDict):
    """length says where the iterations come from, or why they are null."""

    data_parallel: int
    expert_data_parallel: int | None
    micro_batches: int
    tokens_per_step: int
    iterations: int | None
    length: str
    pipeline_bubble: float


class Speed(TypedDict):
    """Times are null where the peak of a GPU is not known."""

    step_flops: float
    flops_per_token: float
    step_seconds: float | None
    tokens_per_second: float | None
    tokens_per_day: float | None
    training_days: float | None


class Checkpoint(TypedDict):
    """Bytes of a checkpoint, and the seconds that the larger one takes to write."""

    weights: int
    with_optimizer: int
    seconds: float


class FittingLayout(TypedDict):
    """A layout that fits.

    Attributes:
        share: of a GPU's memory.
    """

    flags: list[str]
    bytes: int
    share: float
    pipeline_bubble: float


class FittingLayouts(TypedDict):
    """The layouts in the order that the rule gives."""

    rule: str
    layouts: list[FittingLayout]


class PlanNumbers(TypedDict):
    """Bytes, seconds and flops, with the inputs and the assumptions."""

    fits: bool
    parameters: Parameters
    memory: Memory
    batch: BatchNumbers
    speed: Speed
    checkpoint: Checkpoint
    warnings: list[dict[str, Any]]
    layouts_that_fit: FittingLayouts
    inputs: dict[str, Any]
    machine: dict[str, Any]
    assumptions: list[str]


def as_json(plan: Plan) -> PlanNumbers:
    """Every number of the text, in bytes, seconds and flops, with the inputs and the assumptions."""
    training, speed = plan.training, plan.speed
    weights, whole = checkpoint_bytes(training)
    inputs: dict[str, Any] = asdict(training)
    inputs["model"]["layers"] = ["+".join(layer) for layer in training.model.layers]
    inputs["recompute"]["modules"] = sorted(training.recompute.modules)
    return {
        "fits": plan.fits,
        "parameters": {
            "model": model_count(training.model),
            "active": active_count(training.model),
            "per_rank": [stage.parameters.all for stage in plan.stages],
        },
        "memory": {
            "worst_stage": plan.worst.stage,
            "worst_bytes": plan.worst.bytes,
            "limit": plan.machine.memory,
            "reserve": plan.machine.reserve,
            "stages": [
                {
                    "stage": stage.stage,
                    "bytes": stage.bytes,
                    "items": stage.items,
                    "moment": stage.moment,
                    "chunks_in_flight": stage.in_flight,
                    "activations_of_a_micro_batch": stage.detail,
                }
                for stage in plan.stages
            ],
        },
        "batch": {
            "data_parallel": training.layout.data,
            "expert_data_parallel": training.layout.expert_data if training.model.experts else None,
            "micro_batches": training.batch.micro_batches(training.layout),
            "tokens_per_step": speed.tokens,
            "iterations": plan.length.iterations,
            "length": plan.length.text,
            "pipeline_bubble": bubble(training),
        },
        "speed": {
            "step_flops": speed.step_flops,
            "flops_per_token": speed.flops_per_token,
            "step_seconds": speed.seconds,
            "tokens_per_second": speed.tokens_per_second,
            "tokens_per_day": speed.tokens_per_day,
            "training_days": _days(plan),
        },
        "checkpoint": {
            "weights": weights,
            "with_optimizer": whole,
            "seconds": whole / plan.machine.disk,
        },
        "warnings": [asdict(caution) for caution in plan.cautions],
        "layouts_that_fit": {
            "rule": RULE,
            "layouts": [
                {"flags": each.flags, "bytes": each.bytes, "share": each.share, "pipeline_bubble": each.bubble}
                for each in plan.layouts
            ],
        },
        "inputs": inputs,
        "machine": asdict(plan.machine),
        "assumptions": list(plan.assumptions),
    }


def _days(plan: Plan) -> float | None:
    if plan.speed.seconds is None or plan.length.iterations is None:
        return None
    return plan.speed.seconds * plan.length.iterations / 86400
