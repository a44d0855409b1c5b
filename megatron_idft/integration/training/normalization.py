"""`--sft-normalization`: how the losses of a step's tokens make up its loss. Without torch: `--help` comes at once.

With l the loss of a token times its weight, summed over the trained tokens of the global batch, which are its N
conversations s of n_s trained tokens each:

    token      sum of l / sum of n_s
    sample     sum of (l / n_s) / N
    constant   sum of l / (samples of the global batch x C)

Megatron sums what the micro-batches and ranks return, and divides once, by an integer. It scales the losses of load
balancing and of multi-token prediction by numbers of tokens and divides them by the same integer, which is why `sample`
is multiplied by the trained tokens of an average conversation above and below the line: that cancels in the loss, and
leaves the others the size that they have with `token`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from megatron_idft.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("token", "sample", "constant")
_LARGEST_COUNT = 2**31 - 1  # Megatron counts in int32


@dataclass(frozen=True, slots=True)
class Normalization:
    """The normalization of a step.

    Attributes:
        mode: one of MODES.
        tokens: sample: the trained tokens of an average conversation; constant: C.
    """

    mode: str = "token"
    tokens: int = 1

    def token_factors(self, conversation_tokens: Tensor | None) -> Tensor | None:
        """What the loss of each token is multiplied with beside its weight; None: nothing.

        Args:
            conversation_tokens: [...] int32, as in `PackedDataset`; None where nothing reads the labels.

        Returns:
            [...] fp32.
        """
        if self.mode != "sample" or conversation_tokens is None:
            return None
        return self.tokens / conversation_tokens.abs().clamp(min=1).float()

    def divisor(self, num_tokens: Tensor, conversation_tokens: Tensor | None, samples: int) -> Tensor:
        """A micro-batch's part, on this rank, of what the sum of losses is divided by.

        Args:
            num_tokens: int32, its trained tokens.
            conversation_tokens: as in `token_factors`; read by `sample` alone.
            samples: of the micro-batch; 0 on all but one of the context-parallel ranks that share them.

        Returns:
            int32 of no dimension.
        """
        if self.mode == "constant":
            return num_tokens.new_full((), samples * self.tokens)
        if self.mode == "token":
            return num_tokens
        assert conversation_tokens is not None
        return (conversation_tokens < 0).sum().int() * self.tokens


@dataclass(frozen=True, slots=True)
class NormalizationSchedule:
    """The normalization of every step.

    Attributes:
        switches: (iteration, normalization): it holds for the steps from this many completed iterations on. They ascend
            from 0.
    """

    switches: tuple[tuple[int, Normalization], ...] = ((0, Normalization()),)

    def at(self, iteration: int) -> Normalization:
        """That of the step that follows `iteration` completed iterations."""
        return next(each for begin, each in reversed(self.switches) if begin <= iteration)

    @property
    def counts_conversations(self) -> bool:
        """Whether some step asks for conversation_tokens."""
        return any(each.mode == "sample" for _, each in self.switches)

    def __str__(self) -> str:
        names = {"token": "per trained token", "sample": "per conversation", "constant": "per {tokens} tokens a sample"}
        return ", ".join(
            (f"from iteration {begin} on " if begin else "") + names[each.mode].format(tokens=each.tokens)
            for begin, each in self.switches
        )


def validate_normalization(args: argparse.Namespace) -> None:
    """Check `--sft-normalization` and its constant against each other and Megatron's flags.

    Raises:
        ArgumentError: with the remedy.
    """
    given, constant = args.sft_normalization, args.sft_normalization_constant
    switches = _switches(given or ["token"])
    if all(mode != "constant" for _, mode in switches):
        if constant is not None:
            raise ArgumentError(
                "--sft-normalization-constant was given without --sft-normalization constant: add it, or drop the"
                " number"
            )
    elif constant is not None and not 1 <= constant <= _LARGEST_COUNT // (args.global_batch_size or 1):
        raise ArgumentError(
            f"--sft-normalization-constant {constant}: pass the tokens that a sample counts for, from 1, and with all"
            f" samples of --global-batch-size at most {_LARGEST_COUNT}; the default is --seq-length"
        )
    if given is None:
        args.sft_normalization = ["token"]  # as checkpoints record it
        return
    refusals = {
        "--no-calculate-per-token-loss": not args.calculate_per_token_loss,
        "--ddp-average-in-collective": args.ddp_average_in_collective,
    }
    for flag in (flag for flag, passed in refusals.items() if passed):
        raise ArgumentError(
            f"{flag} divides the loss of each micro-batch or rank, --sft-normalization that of the whole step, once:"
            " drop one of the two"
        )
    graphs = (args.cuda_graph_impl, *(args.cuda_graph_modules or ()), *(args.cuda_graph_scope_deprecated or ()))
    if len(switches) > 1 and "full_iteration" in graphs:
        raise ArgumentError(
            f"--sft-normalization {' '.join(given)} and CUDA graphs of whole iterations: these repeat the step that was"
            " captured. End the run at the switch (--exit-interval N) and continue it with the other normalization"
        )


def normalization_schedule(args: argparse.Namespace, tokens_per_conversation: int) -> NormalizationSchedule:
    """The schedule of validated flags; fills in the default of the constant.

    Args:
        args: Megatron's, with the length of a sequence.
        tokens_per_conversation: trained ones, the average of the training data.
    """
    switches = _switches(args.sft_normalization)
    if "constant" in (mode for _, mode in switches) and args.sft_normalization_constant is None:
        args.sft_normalization_constant = args.seq_length
    tokens = {"token": 1, "sample": tokens_per_conversation, "constant": args.sft_normalization_constant}
    return NormalizationSchedule(tuple((begin, Normalization(mode, tokens[mode])) for begin, mode in switches))


def _switches(words: Sequence[str]) -> list[tuple[int, str]]:
    """`MODE [MODE@ITERATION …]` -> (iteration, mode) …"""
    switches = []
    for position, word in enumerate(words):
        mode, at, iteration = word.partition("@")
        if mode not in MODES or bool(at) != bool(position) or (at and not iteration.isdecimal()):
            modes = ", ".join(f"{mode}@2000" if position else mode for mode in MODES)
            raise ArgumentError(f"--sft-normalization {' '.join(words)}: in the place of {word!r} pass one of {modes}")
        switches.append((int(iteration or 0), mode))
    for before, after in pairwise(switches):
        if after[0] <= before[0]:
            raise ArgumentError(
                f"--sft-normalization {' '.join(words)}: iterations must ascend, {after[0]} follows {before[0]}"
            )
    return switches
