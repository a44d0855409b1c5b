"""Write docs/flags.md: every flag of ours, from the parsers that declare it.

    python docs/flags.py

Our parsers add their flags to Megatron's. Here they add them to an empty one, so Megatron is not imported.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_idft.cli import convert, doctor, init, prepare, realign, run, score
from megatron_idft.integration.loss.flags import add_arguments
from megatron_idft.integration.offline.realign_arguments import add_realign_arguments
from megatron_idft.integration.offline.score_arguments import add_score_arguments
from megatron_idft.integration.plan.arguments import add_plan_arguments
from megatron_idft.integration.training.arguments import add_data_arguments

HEAD = """# Flags

Made by `python docs/flags.py` from the parsers; do not edit. `train`, `run`, `score`, `realign` and `plan` understand
every flag of Megatron-LM 0.19 too. `megatron-idft VERB --help` prints the same texts.
Every verb has `--verbose`, `run` before its script: [what is on the console](install.md#what-is-on-the-console).
"""


def empty() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(add_help=False)


def adding(add: Callable[[argparse.ArgumentParser], argparse.ArgumentParser]) -> argparse.ArgumentParser:
    return add(empty())


def spelling(action: argparse.Action) -> str:
    """`--flag {a,b}` or the name of a positional argument; of several spellings the first."""
    value = str(action.metavar or "")
    if not value and action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not value and action.nargs != 0:
        value = {int: "N", float: "X"}.get(action.type, action.dest.upper())
    words = [*action.option_strings[:1], value, "…" if action.nargs == "+" else ""]
    return f"`{' '.join(filter(None, words))}`"


def table(parser: argparse.ArgumentParser) -> Iterator[str]:
    """One row for each flag, with a heading where the parser has several groups of its own."""
    heading = None
    for group in parser._action_groups:
        actions = [
            action for action in group._group_actions if action.help is not argparse.SUPPRESS and action.dest != "help"
        ]
        title = (group.title or "").partition(": ")[2]
        if actions and title != heading:
            yield from [f"\n**{title.capitalize()}**\n"] * bool(title)
            yield "| flag | meaning |\n|---|---|"
            heading = title
        for action in actions:
            text = (action.help or "").replace("%%", "%").replace("|", "\\|")
            required = " (must be given)" if action.required and action.option_strings else ""
            yield f"| {spelling(action)} | {text}{required} |"
    yield ""


def usage(text: str) -> Iterator[str]:
    yield f"```text\n{text}\n```\n"


def page() -> str:
    """The whole page."""
    sections: list[tuple[str, Iterator[str]]] = [
        ("train: the loss", table(adding(add_arguments))),
        ("train: data, evaluation and checkpoints", table(adding(add_data_arguments))),
        ("run", usage(run.USAGE)),
        ("prepare", table(prepare._parser())),
        ("score", table(adding(add_score_arguments))),
        ("score status", table(score._status_parser())),
        ("score report", table(score._report_parser())),
        ("score select", table(score._select_parser())),
        ("realign", table(adding(add_realign_arguments))),
        ("realign prompts", table(realign._prompts_parser())),
        ("realign status", table(realign._status_parser())),
        ("realign merge", table(realign._merge_parser())),
        ("realign report", table(realign._report_parser())),
        ("plan", table(adding(add_plan_arguments))),
        ("convert", usage(convert.USAGE)),
        ("doctor", usage(doctor.USAGE)),
        ("init", table(init._parser())),
    ]
    lines = [HEAD]
    for title, parts in sections:
        lines += [f"## {title}\n", *parts]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("flags.md").write_text(page(), encoding="utf-8")
