"""Warnings that a person who knows Megatron would give on reading the flags."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_idft.planning.layouts import FULL
from megatron_idft.planning.memory import StageMemory
from megatron_idft.planning.shape import Training
from megatron_idft.planning.throughput import Machine, bubble

BUBBLE = 0.2  # share of the step from which the bubble is worth a word


@dataclass(frozen=True)
class Caution:
    """A warning.

    Attributes:
        key: stable, for programs.
        text: what is so, and what to do about it.
    """

    key: str
    text: str


def cautions(
    training: Training,
    machine: Machine,
    stages: Sequence[StageMemory],
    missing_environment: Sequence[str],
) -> list[Caution]:
    """All that apply, the gravest first."""
    found = [
        *_fit(machine, stages),
        *_layout(training, machine),
        *_batch(training),
        *_vocabulary(training),
        *_precision(training),
        *_environment(training, missing_environment),
    ]
    return [Caution(key, text) for key, text in found]


Found = Iterator[tuple[str, str]]


def _fit(machine: Machine, stages: Sequence[StageMemory]) -> Found:
    if machine.memory is None:
        return
    for stage in stages:
        over = stage.bytes + machine.reserve - machine.memory
        if over > 0:
            yield (
                "does not fit",
                f"stage {stage.stage} lacks {over / 2**30:.1f} GiB on each GPU: take one of the layouts that fit,"
                " recompute more (--recompute-granularity), or use a smaller --micro-batch-size or more GPUs",
            )
            continue
        share = stage.bytes / (machine.memory - machine.reserve)
        if share > FULL:
            yield (
                "nearly full",
                f"stage {stage.stage} fills {share:.0%} of what the reserve leaves: fragmentation or a longer"
                " workspace of a library may not fit. Keep below 90 %, or try this layout for some steps first",
            )


def _layout(training: Training, machine: Machine) -> Found:
    layout, model = training.layout, training.model
    if layout.tensor > machine.gpus_per_node:
        yield (
            "tensor parallel across nodes",
            f"TP {layout.tensor} spans nodes of {machine.gpus_per_node} GPUs: every layer waits for the network between"
            " them. Keep TP within a node and cut the model by PP",
        )
    if layout.tensor > model.groups:
        yield (
            "more tensor parallel ranks than query groups",
            f"TP {layout.tensor} is more than the {model.groups} query groups: keys and values are copied, and the"
            " local layers are slower for it. Use TP of at most the groups",
        )
    if layout.expert * layout.expert_tensor > machine.gpus_per_node:
        yield (
            "experts across nodes",
            f"expert TP {layout.expert_tensor} x EP {layout.expert} spans nodes: tokens cross the network in every"
            " layer. Within a node it is faster",
        )
    if layout.tensor > 1 and not layout.sequence_parallel:
        yield (
            "no sequence parallelism",
            "with TP, --sequence-parallel saves activations at the same communication: add it",
        )
    if layout.data * layout.context > 1 and not layout.distributed_optimizer:
        yield (
            "optimizer on every rank",
            f"each of {layout.data * layout.context} data-parallel ranks keeps the whole optimizer:"
            " --use-distributed-optimizer divides it",
        )
    if layout.context > 1 and not training.implementation.transformer_engine:
        yield (
            "context parallel attention",
            "context parallelism of attention needs Transformer Engine: local layers refuse it",
        )
    if not training.implementation.transformer_engine and not training.implementation.cpu:
        yield (
            "local layers",
            "local layers keep s x s attention scores: Transformer Engine does not. They are counted as on a CPU",
        )


def _batch(training: Training) -> Found:
    layout, batch = training.layout, training.batch
    micro_batches = batch.micro_batches(layout)
    if layout.pipeline > 1 and micro_batches < layout.pipeline:
        yield (
            "fewer micro-batches than stages",
            f"{micro_batches} micro-batches for {layout.pipeline} pipeline stages: some stages always wait. Use a"
            " larger --global-batch-size, a smaller --micro-batch-size or less PP",
        )
    share = bubble(training)
    if share > BUBBLE:
        yield (
            "pipeline bubble",
            f"the pipeline bubble is {share:.0%} of a step: (p - 1) / (m v + p - 1) with p = {layout.pipeline} stages,"
            f" m = {micro_batches} micro-batches, v = {layout.virtual}. More micro-batches or virtual stages make it"
            " smaller",
        )


def _vocabulary(training: Training) -> Found:
    padded, true_vocab = training.model.vocab, training.model.true_vocab
    if not true_vocab:
        yield (
            "true vocabulary unknown",
            f"the output layer has {padded} rows; how many are tokens is not known. Pass --sft-loss-vocab-size, or"
            " padding counts as tokens",
        )
    elif true_vocab > padded:
        yield (
            "vocabulary too small",
            f"the tokenizer has {true_vocab} tokens but the model {padded} rows: training refuses that",
        )
    elif padded > true_vocab:
        yield (
            "padded vocabulary",
            f"{padded - true_vocab} of {padded} output rows are padding ({true_vocab} tokens): --sft-loss leaves them"
            " out of every sum, Megatron's own cross-entropy does not",
        )


def _precision(training: Training) -> Found:
    if training.precision.matrix_input is not None:
        yield (
            "FP8",
            "FP8's memory is formula only, after Transformer Engine's source; time counts the dense bf16 peak. Pass"
            " --peak-tflops and --mfu for FP8",
        )


def _environment(training: Training, missing: Sequence[str]) -> Found:
    layout = training.layout
    if "CUDA_DEVICE_MAX_CONNECTIONS" in missing and (layout.tensor > 1 or layout.context > 1):
        yield (
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "Megatron stops without CUDA_DEVICE_MAX_CONNECTIONS=1 under TP or CP on GPUs before Blackwell: export it in"
            " the launch script",
        )
    if "PYTORCH_CUDA_ALLOC_CONF" in missing:
        yield (
            "expandable segments",
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True keeps fragmentation small: export it in the launch"
            " script",
        )
