"""--regenerate: own responses to the records of `realign`, without reference, hint and fallback."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from megatron_idft.errors import ArgumentError

# Flags that make no sense then; those of the verifier do with --only-right.
HINTED = (
    "rollouts", "paper", "hint_prompt", "prompt_trial_records", "no_analysis", "analysis_prompt", "analysis_max_tokens",
    "analysis_marker", "analysis_temperature", "analyses", "mix", "mix_slope", "hint_share", "first_token",
    "entropy_vocab_size", "temperature", "top_p", "top_k", "nucleus_before_temperature", "splitter",
    "stop_on_first_token", "retries", "retry_slope_factor", "bare_below", "fallback", "after_retries",
    "original_weight", "unverified", "leak_phrases", "verifier", "verifier_threshold",
)  # fmt: skip
VERIFYING = ("verifier_plugin", "verify_workers", "verify_timeout")
UNUSED = (*HINTED, *VERIFYING)
_WRITTEN = {"nucleus_before_temperature": "--nucleus-after-temperature"}


def check_regenerate(
    args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
) -> None:
    """With --regenerate, refuse what only a realignment uses; without it, what only this uses.

    Args:
        args: as parsed.
        add_arguments: adds the flags of `realign` to a parser, whose defaults are looked up.

    Raises:
        ArgumentError: a flag was passed that would say nothing.
    """
    if not args.regenerate:
        if args.only_right:
            raise ArgumentError("--only-right is used only with --regenerate: `realign` drops what is not right anyway")
        return
    defaults = vars(add_arguments(argparse.ArgumentParser()).parse_args([]))
    unused = HINTED if args.only_right else UNUSED
    given = [name for name in unused if getattr(args, name) != defaults[name]]
    if given:
        flags = [_WRITTEN.get(name, f"--{name.replace('_', '-')}") for name in given]
        written = ", ".join(args.renamed_flags.get(flag, flag) for flag in flags)
        needs = "compares nothing without --only-right" if given[0] in VERIFYING else "writes own responses only"
        raise ArgumentError(f"--regenerate {needs}, so {written} would say nothing: drop one of the two")
    if args.rollout_samples < 1:
        raise ArgumentError("--regenerate needs --rollout-samples K from 1: each record gets so many responses")
    if args.rollout_samples > 1 and args.rollout_temperature == 0:
        raise ArgumentError(
            f"--rollout-samples {args.rollout_samples} with --rollout-temperature 0 would write the same"
            f" {args.rollout_samples} times: raise the temperature, or pass --rollout-samples 1"
        )
