"""--paper: the flags of `realign` as in the authors' code of arXiv 2602.12222.

That code shows one example, without a pipeline around it; the paper keeps own responses that are right, gives every
other problem one try of Hinted Decoding, and leaves out what is wrong.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_idft.errors import ArgumentError
from megatron_idft.hinted_decoding.named_prompts import PAPER
from megatron_idft.integration.offline.realign_arguments import add_realign_arguments

PAPER_VALUES: dict[str, Any] = {
    "hint_prompt": [PAPER],
    "rollout_samples": 1,
    "analysis_temperature": 0.0,
    "mix": "linear",
    "mix_slope": 3.0,
    "first_token": "hinted",
    "temperature": 0.3,
    "top_p": 0.95,
    "top_k": 0,
    "nucleus_before_temperature": True,
    "splitter": "\\boxed{",
    "repetition_ngram": 30,
    "repetition_count": 5,
    "repetition_every": 100,
    "stop_on_first_token": False,
    "analysis_marker": "require",
    "more_room": 0.0,
    "bare_below": 0.0,
    "retries": 0,
    "fallback": "drop",
    "unverified": "drop",
    "verifier": "answers",
}
# Lengths are the user's, but where they are not given they are the authors' too.
_LENGTHS = {"analysis_max_tokens": 16384, "max_new_tokens": 8192}
_WRITTEN = {"nucleus_before_temperature": "--nucleus-after-temperature"}


def apply_paper(args: argparse.Namespace) -> None:
    """With --paper, give every flag the authors' value.

    Raises:
        ArgumentError: a flag was passed that says otherwise.
    """
    if not args.paper:
        return
    parser = add_realign_arguments(argparse.ArgumentParser())
    former = [flag for flag in ("no_analysis", "analysis_prompt") if getattr(args, flag)]
    changed = [
        name for name, value in PAPER_VALUES.items() if getattr(args, name) not in (value, parser.get_default(name))
    ]
    if others := former + changed:
        written = ", ".join(args.renamed_flags.get(flag, flag) for flag in map(_flag, others))
        raise ArgumentError(
            f"--paper sets everything as in the authors' code, and {written} says otherwise: drop one of them"
        )
    vars(args).update(PAPER_VALUES)
    for name, value in _LENGTHS.items():
        if getattr(args, name) == parser.get_default(name):
            setattr(args, name, value)


def _flag(name: str) -> str:
    return _WRITTEN.get(name, f"--{name.replace('_', '-')}")
