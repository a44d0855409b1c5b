"""The whole plan of a training, and as JSON and text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_idft.planning.cautions import Caution, cautions
from megatron_idft.planning.layouts import RULE, Candidate, fitting_layouts
from megatron_idft.planning.memory import StageMemory, plan_memory, worst
from megatron_idft.planning.parameters import active_count, model_count
from megatron_idft.planning.shape import Training
from megatron_idft.planning.throughput import Machine, Throughput, bubble, checkpoint_bytes, throughput

ASSUMPTIONS = (
    "memory is the sum of what the items name, at the worst moment of a step in a steady state; what is not counted"
    " (CUDA context, NCCL, workspaces of libraries, fragmentation, the data loader) is the reserve",
    "activations: what each operation of Megatron 0.19's layers saves for its backward pass"
    " (megatron_idft/planning/activations.py); 1F1B or interleaved schedule, as"
    " pipeline_parallel/schedules.py warms up",
    "experts receive the same number of tokens each; where routing is uneven, the fullest rank needs more",
    "parameters and optimizer: as the constructors and optimizers of Megatron 0.19 make them, without the padding of"
    " gradient buckets",
    "flops: Megatron's own num_floating_point_operations, so the trainer logs the same; recompute is not counted",
)
MEASURED = "compared with counted allocations of real trainings on a CPU: tools/benchmarks/results/plan_memory_cpu.json"
NOT_RUN = (
    "formula only, not run: Transformer Engine layers and their buffers under context parallelism, fused kernels and"
    " optimizers, GPUs"
)


@dataclass(frozen=True)
class Length:
    """How long the training is: iterations where they are known, else why they are not."""

    iterations: int | None
    text: str


@dataclass(frozen=True)
class Plan:
    """See the fields' own classes. `machine.memory` decides `fits`."""

    training: Training
    machine: Machine
    stages: list[StageMemory]
    speed: Throughput
    length: Length
    cautions: list[Caution]
    layouts: list[Candidate]

    @property
    def worst(self) -> StageMemory:
        return worst(self.stages)

    @property
    def fits(self) -> bool:
        return self.machine.memory is None or self.worst.bytes + self.machine.reserve <= self.machine.memory

    @property
    def assumptions(self) -> tuple[str, ...]:
        return (*ASSUMPTIONS, MEASURED if self.training.implementation.cpu else NOT_RUN)


def make_plan(
    training: Training,
    machine: Machine,
    step_flops: float,
    length: Length,
    missing_environment: tuple[str, ...] = (),
    layouts: int = 5,
) -> Plan:
    """Everything that follows from the inputs.

    Raises:
        PlanError: a layout that cannot be.
    """
    stages = plan_memory(training)
    return Plan(
        training,
        machine,
        stages,
        throughput(training, machine, step_flops),
        length,
        cautions(training, machine, stages, missing_environment),
        fitting_layouts(training, machine, layouts),
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Every number of the text, in bytes, seconds and flops, with the inputs and the assumptions."""
    training, speed = plan.training, plan.speed
    weights, whole = checkpoint_bytes(training)
    inputs = asdict(training)
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
