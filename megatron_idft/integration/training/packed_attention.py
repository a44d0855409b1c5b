"""Attention within the documents of a pack: what each kind of it understands, and which models and flags ignore it.

Transformer Engine's takes `PackedSeqParams` (THD), Megatron's local one a block-diagonal causal mask.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from megatron_idft.errors import ArgumentError, UnsupportedModelError
from megatron_idft.integration.loss.arguments import cuda_graph_flag


def stage_reads(args: argparse.Namespace, vp_stage: int | None) -> tuple[bool, bool]:
    """Whether this pipeline stage (or virtual stage) reads the inputs, and whether it reads the labels."""
    from megatron.core import mpu
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
    from megatron.training.arguments import core_transformer_config_from_args

    if args.mtp_num_layers and mtp_on_this_rank(
        layout=core_transformer_config_from_args(args).pipeline_model_parallel_layout,
        mtp_num_layers=args.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    ):
        return True, True
    where: dict[str, Any] = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    return mpu.is_pipeline_first_stage(**where), mpu.is_pipeline_last_stage(**where)


def takes_mask(args: argparse.Namespace) -> bool:
    """Whether attention is Megatron's local one, which takes a mask; Transformer Engine's takes packed sequences."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if args.hybrid_layer_pattern is None:
        return bool(args.transformer_impl == "local")
    return not HAVE_TE or "megatron_idft.integration.platform.local_layers" in (args.spec or ())


def validate_packed_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that cannot be right with packs.

    Raises:
        ArgumentError: names the remedy.
    """
    if takes_mask(args):
        if args.context_parallel_size > 1:
            raise ArgumentError(
                f"--context-parallel-size {args.context_parallel_size} with packs needs Transformer Engine: local"
                " attention sees one rank's part of a document only. Install Transformer Engine, or drop the flag"
            )
        if args.mtp_num_layers:
            raise ArgumentError(
                "--mtp-num-layers with packs needs Transformer Engine: without packed sequences multi-token prediction"
                " looks across the documents' borders. Install it, drop the flag, or train on unpacked records"
            )
        if getattr(args, "experimental_attention_variant", None):
            raise ArgumentError(
                f"--experimental-attention-variant {args.experimental_attention_variant} does not keep packed documents"
                " apart without Transformer Engine: drop the flag, or train on unpacked records"
            )
        return
    graphs = cuda_graph_flag(args)
    if graphs is not None:
        # transformer_engine asserts that there are none (transformer_layer.py); local finds other arguments than it
        # captured (cuda_graphs.py); full_iteration meets the synchronisations of `get_batch` while it captures.
        raise ArgumentError(
            f"{graphs} cannot be used with packs: a CUDA graph replays one shape, and the documents of a pack are of"
            " other numbers and lengths in every step. Drop the flag, or train on unpacked records"
        )
    if max(args.micro_batch_size, args.eval_micro_batch_size or 1) > 1:
        raise ArgumentError(
            "packs are whole sequences already: Transformer Engine takes one per micro-batch. Pass --micro-batch-size 1"
            " and, for longer ones, prepare the data with a larger --seq-length"
        )


def check_attention(args: argparse.Namespace, model: list[torch.nn.Module]) -> None:
    """Refuse a model whose attention would not keep documents apart: the wrong kind, or one that ignores the mask."""
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    masked = takes_mask(args)
    for module in (module for chunk in model for module in chunk.modules()):
        if isinstance(module, DotProductAttention) and not masked:
            raise UnsupportedModelError(
                "the model holds local attention layers, which take no packed sequences, among Transformer Engine's."
                " Pass --transformer-impl local to train all of it on local layers, or train on unpacked records"
            )
        if type(module).__name__ == "TEDotProductAttention" and masked:
            raise UnsupportedModelError(
                "the model holds Transformer Engine's attention though local layers were asked for: documents of a pack"
                " would not be kept apart there. Pass --transformer-impl transformer_engine, or train on unpacked"
                " records"
            )
        if isinstance(module, FusedScaleMaskSoftmax):
            # fusions/fused_softmax.py: the fused causal kernel and the sliding window make their own masks.
            if module.scaled_masked_softmax_fusion and module.input_in_float16:
                raise ArgumentError(
                    "the fused causal softmax ignores masks, so documents of a pack would see each other: pass"
                    " --no-masked-softmax-fusion"
                )
            if module.window_size is not None:
                raise ArgumentError(
                    "local attention with a sliding window (--window-size) ignores masks, so documents of a pack would"
                    " see each other: use Transformer Engine, drop the flag, or train on unpacked records"
                )


def document_mask(bounds: Tensor) -> Tensor:
    """The mask of attention: no token sees other documents, or later tokens.

    Args:
        bounds: [b, s + 1] int32, ascending from 0 to s; repeated entries bound nothing.

    Returns:
        [b, 1, s, s] bool, True where position i (third axis) must not see position j. Padding is a document as well,
        so every row sees itself.
    """
    positions = torch.arange(bounds.shape[1] - 1, dtype=bounds.dtype, device=bounds.device)
    document = torch.searchsorted(bounds, positions.repeat(len(bounds), 1), right=True)
    other = document[:, None, :, None] != document[:, None, None, :]
    return other | (positions[:, None] < positions)


def cumulative_lengths(bounds: Tensor) -> Tensor:
    """[s + 1] int32 -> [documents + 1] int32: the bounds without repetitions. Synchronises with the host."""
    unique: torch.Tensor = torch.unique_consecutive(bounds)
    return unique


def packed_sequence_parameters(cu_seqlens: Tensor, context_parallel_size: int) -> Any:
    """`PackedSeqParams` for one row of documents that follow each other without gaps.

    A document's padding (to a multiple of 2 c under context parallelism) counts as its end, where nobody sees it, so
    the padded lengths are the lengths.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    longest = int(cu_seqlens.diff().max())
    padded = cu_seqlens if context_parallel_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        total_tokens=int(cu_seqlens[-1]),  # lets Mamba layers tell documents apart
    )
