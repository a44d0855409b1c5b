"""The flags of `realign`, documented where they are declared; realign_settings.py checks and resolves them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from megatron_idft.corpus.scores.display import bounded
from megatron_idft.hinted_decoding.mixing_modes import MIXING_MODES
from megatron_idft.hinted_decoding.named_prompts import PACKAGED
from megatron_idft.hinted_decoding.output.former_names import hint_share_of
from megatron_idft.integration.offline.arguments import add_input_arguments, add_work_arguments


class _Renamed(argparse.Action):
    """A flag's former name, not shown: sets the flag that it is `now`, and notes that in `renamed_flags`."""

    def __init__(self, option_strings: Sequence[str], dest: str, now: str, **options: Any) -> None:
        options |= {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        super().__init__(option_strings, now[2:].replace("-", "_"), **options)
        self._now = now

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.renamed_flags = namespace.renamed_flags | {self._now: self.option_strings[0]}


def _complement(text: str) -> float:
    """The hint share for a share of the plain stream, which --mix-lambda was."""
    try:
        share = hint_share_of(text)
    except ArithmeticError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{bounded(text)}: pass a number from 0 to 1")
    return share


def describe_renamed(args: argparse.Namespace) -> list[str]:
    """A line for each flag that was given under its former name."""
    flags = args.renamed_flags.items()
    lines = [f"{former} is now {now}: write {now} {getattr(args, now[2:].replace('-', '_'))}" for now, former in flags]
    if args.analysis_prompt is not None:
        lines.append(f"--analysis-prompt is now --hint-prompt: write --hint-prompt {args.analysis_prompt}")
    if args.no_analysis:
        named = "hint" if args.hint_prompt is None else " ".join(args.hint_prompt)
        lines.append(f"--no-analysis is now the choice of a prompt without one: write --hint-prompt {named}")
    if args.fallback == "retry" or args.after_retries is not None:
        lines.append(
            "--fallback retry and --after-retries: retries come before every fallback now: write --retries"
            f" {2 if args.retries is None else args.retries} --fallback {last_resort(args)}"
        )
    return lines


def last_resort(args: argparse.Namespace) -> str:
    """What --fallback says, or said together with --after-retries."""
    if args.fallback in (None, "retry"):
        return args.after_retries or "drop"
    return str(args.fallback)


def add_realign_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of realigning to Megatron's parser."""
    parser.set_defaults(renamed_flags={})  # now -> as it was written
    group = parser.add_argument_group(title="realign")
    add_input_arguments(group)
    add_work_arguments(group, chunk_records=256)
    _add_program_arguments(group)
    _add_rollout_arguments(parser.add_argument_group(title="realign: own responses"))
    _add_prompt_arguments(parser.add_argument_group(title="realign: prompts of the hint"))
    _add_analysis_arguments(parser.add_argument_group(title="realign: analysis of the reference"))
    _add_hinted_arguments(parser.add_argument_group(title="realign: hinted decoding"))
    _add_judging_arguments(parser.add_argument_group(title="realign: what is accepted"))
    return parser


def _add_program_arguments(group: Any) -> None:
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="Show the first record's plain, analysis and hinted prompts as they are rendered, and stop. No model.",
    )
    group.add_argument(
        "--regenerate",
        action="store_true",
        help="No realignment: only own responses, which need no reference, to every turn of the assistant after the"
        " model's own earlier ones, and to a last message that has none. --rollout-samples K writes K records for each,"
        " with ids ID#0 to ID#K-1 where K is more than 1. What is empty or cut by a limit is left out.",
    )
    group.add_argument(
        "--only-right",
        action="store_true",
        help="With --regenerate: leave out what is not verified right against the reference.",
    )
    group.add_argument(
        "--estimate",
        action="store_true",
        help="Realign 200 records spread over the corpus, keep nothing, and print the hours, the kept share and the"
        " mean of phi before and after to expect.",
    )
    group.add_argument(
        "--retry-errors",
        action="store_true",
        help="Try only those records of a finished output again that ended as errors. Other settings are allowed.",
    )
    group.add_argument(
        "--max-rows",
        type=int,
        default=None,
        help="Responses that are decoded at once on each replica, at most. Default 64 on a GPU, 32 on a CPU.",
    )
    group.add_argument(
        "--kv-memory-gb",
        type=float,
        default=None,
        help="GiB for keys and values on each rank. Default: a share of what is free when the model is loaded.",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=8192,
        help="Longest response in tokens; --seq-length, the context, limits prompt and response together. Default 8192,"
        " as in the authors' code.",
    )


