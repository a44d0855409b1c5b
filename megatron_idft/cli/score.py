"""`score`: statistics of a corpus under a model; what to do with them afterwards needs no model."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from megatron_idft.cli.offline import run_verb
from megatron_idft.data import flags
from megatron_idft.parsing import OF_EVERY_VERB, Parser

USAGE = f"""usage: torchrun … -m megatron_idft score --hf-model DIR --sft-data FILE … --output DIR <flags>
       torchrun … -m megatron_idft score --load DIR [--tokenizer-model PATH] --sft-data FILE … --output DIR <flags>
       megatron-idft score status DIR
       megatron-idft score report DIR … [--output DIR] [--title TEXT]
       megatron-idft score select DIR --keep EXPRESSION --sft-data FILE … --output FILE

Scores the responses of a corpus under a Megatron model: log p, entropy and phi = log p + H of every trained token.
Start it as often as you like on one output folder: launches share the work, and a stopped one goes on where it was.
Every flag of Megatron-LM 0.19 that describes a model or a layout is understood besides those below.

{OF_EVERY_VERB}"""


def _status_parser() -> Parser:
    parser = Parser("megatron-idft score status", description="Chunks, launches and the time left.")
    parser.add_argument("folder", type=Path, help="the --output of score")
    return parser


def status(argv: Sequence[str]) -> int:
    from megatron_idft.corpus.ledger.ledger import status_of

    print(status_of(_status_parser().parse_args(argv).folder).format())
    return 0


def _report_parser() -> Parser:
    parser = Parser(
        "megatron-idft score report", description="One page and one JSON on scored corpora, with the linter's findings."
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="the --output of score")
    parser.add_argument("--output", type=Path, help="where report.html and report.json go; default: the first DIR")
    parser.add_argument("--title", default="Scored corpora", help="of the page")
    return parser


def report(argv: Sequence[str]) -> int:
    from megatron_idft.corpus.scored_folder import report_on

    args = _report_parser().parse_args(argv)
    page, numbers = report_on(args.folders, args.output or args.folders[0], args.title)
    print(f"{page}\n{numbers}")
    return 0


def _select_parser() -> Parser:
    parser = Parser(
        "megatron-idft score select",
        description="Copies the records whose scores fulfil an expression as they were: lines byte for byte, rows of"
        " Parquet with their own values and types (or as JSON, to a file of lines).",
    )
    parser.add_argument("folder", type=Path, help="the --output of score")
    parser.add_argument(
        "--keep",
        required=True,
        help="an expression over the columns of scores.parquet: 'phi_mean > -0.3 and ends_turn'",
    )
    flags.add_data(parser, "The records that were scored.")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="a new .jsonl, .jsonl.gz, .jsonl.zst or .parquet"
    )
    return parser


def select(argv: Sequence[str]) -> int:
    from megatron_idft.corpus.scored_folder import describe_unscored, select_records

    parser = _select_parser()
    args = parser.parse_args(argv)
    if not args.sft_data:
        parser.error("pass the records that were scored as --sft-data FILE [FILE …]")
    counts = select_records(args.folder, args.keep, args.sft_data, args.output)
    print(json.dumps(counts))
    if remark := describe_unscored(counts, args.folder):
        print(f"megatron-idft score select: {remark}", file=sys.stderr)
    return 0


def _add_arguments(parser: ArgumentParser) -> ArgumentParser:
    from megatron_idft.integration.offline.score_arguments import add_score_arguments

    return add_score_arguments(parser)


def _run() -> None:
    from megatron_idft.integration.offline.score import score

    score()


def main(argv: Sequence[str]) -> int:
    return run_verb("score", argv, USAGE, {"status": status, "report": report, "select": select}, _add_arguments, _run)
