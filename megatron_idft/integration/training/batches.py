"""Batches, forward step and loss function of the training program, in the shape of Megatron-LM's pretrain_gpt.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "cu_seqlens", "max_seqlen")


def get_batch(
    data_iterator: Iterator[dict[str, Tensor]], vp_stage: int | None, micro_batch_size: int, sources: bool = False
) -> dict[str, Any]:
    """This rank's share of the next micro-batch, or Nones on pipeline stages that need none.

    sources: whether samples hold `sources`.

    Returns:
        tokens, labels, position_ids [b, s/cp] int64 and loss_mask [b, s/cp] fp32; what a stage does not read is None.
        With `sources`, those: [b, 1] int64. Collectives: broadcasts over the tensor-parallel group.
    """
    from megatron.core import mpu
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    args = get_args()
    mtp = False
    if args.mtp_num_layers:
        mtp = mtp_on_this_rank(
            layout=core_transformer_config_from_args(args).pipeline_model_parallel_layout,
            mtp_num_layers=args.mtp_num_layers,
            ignore_virtual=False,
            vp_stage=vp_stage,
        )
    if not is_first_or_last_pipeline_stage(vp_stage) and not mtp:
        return dict.fromkeys(_KEYS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = dict.fromkeys(_KEYS)
    if tp_rank == 0:
        batch |= {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
    of_records = batch.pop("sources", None)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    if sources:
        if tp_rank != 0:
            of_records = torch.empty((micro_batch_size, 1), dtype=torch.int64, device=torch.cuda.current_device())
        torch.distributed.broadcast(
            of_records, mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
        )
        batch["sources"] = of_records
    return batch


def loss_func(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's 3-tuple contract: summed loss, number of trained tokens as int, and what to log.

    Weights scale the loss of their tokens, never what it is divided by: that is the number of trained tokens.

    Args:
        loss_mask: [b, s] fp32, the weight of each token; 0 where it is not trained.
        output: [b, s] fp32, the model's per-token loss.
    """
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    mask = loss_mask.reshape(-1)
    loss = torch.sum(output.reshape(-1).float() * mask)
    num_tokens = (mask > 0).sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for reject, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=reject,
                message=f"found {what} in the local loss",
                tolerance=0.0,  # the forward pass is deterministic
                fatal=True,
            )
    # A copy: Megatron divides the returned loss in place.
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach().clone(), num_tokens.to(loss.dtype)])}


# Called with a micro-batch's sources before the model is; None where no sources are kept.
OnSources = Callable[[Tensor | None], None] | None


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module, on_sources: OnSources = None
) -> tuple[Tensor, Any]:
    """One micro-batch through `model`; returns its output and the bound loss function."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args, get_timers

    args = get_args()
    get_timers()("batch-generator", log_level=2).start()
    batch = get_batch(
        data_iterator,
        get_attr_wrapped_model(model, "vp_stage"),
        args.micro_batch_size if model.training else args.eval_micro_batch_size,
        sources=on_sources is not None,
    )
    get_timers()("batch-generator").stop()
    if on_sources is not None:
        on_sources(batch.get("sources"))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])
