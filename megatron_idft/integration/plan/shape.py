"""Megatron's validated arguments -> the inputs of `megatron_idft.planning`: reading, no checks and no parsing."""

from __future__ import annotations

import argparse
from typing import Literal

import torch

from megatron_idft.errors import PlanError
from megatron_idft.planning.shape import Batch, Implementation, Layer, Layout, Model, Precision, Recompute, Training

# The symbols of --hybrid-layer-pattern that are counted.
LAYERS: dict[str, Layer] = {"*": ("attention",), "-": ("mlp",), "E": ("moe",)}


def training_from(args: argparse.Namespace, true_vocab: int | None) -> Training:
    """The planning inputs of validated arguments whose padded vocabulary is known."""
    return Training(
        model=_model(args, true_vocab),
        layout=_layout(args),
        batch=Batch(args.seq_length, args.micro_batch_size, args.global_batch_size),
        precision=_precision(args),
        recompute=_recompute(args),
        implementation=_implementation(args),
        offload=args.optimizer_offload_fraction if args.optimizer_cpu_offload else 0.0,
    )


def _model(args: argparse.Namespace, true_vocab: int | None) -> Model:
    return Model(
        layers=_layers(args),
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        heads=args.num_attention_heads,
        groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocab=args.padded_vocab_size,
        true_vocab=true_vocab or 0,
        tied=not args.untie_embeddings_and_output_weights,
        gated=bool(args.swiglu or args.quick_geglu),
        rms_norm=args.normalization == "RMSNorm",
        linear_bias=args.add_bias_linear,
        qkv_bias=args.add_qkv_bias,
        qk_norm=args.qk_layernorm,
        rope=args.position_embedding_type in ("rope", "mrope", "yarn"),
        learned_positions=args.max_position_embeddings if args.position_embedding_type == "learned_absolute" else 0,
        attention_dropout=args.attention_dropout,
        hidden_dropout=args.hidden_dropout,
        experts=args.num_experts or 0,
        experts_per_token=args.moe_router_topk if args.num_experts else 0,
        expert_ffn=(args.moe_ffn_hidden_size or args.ffn_hidden_size) if args.num_experts else 0,
        shared_expert_ffn=(args.moe_shared_expert_intermediate_size or 0) if args.num_experts else 0,
        shared_expert_gate=bool(args.moe_shared_expert_gate),
    )


def _layers(args: argparse.Namespace) -> tuple[Layer, ...]:
    if args.hybrid_layer_pattern is not None:
        return tuple(LAYERS[symbol] for symbol in args.hybrid_layer_pattern if symbol != "|")
    if not args.num_experts:
        return (("attention", "mlp"),) * int(args.num_layers)
    frequency = args.moe_layer_freq
    experts = [layer % frequency == 0 for layer in range(args.num_layers)] if isinstance(frequency, int) else frequency
    return tuple(("attention", "moe" if chosen else "mlp") for chosen in experts)


def _layout(args: argparse.Namespace) -> Layout:
    segments = (args.hybrid_layer_pattern or "").split("|")
    return Layout(
        gpus=args.world_size,
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        virtual=args.virtual_pipeline_model_parallel_size or 1,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
        distributed_optimizer=args.use_distributed_optimizer,
        first_stage_layers=args.decoder_first_pipeline_num_layers,
        last_stage_layers=args.decoder_last_pipeline_num_layers,
        pieces=tuple(len(segment) for segment in segments) if len(segments) > 1 else None,
        embedding_counts=args.account_for_embedding_in_pipeline_split,
        loss_counts=args.account_for_loss_in_pipeline_split,
    )


def _precision(args: argparse.Namespace) -> Precision:
    weight = args.params_dtype.itemsize
    main_weight, moments = (0 if weight == 4 else 4), 8
    if args.optimizer == "sgd":
        moments = 4 if args.sgd_momentum else 0
    elif args.use_precision_aware_optimizer:
        main_weight = args.main_params_dtype.itemsize
        remainders = getattr(args, "store_param_remainders", True) and not args.fp8_param_gather
        if args.bf16 and main_weight == 4 and remainders:
            main_weight = 2  # the other 16 bits are the bf16 weight
        moments = args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else weight
    logits = getattr(args, "logit_dtype", None)  # came with Megatron 0.20
    wide = 0 if logits is None else logits.itemsize
    if not args.fp8:
        return Precision(weight, gradient, main_weight, moments, logits=wide)
    # Each matrix in both orientations, which the GPUs before Blackwell need; instead of the weight, or beside it.
    copies = 0 if args.fp8_param_gather else 2
    return Precision(weight, gradient, main_weight, moments, matrix_input=1, weight_copies=copies, logits=wide)


def _recompute(args: argparse.Namespace) -> Recompute:
    if args.recompute_granularity is None:
        return Recompute()
    if args.recompute_granularity == "full":
        return Recompute(
            "full",
            args.recompute_method,
            args.recompute_num_layers or 1,
            frozenset(),
            args.distribute_saved_activations,
        )
    modules = frozenset(args.recompute_modules or ("core_attn",))
    unknown = modules - {"core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"}
    if unknown:
        raise PlanError(f"plan does not count --recompute-modules {' '.join(sorted(unknown))}: plan without")
    return Recompute("selective", modules=modules)


def _implementation(args: argparse.Namespace) -> Implementation:
    engine = args.transformer_impl == "transformer_engine" and not args.cpu
    gated = args.swiglu or args.quick_geglu
    loss: Literal["megatron", "reference", "triton"] = "megatron"
    if args.sft_loss is not None:
        wanted = args.sft_loss_backend
        loss = "reference" if wanted == "reference" or (wanted == "auto" and args.cpu) else "triton"
    return Implementation(
        transformer_engine=engine,
        cpu=args.cpu,
        fused_activation=bool(args.bias_swiglu_fusion if gated else args.bias_gelu_fusion),
        fused_weight_gradient=args.gradient_accumulation_fusion,
        fused_rope=args.apply_rope_fusion,
        softmax_fp32=args.attention_softmax_in_fp32 and not args.masked_softmax_fusion,
        loss=loss,
        head=args.sft_loss_head or "materialized",
        chunk_tokens=args.sft_loss_chunk_tokens or 0,
        loss_block_bytes=max(2**23, 2**20 * torch.get_num_threads()) if args.cpu else 2**26,
        optimizer_scratch=args.cpu,
    )