def _add_rollout_arguments(group: Any) -> None:
    group.add_argument(
        "--rollout-samples",
        type=int,
        default=1,
        metavar="K",
        help="Responses that the model writes to each prompt without any hint; the first right one is taken. 0: none,"
        " every turn goes to hinted decoding. Default 1.",
    )
    group.add_argument(
        "--rollout-temperature",
        type=float,
        default=1.0,
        help="Sampling temperature of own responses; 1 is the model's own distribution. Default 1.",
    )
    group.add_argument("--rollout-top-p", type=float, default=1.0, help="Nucleus of own responses. Default 1: all.")
    group.add_argument("--rollout-top-k", type=int, default=0, help="Top-k of own responses. Default 0: all.")
    group.add_argument(
        "--rollouts",
        metavar="FILE",
        default=None,
        help='Own responses written elsewhere, JSONL by record id: {"id", "responses": […]} or {"id", "response"}, with'
        ' "turn" (from 0) where a record has several. Records without a line are sampled here, if K is not 0.',
    )


def _add_prompt_arguments(group: Any) -> None:
    group.add_argument(
        "--hint-prompt",
        metavar="NAME",
        nargs="+",
        default=None,
        help="Prompts that show the model the reference, in order of preference: packaged ones"
        f" ({', '.join(PACKAGED)}) or files of their form. auto, the default: a trial before the run tries the packaged"
        " ones, and files named after auto, on some records, prints the right and kept share of each, and goes on with"
        " the best and the best of the other kind, with or without an analysis; OUTPUT/prompts.json has the choice for"
        " all launches.",
    )
    group.add_argument(
        "--prompt-trial-records",
        type=int,
        default=None,
        metavar="N",
        help="Records on which the trial of auto tries each prompt: N responses for each, and N analyses where it asks"
        " for one. Default: an eighth of the records, from 4 to 32; never more than there are.",
    )
    group.add_argument(
        "--paper",
        action="store_true",
        help="Everything as in the authors' code: the analysis prompt, whose marker the model must write, one try of"
        " Hinted Decoding with slope 3, temperature 0.3 and top-p 0.95, no further prompt, try or room. Flags that say"
        " otherwise are refused; lengths stay yours.",
    )


