"""Which flags a message may name to the user of a verb: those that this verb has."""

import argparse
import functools
import re
from pathlib import Path

from megatron_idft.cli import init, prepare, realign, score
from megatron_idft.integration.loss.flags import add_arguments
from megatron_idft.integration.offline.realign_arguments import add_realign_arguments
from megatron_idft.integration.offline.score_arguments import add_score_arguments
from megatron_idft.integration.plan.arguments import add_plan_arguments
from megatron_idft.integration.training.arguments import add_data_arguments
from tests.launch import forked_codes

# Of the verbs that understand Megatron's flags too.
ADDED = {
    "train": (add_arguments, add_data_arguments),
    "run": (add_arguments,),
    "score": (add_score_arguments,),
    "realign": (add_realign_arguments,),
    "plan": (add_arguments, add_data_arguments, add_plan_arguments),
}
OWN = {
    "prepare": prepare._parser,
    "init": init._parser,
    "score status": score._status_parser,
    "score report": score._report_parser,
    "score select": score._select_parser,
    "realign status": realign._status_parser,
    "realign merge": realign._merge_parser,
    "realign report": realign._report_parser,
}
OF_ALL = {"--nproc-per-node", "--nnodes", "--standalone", "--help", "--cpu", "--verbose"}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*\w")


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


def added_by(verb: str) -> set[str]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for add in ADDED[verb]:
        add(parser)
    return flags_of(parser)


@functools.cache
def flags_of_megatron() -> frozenset[str]:
    codes, output = forked_codes([Path(__file__).with_name("megatron_flags.py")], alone=True)
    assert codes == [0], output
    return frozenset(line for line in output.splitlines() if line.startswith("--"))


@functools.cache
def flags_of_verb(verb: str) -> frozenset[str]:
    if verb in ADDED:
        return flags_of_megatron() | added_by(verb) | OF_ALL
    return frozenset(flags_of(OWN[verb]()) | OF_ALL)


def foreign_flags(words: list[str], message: str) -> set[str]:
    """Flags in `message` which neither stand on the command line `words` nor belong to its verb.

    A remedy may name another command: what follows `megatron-idft VERB` or `pip` is that command's.
    """
    verb = next((name for name in (" ".join(words[:2]), words[0]) if name in ADDED or name in OWN), None)
    if verb is None:
        return set()
    message = re.sub(r"`?\b(?:pip install|megatron-idft \w+)[^`\n]*`?", "", message)
    given = {word.split("=")[0] for word in words}
    return set(FLAG.findall(message)) - flags_of_verb(verb) - given
