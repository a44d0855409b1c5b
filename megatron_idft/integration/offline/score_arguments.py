"""The flags of `score`."""

from __future__ import annotations

import argparse

from megatron_idft.data import flags
from megatron_idft.integration.offline.arguments import add_input_arguments, add_work_arguments


def add_score_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of scoring to Megatron's parser."""
    group = parser.add_argument_group(title="score")
    add_input_arguments(group)
    group.add_argument(
        "--per-token",
        action="store_true",
        help="Keep log_prob, entropy and phi of every response token in scores.parquet. The parts have them anyway.",
    )
    add_work_arguments(group, chunk_records=512)
    group.add_argument(
        "--tokens-per-batch",
        type=int,
        default=None,
        help="Padded tokens in one forward pass. Records of like length go together. Default 16384; on a CPU 1024, as"
        " progress is counted in forward passes.",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="Read the records, show the first with its scored spans, and stop."
    )
    group.add_argument(
        "--estimate",
        action="store_true",
        help="Score 200 records spread over the corpus, and print the time and the statistics to expect.",
    )
    group.add_argument(
        "--calibrate",
        type=int,
        default=None,
        metavar="N",
        help="Have the model answer N prompts of the corpus itself, at temperatures 1 and 0.3, and score the answers:"
        " the null that the report compares with. phi is 0 on average at temperature 1, by definition. Refused with"
        " pipeline stages or --sequence-parallel: the same command without them, on that --output, keeps the scores.",
    )
    group.add_argument(
        "--calibrate-max-tokens", type=int, default=256, help="Longest of these answers, in tokens. Default 256."
    )
    flags.add_reference_top_k(
        group,
        "Also keep the K most probable tokens of each trained place with their log-probabilities, for `prepare"
        " --sft-reference-top-k`: 8 K bytes a token in the parts. 20 is usual. Default none.",
    )
    flags.add_truncation(group)
    flags.add_last_turn_only(group)
    flags.add_prompt_weight(group)
    flags.add_cache(group)
    group.add_argument(
        "--sft-loss-backend",
        choices=("auto", "reference", "triton"),
        default="auto",
        help="Implementation of the statistics, as in training. Default auto.",
    )
    return parser
