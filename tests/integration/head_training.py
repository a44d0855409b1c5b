"""Trains models with the materialised and with the fused output head by Megatron's own schedules, DDP and optimizers.

`train_cases(names)` runs on ranks of `tests.ranks.run_ranks`: many cases in one start of the processes. Both heads get
the same weights and the same micro-batches, of which one has no trained token, and nothing else differs.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from megatron_idft.integration.platform import cpu

VOCAB, PADDED, SEQ, BATCH, STEPS = 120, 128, 16, 2, 10


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        model: gpt or hybrid.
        config: of the transformer, beside the common one.
        layout: of initialize_model_parallel.
        chunks: virtual stages of each rank.
        data_parallel: settings of DDP.
        optimizer: of its config.
        tied: whether embedding and output layer share their weight.
        dtype: of the parameters.
        frozen: whether the output layer is not trained.
        micro_batches: of a step and rank.
        chunk_tokens: of the fused head.
        objective: a name.
        close: how far losses, norms and metrics may be apart, relative to their sizes.
    """

    model: str = "gpt"
    config: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, int] = field(default_factory=dict)
    chunks: int = 1
    data_parallel: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    dtype: torch.dtype = torch.float32
    frozen: bool = False
    micro_batches: int = 2
    chunk_tokens: int | None = 7
    objective: str = "idft"
    close: float = 1e-5


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = PP2 | {"virtual_pipeline_model_parallel_size": 2}
OVERLAPS = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "bucket_size": 4000,
}
MTP = {"mtp_num_layers": 1}
CASES = {
    "gpt, data parallel": Case(),
    "hybrid, data parallel, tied": Case("hybrid", tied=True),
    "overlaps, distributed optimizer": Case("hybrid", data_parallel=OVERLAPS),
    "overlaps, distributed optimizer, tied": Case(data_parallel=OVERLAPS, tied=True),
    "tensor parallel": Case("hybrid", layout=TP2),
    "tensor parallel, tied": Case(layout=TP2, tied=True),
    "sequence parallel": Case("hybrid", {"sequence_parallel": True}, TP2),
    "sequence parallel, frozen": Case("gpt", {"sequence_parallel": True}, TP2, frozen=True),
    "pipeline": Case("hybrid", layout=PP2, micro_batches=4),
    "pipeline, tied": Case("gpt", layout=PP2, micro_batches=4, tied=True),
    "virtual pipeline": Case("gpt", layout=VPP, chunks=2, micro_batches=4),
    "multi-token prediction": Case("gpt", MTP, TP2),
    "multi-token prediction, tied": Case("gpt", MTP, tied=True),
    "multi-token prediction, pipeline": Case("gpt", MTP, PP2),
    "maximal update parametrization": Case("gpt", {"use_mup": True, "mup_output_mult": 0.6}, TP2),
    "recomputed activations": Case(
        "gpt", {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    ),
    "mean of micro-batches": Case("hybrid", {"calculate_per_token_loss": False}, TP2),
    "fp16": Case(dtype=torch.float16, close=4e-3),
    "bf16": Case("hybrid", layout=TP2, dtype=torch.bfloat16, close=2e-2),
    "default chunk": Case("hybrid", chunk_tokens=None, objective="deft"),
}


def train_cases(names: list[str]) -> dict[str, dict[str, Any]]:
    cpu.enable()
    logging.disable(logging.WARNING)
    return {name: train_case(CASES[name]) for name in names}


def train_case(case: Case) -> dict[str, Any]:
    """What the two trainings of a case found, by the name of the head."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**case.layout)
    found = {}
    for head in ("materialized", "fused"):
        model_parallel_cuda_manual_seed(5, force_reset_rng=True)
        torch.manual_seed(5)
        found[head] = train(case, head)
    return found


def transformer_config(case: Case) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    size = case.layout.get
    settings = {
        "num_layers": 4 if case.chunks > 1 else 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        "calculate_per_token_loss": True,
        "params_dtype": case.dtype,
        "pipeline_dtype": case.dtype,
        "fp16": case.dtype == torch.float16,
        "bf16": case.dtype == torch.bfloat16,
        "tensor_model_parallel_size": size("tensor_model_parallel_size", 1),
        "pipeline_model_parallel_size": size("pipeline_model_parallel_size", 1),
        "virtual_pipeline_model_parallel_size": size("virtual_pipeline_model_parallel_size"),
    }
    return TransformerConfig(**settings | case.config)


def build(case: Case, config: Any, chunk: int) -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_idft.integration.platform.local_layers import hybrid_stack_spec

    stage = chunk if case.chunks > 1 else None
    common = {
        "vocab_size": PADDED,
        "max_sequence_length": SEQ,
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        "share_embeddings_and_output_weights": case.tied,
        "position_embedding_type": "rope",
        "vp_stage": stage,
    }
    if case.model == "hybrid":
        halves = "|".join("*-*-"[2 * i : 2 * i + 2] for i in range(2))
        pattern = halves if "pipeline_model_parallel_size" in case.layout else "*-*-"
        config.num_layers = 4
        return HybridModel(config, hybrid_stack_spec, hybrid_layer_pattern=pattern, **common)
    spec = gpt_layer_specs.get_gpt_layer_local_spec()
    mtp = None
    if config.mtp_num_layers:
        mtp = gpt_layer_specs.get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=stage)
    return GPTModel(config, spec, mtp_block_spec=mtp, **common)


def micro_batches(case: Case, step: int) -> list[dict[str, torch.Tensor]]:
    """Of this rank; tensor- and pipeline-parallel ranks get the same."""
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(100 * step + parallel_state.get_data_parallel_rank())
    found = []
    for number in range(case.micro_batches):
        tokens, labels = torch.randint(0, VOCAB, (2, BATCH, SEQ), generator=generator)
        weights = torch.tensor([0.0, 1.0, 1.0, 2.0, -0.5])[torch.randint(0, 5, (BATCH, SEQ), generator=generator)]
        if step == 1 and number == 0:
            weights.zero_()
        found.append({"tokens": tokens, "labels": labels, "loss_mask": weights})
    return found


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    losses = output.float() * loss_mask
    return losses.sum(), (loss_mask != 0).sum().int(), losses.detach().clone()


def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(iterator)
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    causal = torch.triu(torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool), diagonal=1)
    output = model(batch["tokens"], positions, causal, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(loss_func, batch["loss_mask"])


def wrap(case: Case, config: Any) -> list[Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    settings = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True} | case.data_parallel)
    chunks = []
    for number in range(case.chunks):
        model = build(case, config, number)
        if case.frozen and model.post_process:
            model.output_layer.weight.requires_grad_(False)
        if case.dtype != torch.float32:
            model = Float16Module(config, model)
        chunks.append(DistributedDataParallel(config, settings, model, disable_bucketing=number > 0))
    return chunks


def train(case: Case, head: str) -> dict[str, Any]:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_idft import install, uninstall
    from megatron_idft.integration.loss.hook import installed_hooks
    from megatron_idft.integration.loss.metrics import LossMetrics

    config = transformer_config(case)
    chunks = wrap(case, config)
    metrics = LossMetrics(torch.device("cpu"), gamma_limits=(0.1, 2.0) if case.objective == "idft" else None)
    settings = {"vocab_size": VOCAB, "metrics": metrics, "head": head}
    install(chunks, case.objective, **settings, chunk_tokens=case.chunk_tokens if head == "fused" else None)
    half = {"fp16": case.dtype == torch.float16, "bf16": case.dtype == torch.bfloat16, "params_dtype": case.dtype}
    distributed = case.data_parallel.get("use_distributed_optimizer", False)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            clip_grad=1.0,
            use_distributed_optimizer=distributed,
            overlap_param_gather=case.data_parallel.get("overlap_param_gather", False),
            initial_loss_scale=2.0**8,
            **half,
            **case.optimizer,
        ),
        chunks,
    )
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    if case.data_parallel.get("overlap_grad_reduce"):
        config.no_sync_func = chunks[0].no_sync
    forward_backward = get_forward_backward_func()
    losses: list[torch.Tensor] = []
    norms = []
    for step in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        data = micro_batches(case, step)
        metrics.begin_step()
        losses += forward_backward(
            forward_step_func=forward_step,
            data_iterator=[iter(data) for _ in chunks] if case.chunks > 1 else iter(data),
            model=chunks if case.chunks > 1 else chunks[0],
            num_microbatches=case.micro_batches,
            seq_length=SEQ,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        metrics.commit_step()
        for hook in installed_hooks(chunks):
            if hook.fused_head is not None:
                hook.fused_head.end_step()
        norms.append(float(optimizer.step()[1]))
    heads = [hook.fused_head for hook in installed_hooks(chunks)]
    if case.data_parallel.get("overlap_param_gather"):
        chunks[0].disable_forward_pre_hook()  # waits for the parameters
    uninstall(chunks)
    report = metrics.report(None, 1.0)
    return {
        "losses": losses,
        "norms": norms,
        "weights": {
            f"{number} {name}": parameter.detach().clone()
            for number, chunk in enumerate(chunks)
            for name, parameter in chunk.named_parameters()
        },
        "metrics": report.scalars,
        "histograms": report.histograms,
        "heads": [(one.gradients_in_forward, one.watch.on_host, one.watch.forwards) for one in heads if one],
        "left": [
            key
            for chunk in chunks
            for module in chunk.modules()
            for key in module.__dict__
            if key == "forward" or "idft" in key
        ],
    }
