"""Negative weights of turns beside the objective: whether moving away from a token ends, and whether it is sense."""

from __future__ import annotations

import argparse

import torch

from megatron_idft.errors import ArgumentError
from megatron_idft.integration.loss.arguments import build_objective
from megatron_idft.objectives import Objective, ce
from megatron_idft.statistics import TokenStatistics

_GONE = -80.0  # log p of a token that the model has moved away from
_FADED = 1e-3  # of cross-entropy's gradient


def fades(objective: Objective) -> bool:
    """Whether the objective's weight falls to nothing with the token's probability, so that a negative turn is done
    with once its tokens are unlikely."""
    return bool((_weight(objective, torch.tensor(_GONE)).abs() < _FADED).all())


def is_anchored(objective: Objective) -> bool:
    """Whether the objective pulls tokens that the model has lost back to a reference."""
    if objective.kl_coefficient is not None:
        return True
    risen = _weight(objective, torch.tensor(_GONE)) - _weight(objective, None)
    return bool(objective.reference_statistics and (risen > _FADED).any())


def _weight(objective: Objective, log_prob: torch.Tensor | None) -> torch.Tensor:
    """[4] weights of a token of this log p (None: the reference's), where the model is sure and where it is not, and
    where the reference expects the token and where not."""
    reference = torch.tensor([-0.1, -10.0, -0.1, -10.0])
    entropy = torch.tensor([0.1, 0.1, 2.0, 2.0])
    statistics = TokenStatistics(
        reference if log_prob is None else log_prob.expand(4),
        entropy,
        labels=torch.zeros(4, dtype=torch.int64),
        vocab_size=1 << 15,
        max_prob=(-entropy).exp(),
        sum_squared_prob=(-entropy).exp(),
        argmax=torch.ones(4, dtype=torch.int64),
        reference_log_prob=reference,
        reference_entropy=entropy,
    )
    return objective.weight(statistics)


def check_negative_weights(args: argparse.Namespace, tokens: int) -> str | None:
    """What to say of data with negative weights under this run's objective, or None.

    Args:
        args: Megatron's, validated.
        tokens: of negative weight, in the training data.

    Raises:
        ArgumentError: the objective holds the model at a reference, from which a negative weight would drive it away;
            or multi-token prediction, whose loss Megatron scales by sums of the weights.
    """
    if not tokens:
        return None
    objective = ce() if args.sft_loss is None else build_objective(args)
    if is_anchored(objective):
        raise ArgumentError(
            f"--sft-loss {args.sft_loss} holds the model at its reference, and {tokens:,} tokens of the training data"
            " have a negative weight: on these it would drive the model away from the reference, ever faster. Take an"
            " objective without such a term (dft, idft), or set the negative weights to 0"
        )
    if args.mtp_num_layers:
        raise ArgumentError(
            f"--mtp-num-layers {args.mtp_num_layers}: Megatron divides the loss of multi-token prediction by the sum of"
            f" the weights, which the {tokens:,} tokens of negative weight in the training data take to 0 or below."
            " Drop the flag, or set the negative weights to 0"
        )
    exempt = bool(args.sft_loss is not None and args.sft_loss_exempt_tokens)
    if fades(objective) and not exempt:
        return None
    why = "--sft-loss-exempt-tokens have full weight" if fades(objective) else f"the weight of {objective.name} stays"
    return (
        f"{tokens:,} tokens of the training data have a negative weight, and {why} where a token has become unlikely:"
        " the loss has no lower bound, and the model runs away from these tokens for as long as training goes on. Train"
        " for a few steps, keep the weights small, or take --sft-loss dft or idft, which fade out"
    )
