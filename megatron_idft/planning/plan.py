"""The whole plan of a training."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_idft.planning.cautions import Caution, cautions
from megatron_idft.planning.layouts import Candidate, fitting_layouts
from megatron_idft.planning.memory import StageMemory, plan_memory, worst
from megatron_idft.planning.shape import Training
from megatron_idft.planning.throughput import Machine, Throughput, throughput

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
