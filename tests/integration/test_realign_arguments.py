"""The flags of `realign`: what they become, and which of them cannot be used together."""

import argparse

import pytest

from megatron_idft.errors import UserError
from megatron_idft.hinted_decoding.mixing import EntropyMixing
from megatron_idft.inference.requests import Repetition, Sampling
from megatron_idft.integration.offline.realign_arguments import add_realign_arguments
from megatron_idft.integration.offline.realign_settings import (
    check_realign_arguments,
    resolve_settings,
    resolve_template,
)

# Megatron's own, with its defaults.
LAYOUT = {
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "seed": 1234,
    "seq_length": 4096,
}


def parsed(words: str, **layout) -> argparse.Namespace:
    args = add_realign_arguments(argparse.ArgumentParser()).parse_args(words.split())
    vars(args).update(LAYOUT | layout)
    check_realign_arguments(args)
    return args


def settings(words: str, **layout):
    args = parsed(words, **layout)
    return resolve_settings(args, resolve_template(args), 1000)


def test_without_flags_it_is_the_authors_hinted_decoding():
    found = settings("")
    assert found.mixing == EntropyMixing(1000, "linear", 3.0, first_token_hinted=True)
    assert found.hinted_sampling == Sampling(0.3, 0.95, 0, cut_before_temperature=True)
    assert found.rollout_sampling == Sampling(1.0, 1.0) and found.rollout_samples == 1
    assert found.analysis_sampling == Sampling(0.0) and found.template.marker == "# CoT"
    assert found.repetition == Repetition(30, 5, 100) and found.splitter == "\\boxed{"
    assert not found.stop_on_first_token and found.max_tokens == 4096  # of 8192: the context is shorter
    assert (found.fallback, found.unverified, found.seed, found.max_positions) == ("drop", "drop", 1234, 4096)


def test_flags_reach_the_settings():
    found = settings(
        "--mix fixed --mix-lambda 0 --first-token mixed --entropy-vocab-size 1024 --temperature 1 --top-p 0.8 --top-k 9"
        " --nucleus-after-temperature --repetition-ngram 0 --max-new-tokens 7 --no-analysis --rollout-samples 0"
        " --fallback retry --retries 3 --retry-beta-factor 2 --after-retries original --unverified keep"
        " --stop-on-first-token",
        seed=7,
    )
    assert found.mixing == EntropyMixing(1024, "fixed", value=0.0, first_token_hinted=False)
    assert found.hinted_sampling == Sampling(1.0, 0.8, 9) and found.repetition is None and found.max_tokens == 7
    assert found.template.marker is None and found.rollout_samples == 0 and found.stop_on_first_token
    assert (found.fallback, found.retries, found.retry_beta_factor, found.last_resort) == ("retry", 3, 2.0, "original")
    assert (found.unverified, found.seed) == ("keep", 7)


def test_an_empty_splitter_is_none():
    args = add_realign_arguments(argparse.ArgumentParser()).parse_args(["--splitter", ""])
    vars(args).update(LAYOUT)
    assert resolve_settings(args, resolve_template(args), 1000).splitter is None


def test_the_manifest_tells_apart_what_makes_other_responses():
    """Every flag that decides what is written shows up in what launches must agree on."""
    described = [
        str(settings(words, **layout).describe())
        for words, layout in [
            ("", {}), ("", {"seed": 1}), ("", {"seq_length": 8}), ("--max-new-tokens 9", {}),
            ("--rollout-samples 2", {}), ("--rollout-samples 0", {}), ("--rollout-temperature 2", {}),
            ("--rollout-top-p 0.5", {}),
            ("--rollout-top-k 5", {}), ("--no-analysis", {}), ("--analysis-max-tokens 9", {}),
            ("--analysis-temperature 1", {}), ("--mix sigmoid", {}), ("--mix piecewise", {}), ("--mix-beta 2", {}),
            ("--mix fixed --mix-lambda 0", {}), ("--mix fixed --mix-lambda 1", {}), ("--first-token mixed", {}),
            ("--entropy-vocab-size 9", {}), ("--temperature 1", {}), ("--top-p 0.5", {}), ("--top-k 5", {}),
            ("--nucleus-after-temperature", {}), ("--splitter x", {}), ("--repetition-ngram 9", {}),
            ("--repetition-ngram 0", {}), ("--repetition-count 9", {}), ("--repetition-every 9", {}),
            ("--stop-on-first-token", {}), ("--fallback original", {}), ("--fallback retry", {}),
            ("--fallback retry --retries 9", {}), ("--fallback retry --retry-beta-factor 9", {}),
            ("--fallback retry --after-retries original", {}), ("--unverified keep", {}), ("--unverified original", {}),
        ]
    ]  # fmt: skip
    assert len(set(described)) == len(described)


@pytest.mark.parametrize(
    ("words", "layout", "remedy"),
    [
        ("", {"pipeline_model_parallel_size": 2}, "weights load under any layout"),
        ("", {"context_parallel_size": 2}, "weights load under any layout"),
        ("", {"sequence_parallel": True}, "weights load under any layout"),
        ("", {"num_layers_per_virtual_pipeline_stage": 1}, "weights load under any layout"),
        ("--no-analysis --analyses x.jsonl", {}, "drop one of them"),
        ("--no-analysis --analysis-prompt x", {}, "drop one of them"),
        ("--hint-prompt x", {}, "--no-analysis alone"),
        ("--mix fixed", {}, "needs --mix-lambda"),
        ("--mix-lambda 0.5", {}, "--mix fixed alone"),
        ("--mix fixed --mix-lambda 2", {}, "from 0 to 1"),
        ("--mix-beta -1", {}, "from 0"),
        ("--rollout-samples -1", {}, "whole number from 0"),
        ("--retry-beta-factor 0", {}, "number above 0"),
        ("--kv-memory-gb 0", {}, "number above 0"),
        ("--estimate --retry-errors", {}, "pass one of them"),
        ("--fallback retry --temperature 0 --mix piecewise", {}, "the same again"),
        ("--top-p 0", {}, "--top-p"),
        ("--rollout-temperature -1", {}, "--rollout-temperature"),
        ("--analysis-prompt nowhere", {}, "name a UTF-8 text file"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_remedy(words, layout, remedy):
    with pytest.raises(UserError, match=remedy):
        settings(words, **layout)
