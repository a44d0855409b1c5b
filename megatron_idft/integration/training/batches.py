"""Batches, forward step and loss function of the training program, in the shape of Megatron-LM's pretrain_gpt.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_idft.data.packed.dataset import INPUTS, LABELS, PackLimits
from megatron_idft.data.reference.columns import KEYS, ReferenceColumns
from megatron_idft.integration.training.normalization import Normalization
from megatron_idft.integration.training.packed_attention import (
    document_mask,
    packed_sequence_parameters,
    stage_reads,
    takes_mask,
)
from megatron_idft.integration.training.trained_tokens import TrainedTokenCounter

_DTYPES = {
    "bounds": torch.int32,
    "tokens": torch.int64,
    "position_ids": torch.int64,
    "labels": torch.int64,
    "loss_mask": torch.float32,
    "sources": torch.int64,
    **{key: torch.int32 if name == "top_ids" else torch.float32 for name, key in KEYS.items()},
    "conversation_tokens": torch.int32,
}
PER_TOKEN = Normalization()


def get_batch(
    data_iterator: Iterator[dict[str, Tensor]],
    vp_stage: int | None,
    micro_batch_size: int,
    *,
    limits: PackLimits | None,
    sources: bool = False,
    reference: ReferenceColumns | None = None,
    conversations: bool = False,
    count_trained: TrainedTokenCounter | None = None,
) -> dict[str, Any]:
    """This rank's share of the next micro-batch.

    Stock `get_batch` gives the pipeline stages in the middle nothing at all: with packs, their layers would see one
    long document. Here each stage of a packed training gets the bounds.

    Args:
        data_iterator: of samples of `PackedDataset`; read only where this stage reads any of a sample.
        vp_stage: the virtual stage.
        micro_batch_size: b.
        limits: of all packs of the run; None where samples hold no bounds.
        sources: whether samples hold `sources`.
        reference: the columns of a reference model that samples hold.
        conversations: whether samples hold `conversation_tokens`.
        count_trained: counts the trained tokens of the share where labels are read; None: nobody needs the number.

    Returns:
        tokens, labels, position_ids, sources [b, s/cp] int64, conversation_tokens [b, s/cp] int32, loss_mask [b, s/cp]
        fp32 and the columns of `reference` [b, s/cp] or [b, s/cp, K], each None on stages that do not read it, and
        where samples hold none. With packs every stage has either attention_mask [b, 1, s, s] bool or
        packed_seq_params, the other is None; without, both are: attention is causal, and padding on the right is seen
        by nobody. num_trained int, or None where it was not counted.
        Collectives: one broadcast per tensor over the tensor-parallel group, and that of `count_trained`. Nothing
        synchronises with the host, but see `packed_sequence_parameters`.
    """
    from megatron.core import mpu
    from megatron.core.utils import get_batch_on_this_cp_rank
    from megatron.training import get_args

    args = get_args()
    inputs, labels = stage_reads(args, vp_stage)
    batch: dict[str, Any] = dict.fromkeys((*_DTYPES, "attention_mask", "packed_seq_params"))
    columns = {KEYS[name]: shape for name, shape in reference.shapes.items()} if reference else {}
    asked = {"sources": sources, "conversation_tokens": conversations}
    ours = [*(key for key, wanted in asked.items() if wanted), *columns] if labels else []
    keys = [*(("bounds",) if limits else ()), *(INPUTS if inputs else ()), *(LABELS if labels else ()), *ours]
    sample = next(data_iterator) if keys and mpu.get_tensor_model_parallel_rank() == 0 else None
    for key in keys:
        length = limits.num_bounds(args.seq_length) if limits and key == "bounds" else args.seq_length
        shape = (micro_batch_size, length, *columns.get(key, ()))
        if sample is None:
            batch[key] = torch.empty(shape, dtype=_DTYPES[key], device=torch.cuda.current_device())
        else:
            batch[key] = sample[key].cuda(non_blocking=True)
        if mpu.get_tensor_model_parallel_world_size() > 1:
            source, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
            torch.distributed.broadcast(batch[key], source, group=group)
    num_trained = count_trained(sample) if labels and count_trained is not None else None
    bounds = batch.pop("bounds")
    lengths: dict[str, Any] = {}
    if bounds is not None and takes_mask(args):
        batch["attention_mask"] = document_mask(bounds, args.seq_length)
    elif bounds is not None and limits is not None:
        parameters = packed_sequence_parameters(bounds[0], args, limits.longest_document)
        batch["packed_seq_params"] = parameters
        lengths = {"cu_seqlens": parameters.cu_seqlens_q[None], "cu_seqlens_padded": None}
    if args.context_parallel_size > 1 and (inputs or labels):
        # The sequence, or each document of a pack, in 2 c parts, this rank's first and last: core/utils.py.
        share = partial(get_batch_on_this_cp_rank, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
        # It shares out some keys by name, or all: ours go one by one, by a name that it knows.
        shares = {key: share({"tokens": batch.pop(key), **lengths})["tokens"] for key in ours}
        batch = share(batch | lengths) | shares
    return batch | {"num_trained": num_trained}


def loss_func(
    loss_mask: Tensor,
    output: Tensor,
    *,
    normalization: Normalization = PER_TOKEN,
    conversation_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's 3-tuple contract: summed loss, what divides the sum of all ranks and micro-batches, and what to log.

    Weights scale the loss of their tokens, never what it is divided by. What is logged is always per trained token.

    Args:
        loss_mask: [b, s] fp32, the weight of each token, maybe negative; 0 where it is not trained.
        output: [b, s] fp32, the model's per-token loss.
        normalization: of the step.
        conversation_tokens: [b, s] int32; None where `normalization` needs none.
    """
    from megatron.core import mpu
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    losses = output.float()
    weighted = (losses * loss_mask).sum()
    factors = normalization.token_factors(conversation_tokens)
    # The gradient of a token's loss is then that of the sum times one product, as the fused output head takes it.
    loss = weighted if factors is None else (losses * (loss_mask * factors)).sum()
    num_tokens = (loss_mask != 0).sum().to(torch.int)
    samples = len(loss_mask) if mpu.get_context_parallel_rank() == 0 else 0
    divisor = normalization.divisor(num_tokens, conversation_tokens, samples)
    if get_args().check_for_nan_in_loss_and_grad:
        for reject, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=reject,
                message=f"found {what} in the local loss",
                tolerance=0.0,  # the forward pass is deterministic
                fatal=True,
            )
    # Not `loss`: Megatron divides that in place.
    return loss, divisor, {"lm loss": torch.stack([weighted.detach(), num_tokens.to(loss.dtype)])}


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]],
    model: torch.nn.Module,
    *,
    limits: PackLimits | None,
    sources: bool = False,
    reference: ReferenceColumns | None = None,
    on_batch: Callable[[dict[str, Any]], None] = lambda batch: None,
    normalization: Normalization = PER_TOKEN,
    count_trained: TrainedTokenCounter | None = None,
) -> tuple[Tensor, Any]:
    """One micro-batch through `model`; returns its output and the bound loss function. See `get_batch`.

    Args:
        data_iterator, limits, sources, count_trained: see `get_batch`.
        model: this rank's part.
        reference: as there, of samples of training; those of evaluation hold none.
        on_batch: called with the micro-batch, and its `token_factors` (see `Normalization`), before the model is.
        normalization: of the step in training; evaluations are per trained token.
    """
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args, get_timers

    args = get_args()
    if not model.training:
        normalization = PER_TOKEN
    get_timers()("batch-generator", log_level=2).start()
    batch = get_batch(
        data_iterator,
        get_attr_wrapped_model(model, "vp_stage"),
        args.micro_batch_size if model.training else args.eval_micro_batch_size,
        limits=limits,
        sources=sources,
        reference=reference if model.training else None,
        conversations=normalization.mode == "sample",
        count_trained=count_trained,
    )
    get_timers()("batch-generator").stop()
    counts = batch["conversation_tokens"]
    on_batch(batch | {"token_factors": normalization.token_factors(counts)})
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        **({"packed_seq_params": batch["packed_seq_params"]} if limits else {}),
    )
    return output, partial(loss_func, batch["loss_mask"], normalization=normalization, conversation_tokens=counts)
