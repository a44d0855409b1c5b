"""The line of a training that says which loss it has: `> sft loss: …`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from megatron_idft.loss.backends import resolve_backend
from megatron_idft.loss.linear.products import mixed_product
from megatron_idft.loss.linear.tokens import default_chunk_tokens
from megatron_idft.objectives import LambdaSchedule, Objective


def loss_line(
    args: argparse.Namespace,
    objective: Objective,
    device: torch.device,
    schedule: LambdaSchedule,
    end_of_turn_ids: Sequence[int],
) -> str:
    """Everything that was resolved.

    Args:
        args: Megatron's, validated.
        objective: what they describe.
        device: where the loss is computed.
        schedule: of lambda_t.
        end_of_turn_ids: token ids that end a turn.
    """
    settings = [f"objective {objective.name}"]
    settings += [
        f"{name} {value if isinstance(value, str) else f'{value:g}'}"
        for name, value in objective.hyperparameters.items()
        if name != "gamma_lambda"
    ]
    if args.sft_loss == "idft":
        settings.append(_describe_lambda(schedule))
    if objective.reference_statistics:
        settings.append("reads the reference's " + " and ".join(sorted(objective.reference_statistics)))
    if objective.kl_coefficient is not None:
        settings.append("reads the reference's top K")
    settings += [
        f"weight floor {args.sft_loss_weight_floor:g}",
        f"exempt tokens {args.sft_loss_exempt_tokens or 'none'}",
        f"end of turn {list(end_of_turn_ids) or 'unknown'}",
        f"vocabulary {args.sft_loss_vocab_size} of {args.padded_vocab_size} padded rows",
        f"backend {resolve_backend(args.sft_loss_backend, device)}",
        *_describe_head(args, device),
        f"calculate-per-token-loss {'on' if args.calculate_per_token_loss else 'off'}",
    ]
    return "> sft loss: " + ", ".join(settings)


def _describe_lambda(schedule: LambdaSchedule) -> str:
    warmup, ramp = schedule.warmup_iterations, schedule.ramp_iterations
    return f"lambda 0 for {warmup} iterations, then rising for {ramp}" if warmup or ramp else "lambda 1"


def _describe_head(args: argparse.Namespace, device: torch.device) -> list[str]:
    if args.sft_loss_head == "materialized":
        return ["head materialized"]
    tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
    chunk = args.sft_loss_chunk_tokens or default_chunk_tokens(tokens, device)
    once = args.calculate_per_token_loss
    product = "torch" if args.params_dtype == torch.float32 else mixed_product(device.type, args.params_dtype)[0]
    return [
        f"head fused, chunks of at most {min(chunk, tokens)} tokens",
        "gradients in forward" if once else "logits again in backward (calculate-per-token-loss is off)",
        f"weight gradient in fp32 by {product}",
    ]
