"""Steps, tokens and time at a stated efficiency; checkpoints on disk. All formulas are one line each."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_idft.planning.parameters import model_count
from megatron_idft.planning.shape import Training

DAY = 86400.0


@dataclass(frozen=True)
class Machine:
    """The GPUs or processes that the training runs on. Bytes, flops per second; `memory` and `peak` of one GPU.

    Attributes:
        memory: None where no limit is known (CPU).
        peak: None where it is not known: then no times are given.
        efficiency: model flops reached, as a share of the peak (MFU), pipeline bubble included.
        reserve: bytes that are left for memory that is not counted.
    """

    name: str
    gpus_per_node: int = 8
    memory: float | None = None
    peak: float | None = None
    efficiency: float = 0.4
    reserve: float = 0.0
    disk: float = 2e9


@dataclass(frozen=True)
class Throughput:
    """flops of a step, seconds of a step, tokens per second and per day; times None without a peak."""

    step_flops: float
    tokens: int
    seconds: float | None

    @property
    def flops_per_token(self) -> float:
        return self.step_flops / self.tokens

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.seconds is None else self.tokens / self.seconds

    @property
    def tokens_per_day(self) -> float | None:
        return None if self.seconds is None else self.tokens / self.seconds * DAY


def throughput(training: Training, machine: Machine, step_flops: float) -> Throughput:
    """Time and tokens of a step.

    Args:
        training: the layout and batch.
        machine: the GPUs.
        step_flops: of one global batch, forward and backward, recompute not counted, as the trainer logs them.
    """
    tokens = training.batch.global_ * training.batch.seq_length
    reached = machine.peak and machine.peak * machine.efficiency * training.layout.gpus
    return Throughput(step_flops, tokens, step_flops / reached if reached else None)


def bubble(training: Training) -> float:
    """Share of a step in which a pipeline stage waits: (p - 1) / (m v + p - 1), arXiv 2104.04473."""
    stages = training.layout.pipeline
    work = training.batch.micro_batches(training.layout) * training.layout.virtual
    return (stages - 1) / (work + stages - 1)


def checkpoint_bytes(training: Training) -> tuple[int, int]:
    """(weights, weights with the optimizer's main weights and moments), each parameter once."""
    parameters, precision = model_count(training.model), training.precision
    weights = parameters * precision.weight
    return weights, weights + parameters * (precision.main_weight + precision.moments)
