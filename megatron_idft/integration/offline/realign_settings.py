"""The flags of `realign` together: checked, and resolved into the settings of hinted_decoding/."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import ArgumentError
from megatron_idft.hinted_decoding.input.provided import Origin
from megatron_idft.hinted_decoding.mixing import EntropyMixing
from megatron_idft.hinted_decoding.prompts import HintTemplate, analysis_template, hint_template
from megatron_idft.hinted_decoding.settings import RealignSettings
from megatron_idft.inference.requests import Repetition, Sampling

WHOLE_NUMBERS_FROM_1 = (
    "max_rows",
    "max_new_tokens",
    "analysis_max_tokens",
    "entropy_vocab_size",
    "repetition_count",
    "repetition_every",
    "verify_workers",
)
_WHOLE_NUMBERS_FROM_0 = ("rollout_samples", "retries", "top_k", "rollout_top_k", "repetition_ngram")


def check_realign_arguments(args: argparse.Namespace) -> None:
    """Check flags against each other.

    Raises:
        ArgumentError: flags cannot be used together, or at all.
    """
    for name in _WHOLE_NUMBERS_FROM_0:
        if getattr(args, name) < 0:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(args, name)}: pass a whole number from 0")
    _check_layout(args)
    for flag, given, needs, there in (
        ("--hint-prompt", args.hint_prompt, "--no-analysis", args.no_analysis),
        ("--hint-share", args.hint_share, "--mix fixed", args.mix == "fixed"),
    ):
        if given is not None and not there:
            written = args.renamed_flags.get(flag, flag)
            raise ArgumentError(f"{written} is used only with {needs}: add that, or drop {written}")
    if args.mix == "fixed" and args.hint_share is None:
        raise ArgumentError("--mix fixed needs --hint-share, a number from 0 to 1")
    for flag, given in (("--analysis-prompt", args.analysis_prompt), ("--analyses", args.analyses)):
        if given is not None and args.no_analysis:
            raise ArgumentError(f"{flag} and --no-analysis say different things about the analysis: drop one of them")
    if args.estimate and args.retry_errors:
        raise ArgumentError("--estimate and --retry-errors are different things to do: pass one of them")
    if not 0 < args.retry_slope_factor < float("inf"):
        written = args.renamed_flags.get("--retry-slope-factor", "--retry-slope-factor")
        raise ArgumentError(f"{written} {args.retry_slope_factor}: pass a number above 0")
    if args.kv_memory_gb is not None and not args.kv_memory_gb > 0:
        raise ArgumentError(f"--kv-memory-gb {args.kv_memory_gb}: pass a number above 0")
    if args.fallback == "retry" and args.temperature == 0 and args.mix in ("fixed", "piecewise"):
        raise ArgumentError(
            f"--fallback retry with --temperature 0 and --mix {args.mix} would write the same again: raise"
            " --temperature, or choose another fallback"
        )


def _check_layout(args: argparse.Namespace) -> None:
    remedy = "drop the flag: the weights load under any layout"
    for name, why in (
        ("pipeline_model_parallel_size", "one token at a time would leave all stages but one idle"),
        ("context_parallel_size", "keys and values of a response lie on one rank"),
    ):
        if (getattr(args, name, None) or 1) > 1:
            raise ArgumentError(f"--{name.replace('_', '-')} is not served in decoding: {why}; {remedy}")
    for name in (
        "virtual_pipeline_model_parallel_size",
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
    ):
        if getattr(args, name, None) is not None:
            raise ArgumentError(f"--{name.replace('_', '-')}: virtual stages are not served in decoding; {remedy}")
    if args.sequence_parallel:
        raise ArgumentError(f"--sequence-parallel is not served in decoding: one token cannot be split; {remedy}")


def resolve_template(args: argparse.Namespace) -> HintTemplate:
    """The template that the flags name.

    Raises:
        InputError: it cannot be used; the message names the file.
    """
    return hint_template(args.hint_prompt) if args.no_analysis else analysis_template(args.analysis_prompt)


def resolve_settings(args: argparse.Namespace, template: HintTemplate, vocab_size: int) -> RealignSettings:
    """The settings that the flags describe.

    Args:
        args: checked by `check_realign_arguments`.
        template: of `resolve_template`.
        vocab_size: the true one.

    Raises:
        ArgumentError, InputError: a value lies outside its range.
    """
    repetition = None
    if args.repetition_ngram:
        repetition = Repetition(args.repetition_ngram, args.repetition_count, args.repetition_every)
    return RealignSettings(
        seed=args.seed,
        max_positions=args.seq_length,
        max_tokens=min(args.max_new_tokens, args.seq_length),
        templates=(template,),
        mixing=EntropyMixing(
            args.entropy_vocab_size or vocab_size,
            args.mix,
            slope=args.mix_slope,
            hint_share=args.hint_share,
            first_token_hinted=args.first_token == "hinted",
        ),
        rollout_samples=args.rollout_samples,
        rollout_sampling=rollout_sampling(args),
        analysis_sampling=_sampling("analysis-", args.analysis_temperature, 1.0, 0, False),
        analysis_max_tokens=args.analysis_max_tokens,
        hinted_sampling=_sampling("", args.temperature, args.top_p, args.top_k, args.nucleus_before_temperature),
        splitter=args.splitter or None,
        repetition=repetition,
        stop_on_first_token=args.stop_on_first_token,
        fallback=args.fallback,
        retries=args.retries,
        retry_slope_factor=args.retry_slope_factor,
        after_retries=args.after_retries,
        unverified=args.unverified,
    )


def resolve_origin(args: argparse.Namespace, tokenizer: ChatTokenizer, templates: Sequence[HintTemplate]) -> Origin:
    """What --rollouts and --analyses must have been made with.

    Args:
        args: checked.
        tokenizer: of the model.
        templates: in use.
    """
    sampling = rollout_sampling(args)
    return Origin(
        tokenizer=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        templates=[template.sha256 for template in templates if template.marker is not None],
        sampling={"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k},
    )


def rollout_sampling(args: argparse.Namespace) -> Sampling:
    """How own responses are drawn.

    Raises:
        ArgumentError: a value lies outside its range.
    """
    return _sampling("rollout-", args.rollout_temperature, args.rollout_top_p, args.rollout_top_k, False)


def _sampling(prefix: str, temperature: float, top_p: float, top_k: int, cut_before: bool) -> Sampling:
    try:
        return Sampling(temperature, top_p, top_k, cut_before)
    except ValueError as error:
        raise ArgumentError(f"--{prefix}temperature, --{prefix}top-p, --{prefix}top-k: {error}") from error
