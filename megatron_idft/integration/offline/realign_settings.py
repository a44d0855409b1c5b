"""The flags of `realign` together: checked, and resolved into the settings of hinted_decoding/."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_idft.corpus.messages import GREATEST_WEIGHT, LEAST_WEIGHT
from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import ArgumentError, InputError
from megatron_idft.hinted_decoding.input.provided import Origin
from megatron_idft.hinted_decoding.mixing import EntropyMixing
from megatron_idft.hinted_decoding.named_prompts import AUTO, PAPER, NamedPrompts, named_prompts
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.settings import RealignSettings
from megatron_idft.inference.requests import Repetition, Sampling
from megatron_idft.integration.offline.realign_arguments import add_realign_arguments, last_resort
from megatron_idft.integration.offline.realign_paper import apply_paper
from megatron_idft.integration.offline.realign_regenerate import check_regenerate

WHOLE_NUMBERS_FROM_1 = (
    "max_rows",
    "prompt_trial_records",
    "max_new_tokens",
    "analysis_max_tokens",
    "entropy_vocab_size",
    "repetition_count",
    "repetition_every",
    "verify_workers",
)
_WHOLE_NUMBERS_FROM_0 = ("rollout_samples", "retries", "top_k", "rollout_top_k", "repetition_ngram")
_RETRIES, _MORE_ROOM, _BARE_BELOW = 2, 2.0, 0.25


def check_realign_arguments(args: argparse.Namespace) -> None:
    """Check flags against each other.

    Raises:
        ArgumentError: flags cannot be used together, or at all.
    """
    check_regenerate(args, add_realign_arguments)
    apply_paper(args)
    for name in _WHOLE_NUMBERS_FROM_0:
        if (getattr(args, name) or 0) < 0:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(args, name)}: pass a whole number from 0")
    _check_layout(args)
    for flag, given, needs, there in (("--hint-share", args.hint_share, "--mix fixed", args.mix == "fixed"),):
        if given is not None and not there:
            written = args.renamed_flags.get(flag, flag)
            raise ArgumentError(f"{written} is used only with {needs}: add that, or drop {written}")
    if args.mix == "fixed" and args.hint_share is None:
        raise ArgumentError("--mix fixed needs --hint-share, a number from 0 to 1")
    _check_prompts(args)
    if args.estimate and args.retry_errors:
        raise ArgumentError("--estimate and --retry-errors are different things to do: pass one of them")
    if not 0 < args.retry_slope_factor < float("inf"):
        written = args.renamed_flags.get("--retry-slope-factor", "--retry-slope-factor")
        raise ArgumentError(f"{written} {args.retry_slope_factor}: pass a number above 0")
    if not 0 < args.verifier_threshold < 1:
        raise ArgumentError(f"--verifier-threshold {args.verifier_threshold}: pass a probability between 0 and 1")
    if args.kv_memory_gb is not None and not args.kv_memory_gb > 0:
        raise ArgumentError(f"--kv-memory-gb {args.kv_memory_gb}: pass a number above 0")
    if args.more_room is not None and not (args.more_room == 0 or 1 <= args.more_room < float("inf")):
        raise ArgumentError(f"--more-room {args.more_room}: pass a number from 1, or 0")
    if args.bare_below is not None and not 0 <= args.bare_below <= 1:
        raise ArgumentError(f"--bare-below {args.bare_below}: pass a share of the original's tokens, from 0 to 1")
    if not LEAST_WEIGHT <= args.original_weight <= GREATEST_WEIGHT:
        raise ArgumentError(f"--original-weight {args.original_weight}: pass a weight above 0; see --fallback drop")
    if args.original_weight != 1 and "original" not in (last_resort(args), args.unverified):
        raise ArgumentError(
            "--original-weight is used only with --fallback original or --unverified original: add one of these, or"
            " drop it"
        )
    asked = _RETRIES if args.retries is None and args.fallback == "retry" else args.retries
    if asked and _repeats_itself(args):
        raise ArgumentError(
            f"--retries {asked} with --temperature 0 and --mix {args.mix} would write the same again: raise"
            " --temperature, or drop --retries"
        )


def _repeats_itself(args: argparse.Namespace) -> bool:
    """Whether a retry, which differs by its seed and its slope, would write what was written before."""
    return bool(args.temperature == 0 and args.mix in ("fixed", "piecewise"))


def _check_prompts(args: argparse.Namespace) -> None:
    for flag, given in (("--analyses", args.analyses), ("--analysis-marker", args.analysis_marker)):
        if given is not None and args.no_analysis:
            raise ArgumentError(f"{flag} and --no-analysis say different things about the analysis: drop one of them")
    if args.analysis_prompt is not None and (args.hint_prompt is not None or args.no_analysis):
        other = "--no-analysis" if args.hint_prompt is None else "--hint-prompt"
        raise ArgumentError(f"--analysis-prompt and {other} say different things about the hint: drop one of them")
    if args.analyses is not None and AUTO in (args.hint_prompt or ()):
        raise ArgumentError("--analyses belong to one prompt: name it as --hint-prompt, instead of auto")
    if args.prompt_trial_records is not None and not _tries(args):
        raise ArgumentError("--prompt-trial-records is used only with --hint-prompt auto: drop one of them")


def _tries(args: argparse.Namespace) -> bool:
    """Whether a trial chooses the prompts."""
    former = args.analysis_prompt is not None or args.no_analysis or args.analyses is not None
    return not former if args.hint_prompt is None else AUTO in args.hint_prompt


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


def resolve_prompts(args: argparse.Namespace) -> NamedPrompts:
    """The prompts that the flags name; none with --regenerate.

    Without --hint-prompt, texts of --analyses belong to the packaged analysis, and the flags that --hint-prompt has
    replaced mean what they did.

    Raises:
        InputError: one cannot be used; the message names the file.
    """
    if args.regenerate:
        return NamedPrompts(())
    names = args.hint_prompt
    if args.analysis_prompt is not None:
        names = [args.analysis_prompt]
    elif names is None:
        names = ["hint"] if args.no_analysis else [AUTO] if _tries(args) else [PAPER]
    named = named_prompts(names)
    if args.no_analysis:
        named = named.without_analysis()
    if (args.analysis_prompt or args.analyses) and not any(template.marker for template in named.templates):
        flag = "--analyses" if args.analyses else "--analysis-prompt"
        raise InputError(f"{named.templates[0].name}: {flag} needs a prompt with a header line `marker: …`")
    return named


def resolve_settings(
    args: argparse.Namespace,
    templates: tuple[HintTemplate, ...],
    vocab_size: int,
    begun: Mapping[str, Any] | None = None,
) -> RealignSettings:
    """The settings that the flags describe.

    Args:
        args: checked by `check_realign_arguments`.
        templates: the prompts, in order of preference.
        vocab_size: the true one.
        begun: the settings, under today's names, of an output folder that an earlier version began; where flags leave
            something open that version's defaults are taken, so that the same command goes on with it.

    Raises:
        ArgumentError, InputError: a value lies outside its range.
    """
    repetition = None
    if args.repetition_ngram:
        repetition = Repetition(args.repetition_ngram, args.repetition_count, args.repetition_every)
    former = begun or {}
    retries = 0 if _repeats_itself(args) else (former.get("retry") or {}).get("retries", 0) if begun else _RETRIES
    more_room = former.get("more_room", _MORE_ROOM)
    bare_below = former.get("bare_below", 0.0) if begun else _BARE_BELOW
    marker = (former.get("analysis") or {}).get("marker", "append")
    return RealignSettings(
        seed=args.seed,
        max_positions=args.seq_length,
        max_tokens=min(args.max_new_tokens, args.seq_length),
        templates=templates,
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
        analysis_marker=args.analysis_marker or marker,
        hinted_sampling=_sampling("", args.temperature, args.top_p, args.top_k, args.nucleus_before_temperature),
        splitter=args.splitter or None,
        repetition=repetition,
        stop_on_first_token=args.stop_on_first_token,
        more_room=more_room if args.more_room is None else 0.0 if args.more_room <= 1 else args.more_room,
        fallback="original" if last_resort(args) == "original" else "drop",
        original_weight=args.original_weight,
        bare_below=bare_below if args.bare_below is None else args.bare_below,
        retries=retries if args.retries is None else args.retries,
        retry_slope_factor=args.retry_slope_factor,
        regenerate=args.regenerate,
        only_right=args.only_right,
        unverified="keep" if args.regenerate and not args.only_right else args.unverified,
        model_judge_threshold=args.verifier_threshold if args.verifier == "model" else None,
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
