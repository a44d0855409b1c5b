"""The trainer's own checks of its flags, made without a GPU, and what `plan` refuses besides."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_idft.errors import ArgumentError, UserError
from megatron_idft.integration.plan.shape import LAYERS
from megatron_idft.integration.platform.megatron_errors import translate

# Flags that change memory in a way that nobody has derived here: attribute -> name.
_NOT_COUNTED = {
    "multi_latent_attention": "multi-latent attention",
    "experimental_attention_variant": "another attention",
    "attention_output_gate": "gated attention",
    "mtp_num_layers": "multi-token prediction",
    "moe_latent_size": "latent experts",
    "fp4": "FP4",
    "fp8_dot_product_attention": "attention in FP8",
    "fp8_multi_head_attention": "attention in FP8",
    "fp8_output_proj": "an output layer in FP8",
    "activation_func_fp8_input_store": "an activation function's input in FP8",
    "first_last_layers_bf16": "layers that stay in bf16 beside FP8",
    "use_megatron_fsdp": "Megatron-FSDP",
    "use_torch_fsdp2": "FSDP2",
    "fp32_residual_connection": "a residual stream in fp32",
    "cpu_offloading": "activation offloading",
    "cpu_offloading_num_layers": "activation offloading",
    "fine_grained_activation_offloading": "activation offloading",
    "overlap_moe_expert_parallel_comm": "overlapped expert communication, with two micro-batches at a time",
    "heterogeneous_layers_config_path": "layers of different shapes",
    "heterogeneous_layers_config_encoded_json": "layers of different shapes",
    "pipeline_model_parallel_layout": "a pipeline layout of its own",
    "moe_expert_capacity_factor": "a capacity of the experts",
    "hybrid_context_parallel": "hybrid context parallelism",
    "use_layer_wise_distributed_optimizer": "a layer-wise distributed optimizer",
    "yaml_cfg": "settings from YAML",
}
_FLAGS = {"fp4": "--fp4-format"}  # where the attribute has another name
# Without Transformer Engine a model's config cannot be made with these; they change no shape.
_NEED_A_GPU = {
    "transformer_impl": "local",
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "tp_comm_overlap": False,
    "moe_token_dispatcher_type": "alltoall",
    "persist_layer_norm": False,
}


@contextlib.contextmanager
def gpu_answers(on_cpu: bool) -> Iterator[None]:
    """training/arguments.py asks the GPU whether it can do grouped matrix products; every GPU that `plan` knows can."""
    before = torch.cuda.get_device_capability
    if not on_cpu:
        torch.cuda.get_device_capability = lambda *_: (8, 0)
    try:
        yield
    finally:
        torch.cuda.get_device_capability = before


def call(who: str, check: Callable[[], Any]) -> Any:
    """Run one of the trainer's checks; what it asserts becomes an error of one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return check()
    except (AssertionError, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        text = translate(error)
        if text is None:
            line = traceback.extract_tb(error.__traceback__)[-1].line
            text = f"{who} refuses these flags: {str(error) or line}"
        raise ArgumentError(text) from error


def model_config(args: argparse.Namespace) -> Any:
    """Megatron's config of the model, which checks what the parser does not."""
    arguments: Any = importlib.import_module("megatron.training.argument_utils")
    changed = copy.copy(args)
    for name, value in _NEED_A_GPU.items():
        setattr(changed, name, value)
    hybrid = args.hybrid_layer_pattern is not None
    return (arguments.hybrid_config_from_args if hybrid else arguments.gpt_config_from_args)(changed)


def refuse_uncounted(args: argparse.Namespace) -> None:
    """Refuse flags whose memory is not counted.

    Raises:
        ArgumentError: names every one.
    """
    found = [
        f"{_FLAGS.get(name, '--' + name.replace('_', '-'))} ({what})"
        for name, what in _NOT_COUNTED.items()
        if getattr(args, name, None)
    ]
    pattern = args.hybrid_layer_pattern or ""
    foreign = sorted(set(pattern) - set(LAYERS) - {"|"})
    found += [f"'{symbol}' in --hybrid-layer-pattern" for symbol in foreign]
    if getattr(args, "gtp_weight_remat_size", 1) > 1:
        found.append("--gtp-weight-remat-size (sharded weights)")
    if args.num_distributed_optimizer_instances > 1:
        found.append("--num-distributed-optimizer-instances (a partly divided optimizer)")
    if not args.cpu and args.attention_backend.name in ("unfused", "local"):
        found.append(f"--attention-backend {args.attention_backend.name} (scores in Transformer Engine)")
    if args.fp8 and (args.cpu or args.transformer_impl != "transformer_engine"):
        found.append("--fp8-format (without Transformer Engine's layers)")
    if args.optimizer not in ("adam", "sgd"):
        found.append(f"--optimizer {args.optimizer}")
    if found:
        raise ArgumentError(
            "plan does not count the memory of " + ", ".join(found) + ". Plan without, and measure the difference in a"
            " short run with --log-memory-to-tensorboard"
        )
