"""Packed batches: every pipeline and virtual stage learns where the documents lie, so none attends across them.

Stock `get_batch` gives the stages in the middle nothing at all: with packs, their layers would see one long document.
Here each stage gets the bounds, and makes of them what its attention understands: `PackedSeqParams` (THD) for
Transformer Engine's, a block-diagonal causal mask for Megatron's local one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_idft.data.packed.dataset import INPUTS, LABELS
from megatron_idft.errors import ArgumentError, UnsupportedModelError
from megatron_idft.integration.loss.arguments import cuda_graph_flag
from megatron_idft.integration.training.batches import OnSources, loss_func

_DTYPES = {
    "bounds": torch.int32,
    "tokens": torch.int64,
    "position_ids": torch.int64,
    "labels": torch.int64,
    "loss_mask": torch.float32,
    "sources": torch.int64,
}


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
    """Refuse what cannot be right with packs, naming the remedy. Raises ArgumentError."""
    if takes_mask(args):
        if args.context_parallel_size > 1:
            raise ArgumentError(
                f"--context-parallel-size {args.context_parallel_size} with packs needs Transformer Engine: local"
                " attention sees one rank's part of a document only. Install Transformer Engine, or drop the flag"
            )
        if args.mtp_num_layers:
            raise ArgumentError(
                "--mtp-num-layers with packs needs Transformer Engine: without packed sequences multi-token prediction"
                " looks across the documents' borders. Install it, drop the flag, or train on records"
            )
        if getattr(args, "experimental_attention_variant", None):
            raise ArgumentError(
                f"--experimental-attention-variant {args.experimental_attention_variant} does not keep packed documents"
                " apart without Transformer Engine: drop the flag, or train on records"
            )
        return
    graphs = cuda_graph_flag(args)
    if graphs is not None:
        # transformer_engine asserts that there are none (transformer_layer.py); local finds other arguments than it
        # captured (cuda_graphs.py); full_iteration meets the synchronisations of `get_batch` while it captures.
        raise ArgumentError(
            f"{graphs} cannot be used with packs: a CUDA graph replays one shape, and the documents of a pack are of"
            " other numbers and lengths in every step. Drop the flag, or train on records"
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
                " Pass --transformer-impl local to train all of it on local layers, or train on records"
            )
        if type(module).__name__ == "TEDotProductAttention" and masked:
            raise UnsupportedModelError(
                "the model holds Transformer Engine's attention though local layers were asked for: documents of a pack"
                " would not be kept apart there. Pass --transformer-impl transformer_engine, or train on records"
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
                    " see each other: use Transformer Engine, drop the flag, or train on records"
                )


def get_batch(
    data_iterator: Iterator[dict[str, Tensor]], vp_stage: int | None, micro_batch_size: int, sources: bool = False
) -> dict[str, Any]:
    """This rank's share of the next micro-batch.

    sources: whether samples hold `sources`.

    Returns:
        tokens, labels, position_ids, sources [b, s/cp] int64 and loss_mask [b, s/cp] fp32, each None on stages that do
        not read it; on every stage either attention_mask [b, 1, s, s] bool or packed_seq_params, the other None.
        Collectives: one broadcast per tensor over the tensor-parallel group. THD synchronises with the host.
    """
    from megatron.core import mpu
    from megatron.core.utils import get_batch_on_this_cp_rank
    from megatron.training import get_args

    args = get_args()
    inputs, labels = stage_reads(args, vp_stage)
    batch: dict[str, Any] = dict.fromkeys(_DTYPES)
    sample = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None
    of_labels = (*LABELS, "sources") if sources else LABELS
    for key in ("bounds", *(INPUTS if inputs else ()), *(of_labels if labels else ())):
        shape = (micro_batch_size, args.seq_length + (key == "bounds"))
        if sample is None:
            batch[key] = torch.empty(shape, dtype=_DTYPES[key], device=torch.cuda.current_device())
        else:
            batch[key] = sample[key].cuda(non_blocking=True)
        if mpu.get_tensor_model_parallel_world_size() > 1:
            source, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
            torch.distributed.broadcast(batch[key], source, group=group)
    bounds = batch.pop("bounds")
    batch |= {"attention_mask": None, "packed_seq_params": None}
    if takes_mask(args):
        batch["attention_mask"] = document_mask(bounds)
        return batch
    cu_seqlens = cumulative_lengths(bounds[0])
    batch["packed_seq_params"] = packed_sequence_parameters(cu_seqlens, args.context_parallel_size)
    if args.context_parallel_size > 1 and (inputs or labels):
        # Each document in 2 c parts, this rank's first and last: core/utils.py, per-document balancing.
        share = partial(get_batch_on_this_cp_rank, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
        lengths = {"cu_seqlens": cu_seqlens[None], "cu_seqlens_padded": None}
        if batch["sources"] is not None:  # it shares out four keys by name, and this is none of them
            batch["sources"] = share({"tokens": batch["sources"], **lengths})["tokens"]
        batch = share(batch | lengths)
    return batch


def document_mask(bounds: Tensor) -> Tensor:
    """What may not be seen: other documents, and what comes later.

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


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module, on_sources: OnSources = None
) -> tuple[Tensor, Any]:
    """One micro-batch of packs through `model`; returns its output and the bound loss function."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args, get_timers

    args = get_args()
    get_timers()("batch-generator", log_level=2).start()
    micro_batch_size = args.micro_batch_size if model.training else args.eval_micro_batch_size
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    batch = get_batch(data_iterator, vp_stage, micro_batch_size, sources=on_sources is not None)
    get_timers()("batch-generator").stop()
    if on_sources is not None:
        on_sources(batch["sources"])
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=batch["packed_seq_params"],
    )
    return output, partial(loss_func, batch["loss_mask"])