def _add_analysis_arguments(group: Any) -> None:
    group.add_argument("--no-analysis", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--analysis-prompt", metavar="FILE", default=None, help=argparse.SUPPRESS)
    group.add_argument(
        "--analysis-max-tokens",
        type=int,
        default=2048,
        help="Longest analysis; it holds a reply as well, which is cut off at the marker. Default 2048.",
    )
    group.add_argument(
        "--analysis-marker",
        choices=("append", "require"),
        default=None,
        help="For an analysis without the template's marker when it ends or reaches its length. append: it is closed by"
        " one. require: there is no hint, as in the paper. Default append.",
    )
    group.add_argument(
        "--analysis-temperature", type=float, default=0.0, help="Sampling temperature of the analysis. Default 0."
    )
    group.add_argument(
        "--analyses",
        metavar="FILE",
        default=None,
        help='Analyses written elsewhere, JSONL by record id: {"id", "analysis"}, with "turn" as in --rollouts. Records'
        " without a line are analysed here.",
    )


def _add_hinted_arguments(group: Any) -> None:
    group.add_argument(
        "--mix",
        choices=MIXING_MODES,
        default="linear",
        help="The hint share, that of the hinted stream in the mix, from Hn = H / ln(vocabulary) of that stream."
        " linear: 1 - clamp(slope Hn, 0, 1), the paper's. sigmoid: 1 - sigma(slope (Hn - 0.5)). piecewise: 1 up to Hn"
        " 0.3, 0 from 0.7. fixed: --hint-share. Default linear.",
    )
    group.add_argument(
        "--mix-slope",
        type=float,
        default=3.0,
        help="slope of linear and sigmoid: how soon doubt takes the mix from the hint. Default 3, as in the authors'"
        " README.",
    )
    group.add_argument(
        "--hint-share",
        type=float,
        default=None,
        help="With --mix fixed: 1 is self-distillation from the hinted stream, 0 plain sampling (with --first-token"
        " mixed).",
    )
    group.add_argument("--mix-beta", action=_Renamed, now="--mix-slope", type=float)
    group.add_argument("--mix-lambda", action=_Renamed, now="--hint-share", type=_complement)
    group.add_argument(
        "--first-token",
        choices=("hinted", "mixed"),
        default="hinted",
        help="The first token comes only from the hinted stream, or is mixed like all others. Default hinted.",
    )
    group.add_argument(
        "--entropy-vocab-size",
        type=int,
        default=None,
        help="The vocabulary of Hn. Default: the true one. The authors take the padded rows of config.vocab_size.",
    )
    group.add_argument("--temperature", type=float, default=0.3, help="Of the mixed distribution. Default 0.3.")
    group.add_argument("--top-p", type=float, default=0.95, help="Nucleus of the mixed distribution. Default 0.95.")
    group.add_argument("--top-k", type=int, default=0, help="Top-k of the mixed distribution. Default 0: all.")
    order = group.add_mutually_exclusive_group()
    order.add_argument(
        "--nucleus-before-temperature",
        dest="nucleus_before_temperature",
        action="store_true",
        default=True,
        help="Cut by top-p and top-k at temperature 1, then temper, as the authors do. Default.",
    )
    order.add_argument(
        "--nucleus-after-temperature",
        dest="nucleus_before_temperature",
        action="store_false",
        help="Temper first, then cut, as Megatron and vLLM do.",
    )
    group.add_argument(
        "--splitter",
        default="\\boxed{",
        help="Text after which only the plain stream goes on, so that the answer follows from the reasoning and is"
        " not copied. '': none. Default '\\boxed{'.",
    )
    group.add_argument(
        "--repetition-ngram",
        type=int,
        default=30,
        help="A response ends where an n-gram of so many tokens stands too often. 0: not looked for. Default 30.",
    )
    group.add_argument("--repetition-count", type=int, default=5, help="How often is too often. Default 5.")
    group.add_argument(
        "--repetition-every", type=int, default=100, help="Looked for every so many tokens. Default 100."
    )
    group.add_argument(
        "--stop-on-first-token",
        action="store_true",
        help="Let hinted decoding end with its very first token too. Default: that is not looked at, as in the paper's"
        " code.",
    )


def _add_judging_arguments(group: Any) -> None:
    group.add_argument(
        "--retries",
        type=int,
        default=None,
        help="Further tries of hinted decoding by the first hint, before --fallback. Default 2, or 0 where they would"
        " write the same again.",
    )
    group.add_argument(
        "--retry-slope-factor",
        type=float,
        default=0.5,
        help="Each retry multiplies --mix-slope by this once more, and draws anew. Below 1: closer to the hint each"
        " time. Default 0.5.",
    )
    group.add_argument("--retry-beta-factor", action=_Renamed, now="--retry-slope-factor", type=float)
    group.add_argument(
        "--more-room",
        type=float,
        metavar="FACTOR",
        default=None,
        help="A response that --max-new-tokens cuts, where none was right, is decoded once more, up to so many times as"
        " long, as far as the context and the memory for keys and values reach. 0: not. Default 2.",
    )
    group.add_argument(
        "--bare-below",
        type=float,
        metavar="SHARE",
        default=None,
        help="Reject a hinted response with less than this share of the original's tokens: a model that is shown an"
        " answer may write it with nothing before it, which is right and teaches nothing. 0: none is. Default 0.25.",
    )
    group.add_argument(
        "--fallback",
        choices=("drop", "original", "retry"),
        metavar="{drop,original}",
        default=None,
        help="For a turn for which every stage failed: leave its record out, or keep the record with that turn as it"
        " was, weighted by --original-weight. Default drop.",
    )
    group.add_argument("--after-retries", choices=("drop", "original"), default=None, help=argparse.SUPPRESS)
    group.add_argument(
        "--original-weight",
        type=float,
        metavar="W",
        default=1.0,
        help="The weight in the loss of the tokens of turns that stay as they were, in loss_mask and as loss of the"
        " message. Default 1.",
    )
    group.add_argument(
        "--no-rejected-texts",
        dest="rejected_texts",
        action="store_false",
        help="Leave the texts of analyses and of rejected responses out of the outcomes. Default: they are kept, for"
        " those who want to know why a record was dropped.",
    )
    group.add_argument(
        "--unverified",
        choices=("drop", "original", "keep"),
        default="drop",
        help="For a turn without a reference, or without a right response where some could not be"
        " compared. drop: its record is left out, and where there is no reference nothing is decoded for it. original:"
        " it stays as it was. keep: the first such response is taken that ended by itself and does not betray the hint,"
        " though it may be wrong. For corpora without final answers pass keep. Default drop.",
    )
    group.add_argument(
        "--verifier",
        choices=("answers", "model"),
        default="answers",
        help="answers: compare final answers, or ask --verifier-plugin. model: then also ask the model itself whether a"
        " response says the same as the reference, where nothing else can tell; weak, for a model prefers its own"
        " texts, and a small one hardly reads both. Such turns are counted apart. Default answers.",
    )
    group.add_argument(
        "--verifier-threshold",
        type=float,
        metavar="P",
        default=0.5,
        help="With --verifier model: the probability of Yes against No from which on a response is right. Default 0.5.",
    )
    group.add_argument(
        "--verifier-plugin",
        metavar="MODULE:FUNCTION",
        default=None,
        help="Judge responses by function(response, reference) -> bool or None, instead of comparing final answers.",
    )
    group.add_argument("--verify-workers", type=int, default=2, help="Processes that compare. Default 2.")
    group.add_argument(
        "--verify-timeout", type=float, default=10.0, help="Seconds for one comparison, then unknown. Default 10."
    )
    group.add_argument(
        "--leak-phrases",
        metavar="FILE",
        default=None,
        help="Phrases that betray a hint, one per line, instead of those in corpus/verification/leaks.py.",
    )
