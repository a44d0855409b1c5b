"""`realign`: a corpus rewritten into the model's own distribution; what is done with the result needs no model."""

import json
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from megatron_idft import console
from megatron_idft.cli.offline import run_verb
from megatron_idft.parsing import OF_EVERY_VERB, Parser

USAGE = f"""usage: torchrun … -m megatron_idft realign --hf-model DIR --sft-data FILE … --output DIR <flags>
       torchrun … -m megatron_idft realign --load DIR [--tokenizer-model PATH] --sft-data FILE … --output DIR <flags>
       megatron-idft realign prompts --hf-model DIR --sft-data FILE … --seq-length N --output FILE.jsonl <flags>
       megatron-idft realign status DIR
       megatron-idft realign merge DIR --output FILE.jsonl
       megatron-idft realign report DIR [--output DIR] [--title TEXT]

Rewrites the responses of a corpus into the model's own distribution: its own response where that is right, else Hinted
Decoding (arXiv 2602.12222), which mixes what the model says with and without a hint; wrong results are left out.
With --regenerate only own responses are written, right or wrong, and no reference is needed.
Start it as often as you like on one output folder: launches share the work, and a stopped one goes on where it was.
Every flag of Megatron-LM 0.19 that describes a model or a layout is understood besides those below.

{OF_EVERY_VERB}"""


def _status_parser() -> Parser:
    parser = Parser(
        "megatron-idft realign status", description="Chunks, launches, the time left, and what became of the records."
    )
    parser.add_argument("folder", type=Path, help="the --output of realign")
    return parser


def status(argv: Sequence[str]) -> int:
    from megatron_idft.hinted_decoding.output.status import describe_status

    print(describe_status(_status_parser().parse_args(argv).folder))
    return 0


def _merge_parser() -> Parser:
    parser = Parser(
        "megatron-idft realign merge", description="The kept records in one file, in the order of the input."
    )
    parser.add_argument("folder", type=Path, help="the --output of realign")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="a new .jsonl, .jsonl.gz, .jsonl.zst or .parquet"
    )
    parser.add_argument("--partial", action="store_true", help="merge what is finished, though not everything is")
    return parser


def merge(argv: Sequence[str]) -> int:
    from megatron_idft.hinted_decoding.output.merge import merge as merge_records

    args = _merge_parser().parse_args(argv)
    counts = merge_records(args.folder, args.output, partial=args.partial)
    print(json.dumps(counts))
    if not counts["kept"]:
        print(f"no record is kept: {args.output} is empty; `realign report` says why", file=sys.stderr)
    return 0


def _report_parser() -> Parser:
    parser = Parser(
        "megatron-idft realign report", description="One page and one JSON: what was kept, and phi before and after."
    )
    parser.add_argument("folder", type=Path, help="the --output of realign")
    parser.add_argument("--output", type=Path, help="where report.html and report.json go; default: the same folder")
    parser.add_argument("--title", default="Realigned corpus", help="of the page")
    return parser


def report(argv: Sequence[str]) -> int:
    args = _report_parser().parse_args(argv)
    from megatron_idft.hinted_decoding.output.results import read_outcomes, read_settings
    from megatron_idft.hinted_decoding.prompt_trial import read_choice
    from megatron_idft.hinted_decoding.report.page import write_report

    output, folder = args.output or args.folder, args.folder
    rows, trial = read_outcomes(folder), read_choice(folder)
    page, numbers = write_report(rows, read_settings(folder), output, args.title, trial)
    print(f"{page}\n{numbers}")
    return 0


# The flags of `realign` that decide about prompts; the others are accepted, so that both can be given the same.
_OF_PROMPTS = """output hf_model sft_data limit sft_bad_records sft_template_date max_new_tokens rollout_samples
    rollout_temperature rollout_top_p rollout_top_k paper hint_prompt analysis_max_tokens analysis_temperature analyses
    analysis_marker unverified tokenizer_model chat_template trust_remote_code seq_length seed help"""


def _prompts_parser() -> Parser:
    parser = Parser(
        "megatron-idft realign prompts",
        usage="megatron-idft realign prompts --hf-model DIR --sft-data FILE … --seq-length N --output FILE <flags>",
        description="Writes the prompts of every stage as JSONL, text and token ids, for another engine to answer; no"
        " model is loaded. tools/vllm_rollouts.py answers them with vLLM, for --rollouts and --analyses of `realign`."
        " Give the flags that `realign` will have; those that do not change a prompt are accepted and not shown here.",
        conflict_handler="resolve",
    )
    _add_arguments(parser)
    group = parser.add_argument_group(title="realign: prompts")
    add = group.add_argument
    add("--output", required=True, type=Path, metavar="FILE", help="a new .jsonl")
    add("--tokenizer-model", metavar="PATH", help="a Hugging Face folder or a sentencepiece *.model; default: that of"
        " --hf-model")  # fmt: skip
    add("--chat-template", metavar="FILE", help="Jinja, or chatml or plain; default: the tokenizer's own")
    add("--trust-remote-code", action="store_true", help="run Python code that a tokenizer brings")
    add("--seq-length", type=int, required=True, metavar="N", help="the context, prompt and response together")
    add("--seed", type=int, default=1234, help="of the random draws; default 1234")
    parser.set_defaults(sequence_parallel=False)
    for action in parser._actions:
        if action.dest not in _OF_PROMPTS.split():
            action.help = SUPPRESS
    return parser


def prompts(argv: Sequence[str]) -> int:
    args = _prompts_parser().parse_args(argv)
    with console.quiet("realign prompts"):
        from megatron_idft.integration.offline.realign_prompt_file import write_prompts

        for line in write_prompts(args):
            console.say(line)
    return 0


def _add_arguments(parser: ArgumentParser) -> ArgumentParser:
    from megatron_idft.integration.offline.realign_arguments import add_realign_arguments

    return add_realign_arguments(parser)


def _run() -> None:
    from megatron_idft.integration.offline.realign import realign

    realign()


def main(argv: Sequence[str]) -> int:
    return run_verb(
        "realign",
        argv,
        USAGE,
        {"prompts": prompts, "status": status, "merge": merge, "report": report},
        _add_arguments,
        _run,
    )
