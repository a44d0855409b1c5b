"""The flags of the loss, declared without torch: `--help` comes at once. arguments.py checks and resolves them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from megatron_idft.objective_table import OBJECTIVE_FLAGS, OBJECTIVES
from megatron_idft.parsing import raise_errors

END_OF_TURN = "end-of-turn"  # a name of tokens for --sft-loss-exempt-tokens


def add_arguments(parser: argparse.ArgumentParser, per_token_loss_default: bool = True) -> argparse.ArgumentParser:
    """Add the loss flags to Megatron's parser: an `extra_args_provider` of `megatron.training`.

    Args:
        parser: Megatron's parser, with its own flags added.
        per_token_loss_default: whether `--calculate-per-token-loss` is on unless negated.
    """
    group = parser.add_argument_group(title="sft loss")
    group.add_argument(
        "--sft-loss",
        metavar=f"{{{','.join(OBJECTIVES)}}} or MODULE:FUNCTION",
        default=None,
        help="Objective of fine-tuning: each token's cross-entropy is weighted by a detached weight, with p the token's"
        " probability, H the entropy, phi = log p + H, V the vocabulary, q the probability under the reference of the"
        f" data (`prepare --reference`), r = q / p, c --anchor-coefficient, k --anchor-kl-coefficient. {_weights()}"
        " MODULE:FUNCTION: a function of yours from TokenStatistics to weights. Without this flag Megatron's own loss"
        " is left alone.",
    )
    for name, flag in OBJECTIVE_FLAGS.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=str if flag.choices else float,
            choices=flag.choices or None,
            default=None,
            help=f"{', '.join(flag.hyperparameters)}: {flag.help}. Default {flag.default}.",
        )
    group.add_argument(
        "--idft-lambda-warmup",
        type=float,
        default=None,
        help="idft: share of training, 0 to 1, during which lambda is 0 (the loss is then DFT). Default 0.0.",
    )
    group.add_argument(
        "--idft-lambda-ramp",
        type=float,
        default=None,
        help="idft: share of training after the warm-up over which lambda rises linearly to 1. Default 0.0. Both shares"
        " are turned into iterations at the first start and recorded in the checkpoint; a resumed run keeps them.",
    )
    group.add_argument(
        "--sft-loss-weight-floor",
        type=float,
        default=None,
        help="Smallest weight of a trained token, 0 to 1, for any objective. Default 0.0: off, as in the papers. Raise"
        " it when rare but right tokens are never learned.",
    )
    group.add_argument(
        "--sft-loss-exempt-tokens",
        type=_token,
        nargs="+",
        default=None,
        metavar="TOKEN",
        help="Tokens that always have weight 1: `end-of-turn`, the text of a special token such as <|im_end|> (in"
        " `train`), or an id. Models trained with DFT-like objectives may otherwise never learn to stop. Default none.",
    )
    group.add_argument(
        "--sft-loss-backend",
        choices=("auto", "reference", "triton"),
        default=None,
        help="Implementation of the loss. triton: fused kernels, on a GPU. reference: plain torch, on any device. auto:"
        " triton on a GPU where it is installed, else reference; the choice is printed. Default auto.",
    )
    group.add_argument(
        "--sft-loss-head",
        choices=("materialized", "fused"),
        default=None,
        help="materialized: the output layer computes all logits, then the loss reads them. fused: both at once, a few"
        " tokens at a time, so that the logits, the largest tensor of a step, are never in memory. Default"
        " materialized.",
    )
    group.add_argument(
        "--sft-loss-chunk-tokens",
        type=int,
        default=None,
        metavar="N",
        help="fused: tokens whose gradient is in memory, and multiplied with weight and hidden states, at once. More of"
        " them cost memory and save traffic. Default: an eighth of those computed, from 1024 to 4096; fewer on a CPU.",
    )
    group.add_argument(
        "--sft-loss-vocab-size",
        type=int,
        default=None,
        help="Rows of the true vocabulary; columns above are Megatron's padding and are left out of every sum."
        " Default: that of the config.json kept beside the checkpoint, else the tokenizer's size.",
    )
    group.add_argument(
        "--cpu",
        action="store_true",
        help="Train on the CPU with gloo even where a GPU is present. Automatic where there is none.",
    )
    group.add_argument(
        "--no-calculate-per-token-loss",
        action="store_false",
        dest="calculate_per_token_loss",
        help="Turn off --calculate-per-token-loss, which --sft-loss turns on: without it every micro-batch counts the"
        " same however few tokens it trains, and context parallelism weighs prompts and answers wrongly.",
    )
    if per_token_loss_default:
        parser.set_defaults(calculate_per_token_loss=True)
    return parser


def wants_per_token_loss(words: Sequence[str]) -> bool:
    """Whether a command line has a flag that turns `--calculate-per-token-loss` on."""
    return any(word.partition("=")[0] in ("--sft-loss", "--sft-normalization") for word in words)


def compose_providers(
    script_provider: Callable[[argparse.ArgumentParser], argparse.ArgumentParser] | None, per_token_loss_default: bool
) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """An argument provider that adds the script's own flags and then these."""

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        if script_provider is not None:
            parser = script_provider(parser)
        return raise_errors(add_arguments(parser, per_token_loss_default))

    return provider


def _weights() -> str:
    """One sentence for each objective."""
    papers = {name: f" (arXiv {one.paper})" if one.paper else "" for name, one in OBJECTIVES.items()}
    return " ".join(f"{name}: {one.weight}{papers[name]}." for name, one in OBJECTIVES.items())


def _token(word: str) -> int | str:
    try:
        return int(word)
    except ValueError:
        return word
