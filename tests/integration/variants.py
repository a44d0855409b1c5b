"""Training scripts that differ from stock_pretrain.py in one way each: `variants.py NAME <flags>`."""

import sys

import stock_pretrain
import torch

NAME = sys.argv.pop(1)


def loss_func_of_old(loss_mask, output_tensor, model=None):
    """Megatron's contract of 2024: no token count."""
    loss, num_tokens, report = stock_loss_func(loss_mask, output_tensor, model)
    return loss / num_tokens, report


def loss_func_with_weights(loss_mask, output_tensor, model=None):
    """Weighs tokens by their position, of which the model is told nothing."""
    weights = torch.linspace(0.5, 1.5, loss_mask.numel()).view_as(loss_mask)
    return stock_loss_func(loss_mask * weights, output_tensor, model)


def forward_step_with_its_own_loss(data_iterator, model):
    """Asks the model for logits, so the model's loss is never called."""
    batch = stock_pretrain.get_batch(data_iterator)
    logits = model(batch["tokens"], batch["position_ids"], batch["attention_mask"])
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), batch["labels"], reduction="none")
    return losses, stock_pretrain.partial(stock_pretrain.loss_func, batch["loss_mask"], model=model)


def forward_step_without_mask(data_iterator, model):
    batch = stock_pretrain.get_batch(data_iterator)
    losses = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return losses, stock_pretrain.partial(stock_pretrain.loss_func, batch["loss_mask"], model=model)


def datasets_provider_that_asks_for_reruns(train_val_test_num_samples, vp_stage=None):
    """Megatron's rerun machine then runs every forward-backward twice. Its flag --rerun-mode offers no such value."""
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine

    get_rerun_state_machine().set_mode(RerunMode.REPORT_DETERMINISM_STATS)
    return stock_datasets_provider(train_val_test_num_samples, vp_stage)


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    """The way of building a model that scripts before 0.18 had."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    return GPTModel(
        core_transformer_config_from_args(args),
        get_gpt_layer_local_spec(),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


stock_loss_func = stock_pretrain.loss_func
stock_datasets_provider = stock_pretrain.datasets_provider

if __name__ == "__main__":
    if NAME == "old loss_func":
        stock_pretrain.loss_func = loss_func_of_old
    elif NAME == "own weights":
        stock_pretrain.loss_func = loss_func_with_weights
    elif NAME == "own loss":
        stock_pretrain.forward_step = forward_step_with_its_own_loss
    elif NAME == "no mask":
        stock_pretrain.forward_step = forward_step_without_mask
    elif NAME == "reruns":
        stock_pretrain.datasets_provider = datasets_provider_that_asks_for_reruns
    elif NAME == "model_provider":
        stock_pretrain.MODEL_PROVIDER = model_provider
    else:
        raise SystemExit(f"no variant {NAME!r}")
    stock_pretrain.main()
