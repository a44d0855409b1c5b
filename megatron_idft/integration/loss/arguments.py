"""The flags of the loss, checked and resolved in one place; flags.py declares them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron_idft.errors import ArgumentError
from megatron_idft.integration.loss.flags import END_OF_TURN
from megatron_idft.loss.backends import resolve_backend
from megatron_idft.objective_table import OBJECTIVE_FLAGS
from megatron_idft.objectives import LambdaSchedule, Objective, objective_names, resolve_objective

# Flags of one objective or of a few -> those objectives; and their defaults.
_OBJECTIVES_OF = {name: tuple(flag.hyperparameters) for name, flag in OBJECTIVE_FLAGS.items()} | {
    "idft_lambda_warmup": ("idft",),
    "idft_lambda_ramp": ("idft",),
}
DEFAULTS = {name: flag.default for name, flag in OBJECTIVE_FLAGS.items()} | {
    "idft_lambda_warmup": 0.0,
    "idft_lambda_ramp": 0.0,
}
# These must agree between a checkpoint and the run that continues it for the objective to be the same.
OBJECTIVE_ARGUMENTS = (
    "sft_loss",
    *_OBJECTIVES_OF,
    "sft_loss_weight_floor",
    "sft_loss_exempt_tokens",
    "sft_loss_vocab_size",
)
# They change rounding only, whatever the objective is.
HEAD_ARGUMENTS = ("sft_loss_head", "sft_loss_chunk_tokens")
# The same of `train` alone, which hold whatever the objective is.
NORMALIZATION_ARGUMENTS = ("sft_normalization", "sft_normalization_constant")
_BEFORE_THE_FLAG = DEFAULTS | {"sft_normalization": ["token"], "sft_loss_head": "materialized"}


def validate_arguments(args: argparse.Namespace) -> None:
    """Check the loss flags against each other and against Megatron's, and fill in their defaults.

    Raises:
        ArgumentError: with the remedy.
    """
    given = [
        name
        for name in (*OBJECTIVE_ARGUMENTS[1:], "sft_loss_backend", *HEAD_ARGUMENTS)
        if getattr(args, name) is not None
    ]
    if args.sft_loss is None:
        if given:
            name = given[0]
            named, (objective, *_) = _flag(name), _OBJECTIVES_OF.get(name, ("idft",))
            raise ArgumentError(f"{named} was given without --sft-loss. Add --sft-loss {objective}, or drop {named}")
        return
    if args.sft_loss not in objective_names() and ":" not in args.sft_loss:
        raise ArgumentError(
            f"--sft-loss {args.sft_loss} is not known. Choose one of {', '.join(objective_names())}, or name a"
            " function of yours as module:function"
        )
    for name, default in DEFAULTS.items():
        objectives = _OBJECTIVES_OF[name]
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.sft_loss not in objectives:
            raise ArgumentError(
                f"{_flag(name)} has no meaning for --sft-loss {args.sft_loss}. Drop it, or use --sft-loss"
                f" {' or '.join(objectives)}"
            )
    if args.sft_loss_weight_floor is None:
        args.sft_loss_weight_floor = 0.0
    if args.sft_loss_exempt_tokens is None:
        args.sft_loss_exempt_tokens = []
    if args.sft_loss_backend is None:
        args.sft_loss_backend = "auto"
    if args.sft_loss_head is None:
        args.sft_loss_head = "materialized"
    _refuse_incompatible(args)
    _validate_head(args)
    try:  # building the objective checks every hyper-parameter, before anything expensive starts
        build_objective(args)
        resolve_backend(args.sft_loss_backend, "cpu" if args.cpu or not torch.cuda.is_available() else "cuda")
        LambdaSchedule.from_shares(args.idft_lambda_warmup, args.idft_lambda_ramp, 1)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"--sft-loss {args.sft_loss}: {error}") from error


def refuse_yaml(wants_loss: bool) -> None:
    """`--yaml-cfg` replaces the whole namespace, so no flag of ours survives it: refuse if one was asked for."""
    if wants_loss:
        raise ArgumentError(
            "--yaml-cfg replaces every command-line argument, so --sft-loss would be lost. Pass Megatron's settings as"
            " flags instead of --yaml-cfg"
        )


def cuda_graph_flag(args: argparse.Namespace) -> str | None:
    """The flag that asks for CUDA graphs of the model, as it was given; None where none does."""
    for name in (
        "enable_cuda_graph",
        "external_cuda_graph",
    ):  # deprecated; Megatron's check of its arguments drops them
        if getattr(args, name, False):
            return _flag(name)
    implementation = getattr(args, "cuda_graph_impl", None) or "none"
    return None if implementation == "none" else f"--cuda-graph-impl {implementation}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse_incompatible(args: argparse.Namespace) -> None:
    refusals = {
        "cross_entropy_loss_fusion": "the stock fused cross-entropy computes the loss itself. Drop"
        " --cross-entropy-loss-fusion; the --sft-loss kernel never materialises the softmax either",
        "fp16_lm_cross_entropy": "the loss is summed in fp32 whatever the logits' dtype. Drop --fp16-lm-cross-entropy",
        "logits_save_dir": "saving teacher logits replaces the same method of the model. Save them in a run without"
        " --sft-loss",
        "logits_load_dir": "knowledge distillation from saved logits brings its own loss. Drop --logits-load-dir or"
        " --sft-loss",
        "export_kd_teacher_load": "knowledge distillation brings its own loss. Drop --export-kd-teacher-load or"
        " --sft-loss",
        "modelopt_enabled": "ModelOpt brings its own loss. Drop it or --sft-loss",
        "perform_rl_step": "reinforcement learning brings its own loss. Drop --perform-rl-step or --sft-loss",
    }
    for name, why in refusals.items():
        if getattr(args, name, None):
            raise ArgumentError(f"{_flag(name)} cannot be combined with --sft-loss: {why}")
    if args.calculate_per_token_loss and getattr(args, "ddp_average_in_collective", False):
        raise ArgumentError(
            "--ddp-average-in-collective averages gradients over ranks, --calculate-per-token-loss (on with --sft-loss)"
            " over tokens. Drop --ddp-average-in-collective, or add --no-calculate-per-token-loss"
        )


def _validate_head(args: argparse.Namespace) -> None:
    chunk = args.sft_loss_chunk_tokens
    if args.sft_loss_head != "fused":
        if chunk is not None:
            raise ArgumentError(
                "--sft-loss-chunk-tokens has no meaning for --sft-loss-head materialized. Drop it, or use"
                " --sft-loss-head fused"
            )
        return
    if chunk is not None and chunk < 1:
        raise ArgumentError(f"--sft-loss-chunk-tokens {chunk}: pass a whole number of tokens from 1, such as 4096")
    shards = args.tensor_parallel_num_weight_shards
    graphs = (args.cuda_graph_impl, *(args.cuda_graph_modules or ()), *(args.cuda_graph_scope_deprecated or ()))
    refusals = {
        "--defer-embedding-wgrad-compute": (args.defer_embedding_wgrad_compute, "its product would be computed twice"),
        "--use-megatron-fsdp": (args.use_megatron_fsdp, "it needs the weight's rows whole"),
        "--use-torch-fsdp2": (args.use_torch_fsdp2, "it needs the weight's rows whole"),
        f"--tensor-parallel-num-weight-shards {shards}": ((shards or 1) > 1, "it needs the weight's rows whole"),
        "--fp8-output-proj": (getattr(args, "fp8_output_proj", False), "its products are in the weight's own type"),
        "--config-logger-dir": (args.config_logger_dir, "there are no logits to log"),
        "--save-activations-interval": (args.save_activations_interval, "there are no logits to save"),
        "--save-dgrads-interval": (args.save_dgrads_interval, "there is no gradient of logits to save"),
        "--reuse-grad-buf-for-mxfp8-param-ag": (
            args.reuse_grad_buf_for_mxfp8_param_ag,
            "it adds to gradients in forward, while these hold parameters",
        ),
        "--cuda-graph-warmup-steps 0": (
            "full_iteration" in graphs and args.cuda_graph_warmup_steps == 0,
            "the host looks at the gradients of the first step, which a graph cannot capture",
        ),
    }
    for flag, (given, why) in refusals.items():
        if given:
            raise ArgumentError(
                f"{flag} cannot be combined with --sft-loss-head fused: {why}. Drop the flag, or use --sft-loss-head"
                " materialized"
            )


def resolve_exempt_tokens(
    tokens: Sequence[int | str], end_of_turn_ids: Callable[[], Sequence[int]], special_ids: Mapping[str, int]
) -> list[int]:
    """The ids of `--sft-loss-exempt-tokens`, in the order given, each once.

    Raises:
        ArgumentError: unknown names.
    """
    ids: list[int] = []
    for token in tokens:
        if token == END_OF_TURN:
            found = list(end_of_turn_ids())
            if not found:
                raise ArgumentError(f"--sft-loss-exempt-tokens {END_OF_TURN}: it is not known; pass its token id")
            ids += found
        elif isinstance(token, int):
            ids.append(token)
        elif token in special_ids:
            ids.append(special_ids[token])
        else:
            known = ", ".join(list(special_ids)[:20])
            raise ArgumentError(
                f"--sft-loss-exempt-tokens {token[:80]!r}: pass `{END_OF_TURN}`, a token id"
                + (f", or the text of a special token ({known})" if known else "")
            )
    return list(dict.fromkeys(ids))


def build_objective(args: argparse.Namespace, gamma_lambda: float | torch.Tensor = 1.0) -> Objective:
    """The objective that validated `args` describe, with lambda_t taken from `gamma_lambda`."""
    hyperparameters: dict[str, Any] = {
        flag.hyperparameters[args.sft_loss]: getattr(args, name)
        for name, flag in OBJECTIVE_FLAGS.items()
        if args.sft_loss in flag.hyperparameters
    }
    if args.sft_loss == "idft":
        hyperparameters["gamma_lambda"] = gamma_lambda
    return resolve_objective(
        args.sft_loss,
        weight_floor=args.sft_loss_weight_floor,
        exempt_token_ids=[token for token in args.sft_loss_exempt_tokens if isinstance(token, int)],  # names: later
        **hyperparameters,
    )


def resolve_schedule(args: argparse.Namespace) -> LambdaSchedule:
    """The lambda_t schedule in iterations. Recorded in `args`, hence in the checkpoint, the first time it is made.

    `args.train_iters` must be known, which Megatron guarantees after the optimizer is set up.
    """
    if getattr(args, "idft_lambda_warmup_iters", None) is None:
        train_iters = args.train_iters or 1  # --skip-train needs no length
        schedule = LambdaSchedule.from_shares(args.idft_lambda_warmup, args.idft_lambda_ramp, train_iters)
        args.idft_lambda_warmup_iters = schedule.warmup_iterations
        args.idft_lambda_ramp_iters = schedule.ramp_iterations
    return LambdaSchedule(args.idft_lambda_warmup_iters, args.idft_lambda_ramp_iters)


def differences_from_checkpoint(args: argparse.Namespace, checkpoint_args: argparse.Namespace) -> list[str]:
    """One line per loss setting that differs between a checkpoint and the run that continues it."""
    lines = {}
    of_train = NORMALIZATION_ARGUMENTS if hasattr(args, "sft_normalization") else ()
    for name in (*OBJECTIVE_ARGUMENTS, *HEAD_ARGUMENTS, *of_train):
        # A checkpoint may be older than a flag; its objective then had no use for it.
        then, now = getattr(checkpoint_args, name, _BEFORE_THE_FLAG.get(name)), getattr(args, name, None)
        if then != now:
            shown = (" ".join(map(str, value)) if isinstance(value, list) else value for value in (then, now))
            lines[name] = "{}: {} in the checkpoint, {} now".format(_flag(name), *shown)
    # Another objective explains every other difference of it.
    explained = OBJECTIVE_ARGUMENTS[1:] if "sft_loss" in lines else ()
    return [line for name, line in lines.items() if name not in explained]
