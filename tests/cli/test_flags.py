"""The flags of records have one spelling in all verbs; those that some verbs had before are accepted and not shown."""

import argparse

import pytest

from megatron_idft.cli import prepare
from megatron_idft.data import flags
from megatron_idft.integration.offline.realign_arguments import add_realign_arguments
from megatron_idft.integration.offline.score_arguments import add_score_arguments
from megatron_idft.integration.training.arguments import add_data_arguments

SPELLED_BEFORE = {
    "train": (),
    "prepare": ("--data", "--truncation", "--bad-records", "--last-turn-only", "--template-date"),
    "score": ("--data", "--truncation", "--bad-records", "--template-date", "--token-cache"),
    "realign": ("--data", "--bad-records", "--template-date"),
}
VALUES = {"--sft-data": ["a.jsonl", "b.jsonl"], "--sft-truncation": ["drop"], "--sft-bad-records": ["skip"]}
VALUES |= {"--sft-last-turn-only": [], "--sft-template-date": ["2026-01-02"], "--sft-cache": ["folder"]}
VALUES |= {"--sft-reference": ["scores"], "--sft-reference-dtype": ["float16"], "--sft-reference-top-k": ["8"]}


def parser_of(verb: str) -> argparse.ArgumentParser:
    if verb == "prepare":
        return prepare._parser()
    add = {"train": add_data_arguments, "score": add_score_arguments, "realign": add_realign_arguments}[verb]
    return add(argparse.ArgumentParser(allow_abbrev=False))


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: action for action in parser._actions for name in action.option_strings}


@pytest.mark.parametrize("verb", SPELLED_BEFORE)
def test_a_flag_of_records_is_the_same_in_every_verb(verb):
    parser, train = parser_of(verb), options_of(parser_of("train"))
    own = options_of(parser)
    shown = parser.format_help()
    shared = [name for name in flags._BEFORE if name in own]
    assert set(SPELLED_BEFORE[verb]) <= {flags._BEFORE[name] for name in shared}
    for name in shared:
        action, theirs = own[name], train[name]
        for attribute in ("dest", "nargs", "choices", "default", "metavar"):
            assert getattr(action, attribute) == getattr(theirs, attribute), (name, attribute)
        assert name in shown and f" {flags._BEFORE[name]} " not in shown
    required = ["--output", "o", "--tokenizer-model", "t", "--seq-length", "8"] if verb == "prepare" else []
    given = [word for name in shared for word in (name, *VALUES[name])]
    before = [word for name in shared for word in (flags._BEFORE[name], *VALUES[name])]
    assert parser.parse_known_args(given + required) == parser.parse_known_args(before + required)
