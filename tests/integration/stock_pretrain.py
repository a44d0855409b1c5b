"""A Megatron training script in the shape of Megatron-LM's pretrain_gpt.py and pretrain_hybrid.py at core_v0.19.0.

It knows nothing of this library. Random sequences from memory, a NullTokenizer, a GPTModel, or a HybridModel where
`--hybrid-layer-pattern` is given. `--trace FOLDER` writes every microbatch's loss, exactly, to one file per rank.
"""

import json
from functools import partial
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.parallel_state import get_context_parallel_group, get_hybrid_data_context_parallel_groups
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers, pretrain, print_rank_0
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.utils import is_first_or_last_pipeline_stage

MODEL_PROVIDER = None  # a function builds the model instead of the config, as scripts before 0.18 do
BATCH_KEYS = ["attention_mask", "labels", "loss_mask", "position_ids", "tokens"]


class RandomSequences(torch.utils.data.Dataset):
    """Sequence `index` is the same wherever and whenever it is read; a prompt of its own length is not trained."""

    def __init__(self, size: int, length: int, vocabulary: int, seed: int, with_attention_mask: bool) -> None:
        self.size, self.length, self.vocabulary, self.seed = size, length, vocabulary, seed
        self.with_attention_mask = with_attention_mask

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + int(index))
        # Runs of neighbouring tokens, so that there is something to learn.
        first = torch.randint(self.vocabulary, (), generator=generator)
        steps = torch.randint(1, 4, (self.length + 1,), generator=generator)
        text = (first + steps.cumsum(0)) % (self.vocabulary - 1)
        prompt = int(torch.randint(self.length // 2, (), generator=generator))
        loss_mask = torch.ones(self.length)
        loss_mask[:prompt] = 0
        sample = {
            "tokens": text[:-1].contiguous(),
            "labels": text[1:].contiguous(),
            "loss_mask": loss_mask,
            "position_ids": torch.arange(self.length),
        }
        if self.with_attention_mask:  # True hides
            sample["attention_mask"] = torch.ones(1, self.length, self.length).tril().lt(0.5)
        return sample


def has_mtp(vp_stage):
    config = core_transformer_config_from_args(get_args())
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def get_batch(data_iterator, vp_stage=None):
    """This rank's part of the next batch; nothing on middle pipeline stages."""
    args = get_args()
    if not is_first_or_last_pipeline_stage(vp_stage) and not has_mtp(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in BATCH_KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(
        {"cu_seqlens": None, **batch},
        is_hybrid_cp=False,
        cp_group=get_context_parallel_group(),
        hybrid_cp_group_func=get_hybrid_data_context_parallel_groups,
    )


def loss_func(loss_mask, output_tensor, model=None):
    """Summed loss, number of trained tokens, report: Megatron's three-part contract."""
    args = get_args()
    losses = output_tensor.view(-1).float()
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(losses * loss_mask)
    num_tokens = loss_mask.sum().clone().detach().to(torch.int)
    if args.check_for_nan_in_loss_and_grad:
        for name, rejected in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.trace:
        trace(model, loss, num_tokens)
    return loss, num_tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}


def trace(model, loss, num_tokens):
    args = get_args()
    record = {
        "iteration": args.curr_iteration,
        "training": model.training,
        "loss": loss.item(),
        "tokens": int(num_tokens),
    }
    with (Path(args.trace) / f"rank{torch.distributed.get_rank()}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def forward_step(data_iterator, model):
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output_tensor = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output_tensor, partial(loss_func, batch["loss_mask"], model=model)


def datasets_provider(train_val_test_num_samples, vp_stage=None):
    args = get_args()
    print_rank_0("> building random sequences ...")
    return [
        RandomSequences(max(size, 1), args.seq_length, args.vocab_size, seed, args.create_attention_mask_in_dataloader)
        for seed, size in enumerate(train_val_test_num_samples)
    ]


def embedding_ranks(pp_ranks):
    """First and last stage (tied embeddings) and the stages that hold a multi-token prediction layer."""
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        args = get_args()
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def add_arguments(parser):
    group = parser.add_argument_group(title="stock_pretrain")
    group.add_argument("--trace", default=None, help="folder for the exact loss of every microbatch")
    return parser


def main():
    args = parse_and_validate_args(
        extra_args_provider=add_arguments,
        args_defaults={"tokenizer_type": "NullTokenizer", "vocab_size": 127},
    )
    model_config = hybrid_config_from_args(args) if args.hybrid_layer_pattern else gpt_config_from_args(args)
    pretrain(
        pretrain_cfg_container_from_args(args, None if MODEL_PROVIDER else model_config),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider=MODEL_PROVIDER,
        get_embedding_ranks=embedding_ranks,
    )


if __name__ == "__main__":
    main()
