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
    _refuse_graphs(args)
    if max(args.micro_batch_size, args.eval_micro_batch_size or 1) > 1:
        raise ArgumentError(
            "packs are whole sequences already: Transformer Engine takes one per micro-batch. Pass --micro-batch-size 1"
            " and, for longer ones, prepare the data with a larger --seq-length"
        )


def reads_bounds_on_host(args: argparse.Namespace) -> str | None:
    """The flag that makes Megatron's layers copy the documents' bounds to the host; None where none does."""
    if args.mtp_num_layers:  # multi_token_prediction.py rolls one document after the other
        return "--mtp-num-layers"
    rotates = args.position_embedding_type not in ("learned_absolute", "relative", "none")
    if rotates and not args.apply_rope_fusion:  # rope_utils.py rotates one document after the other
        return "--no-rope-fusion"
    return None


def _refuse_graphs(args: argparse.Namespace) -> None:
    graphs = cuda_graph_flag(args)
    if graphs is None:
        return
    on_host = reads_bounds_on_host(args)
    if on_host is not None:
        raise ArgumentError(
            f"{graphs} cannot be used with packs and {on_host}: with the latter, Megatron reads the bounds of a pack's"
            " documents on the host, and a CUDA graph captures nothing that does. Drop one of the two, or train on"
            " unpacked records"
        )
    modules = args.cuda_graph_modules or args.cuda_graph_scope_deprecated or ()
    modules = {getattr(module, "name", module) for module in modules} - {"full"}
    of_engine = graphs == "--external-cuda-graph" or args.cuda_graph_impl == "transformer_engine"
    if of_engine and (not modules or "attn" in modules):  # transformer_layer.py, `_te_cuda_graph_replay`
        raise ArgumentError(
            f"{graphs} captures attention and passes it tensors only, but attention over packs is told the documents'"
            " bounds by other means: pass --cuda-graph-impl local or full_iteration, or --cuda-graph-modules without"
            " attn, or train on unpacked records"
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


def document_mask(bounds: Tensor, seq_length: int) -> Tensor:
    """The mask of attention: no token sees other documents, or later tokens.

    Args:
        bounds: [b, n] int32, ascending from 0 to s; repeated entries bound nothing.
        seq_length: s.

    Returns:
        [b, 1, s, s] bool, True where position i (third axis) must not see position j. Padding is a document as well,
        so every row sees itself.
    """
    positions = torch.arange(seq_length, dtype=bounds.dtype, device=bounds.device)
    document = torch.searchsorted(bounds, positions.repeat(len(bounds), 1), right=True)
    other = document[:, None, :, None] != document[:, None, None, :]
    return other | (positions[:, None] < positions)


def packed_sequence_parameters(bounds: Tensor, args: argparse.Namespace, longest_document: int) -> Any:
    """`PackedSeqParams` for one row of documents that follow each other without gaps.

    They are of the same shape for every row, and the longest document, which says how many blocks kernels start for
    each, is that of the run: so nothing is copied to the host, CUDA graphs can capture them, and cuDNN makes one plan.
    Documents of length 0 at the end are what Transformer Engine itself pads its batches with. Only for layers that read
    the bounds on the host in any case (`reads_bounds_on_host`) they are exact: fewer documents to loop over, and rotary
    angles of the longest one.

    A document's padding (to a multiple of 2 c under context parallelism) counts as its end, where nobody sees it, so
    the padded lengths are the lengths.

    Args:
        bounds: [n] int32, ascending from 0 to the sequence length, which may be repeated.
        args: Megatron's.
        longest_document: no document of any row is longer, be it padding.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    positions = torch.arange(args.seq_length, dtype=bounds.dtype, device=bounds.device)
    # For Mamba layers. Megatron would derive it from `total_tokens`, by an operation that synchronises.
    documents = torch.searchsorted(bounds, positions, right=True, out_int32=True)[None] - 1
    if reads_bounds_on_host(args) is not None:
        bounds = torch.unique_consecutive(bounds)
        longest_document = int(bounds.diff().max())
    padded = bounds if args.context_parallel_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest_document,
        max_seqlen_kv=longest_document,
        seq_idx=documents,
        pad_between_seqs=False,
    )
