"""The flags of `realign`: what they become, and which of them cannot be used together."""

import argparse

import numpy as np
import pytest

from megatron_idft.errors import InputError, UserError
from megatron_idft.hinted_decoding.mixing import EntropyMixing
from megatron_idft.hinted_decoding.named_prompts import PACKAGED
from megatron_idft.inference.requests import Repetition, Sampling
from megatron_idft.integration.offline.realign_arguments import add_realign_arguments, describe_renamed
from megatron_idft.integration.offline.realign_regenerate import UNUSED
from megatron_idft.integration.offline.realign_settings import (
    check_realign_arguments,
    resolve_prompts,
    resolve_settings,
)
from megatron_idft.parsing import raise_errors

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
    args = raise_errors(add_realign_arguments(argparse.ArgumentParser())).parse_args(words.split())
    vars(args).update(LAYOUT | layout)
    check_realign_arguments(args)
    return args


def settings(words: str, **layout):
    args = parsed(words, **layout)
    return resolve_settings(args, resolve_prompts(args).templates, 1000)


def test_the_paper_is_the_authors_hinted_decoding():
    found = settings("--paper")
    assert found.mixing == EntropyMixing(1000, "linear", 3.0, first_token_hinted=True)
    assert found.hinted_sampling == Sampling(0.3, 0.95, 0, cut_before_temperature=True)
    assert found.rollout_sampling == Sampling(1.0, 1.0) and found.rollout_samples == 1
    assert found.analysis_sampling == Sampling(0.0) and found.analysis_max_tokens == 16384
    assert [template.marker for template in found.templates] == ["# CoT"]
    assert (found.analysis_marker, found.more_room, found.retries, found.original_weight) == ("require", 0.0, 0, 1.0)
    assert found.repetition == Repetition(30, 5, 100) and found.splitter == "\\boxed{"
    assert not found.stop_on_first_token and found.max_tokens == 4096  # of 8192: the context is shorter
    assert (found.fallback, found.unverified, found.seed, found.max_positions) == ("drop", "drop", 1234, 4096)


def test_flags_reach_the_settings():
    found = settings(
        "--mix fixed --hint-share 1 --first-token mixed --entropy-vocab-size 1024 --temperature 1 --top-p 0.8 --top-k 9"
        " --nucleus-after-temperature --repetition-ngram 0 --max-new-tokens 7 --no-analysis --rollout-samples 0"
        " --retries 3 --retry-slope-factor 2 --fallback original --original-weight 0.5 --unverified keep"
        " --more-room 3"
        " --stop-on-first-token",
        seed=7,
    )
    assert found.mixing == EntropyMixing(1024, "fixed", hint_share=1.0, first_token_hinted=False)
    assert found.hinted_sampling == Sampling(1.0, 0.8, 9) and found.repetition is None and found.max_tokens == 7
    assert found.templates[0].marker is None and found.rollout_samples == 0 and found.stop_on_first_token
    assert (found.fallback, found.retries, found.retry_slope_factor, found.original_weight) == ("original", 3, 2.0, 0.5)
    assert found.more_room == 3.0 and settings("--analysis-marker require").analysis_marker == "require"
    assert (found.unverified, found.seed) == ("keep", 7)


def test_the_model_judges_only_where_it_is_asked_to():
    assert settings("--verifier-threshold 0.9").model_judge_threshold is None
    found = settings("--verifier model --verifier-threshold 0.9")
    assert found.model_judge_threshold == 0.9 and found.describe()["model_judge"]["threshold"] == 0.9
    assert "model_judge" not in settings("").describe()
    with pytest.raises(UserError, match="--verifier-threshold 1"):
        check_realign_arguments(parsed("--verifier model --verifier-threshold 1"))


def test_an_empty_splitter_is_none():
    args = add_realign_arguments(argparse.ArgumentParser()).parse_args(["--splitter", ""])
    vars(args).update(LAYOUT)
    assert resolve_settings(args, resolve_prompts(args).templates, 1000).splitter is None


def test_the_former_fallback_means_the_same_and_is_announced():
    for words, retries, fallback in (
        ("--fallback retry", 2, "drop"),
        ("--fallback retry --retries 3 --after-retries original", 3, "original"),
        ("--fallback drop --after-retries original", 2, "drop"),  # it said nothing then
    ):
        found = settings(words)
        assert (found.retries, found.fallback) == (retries, fallback)
        [line] = describe_renamed(parsed(words))
        assert line.endswith(f"write --retries {retries} --fallback {fallback}")
    help_text = " ".join(add_realign_arguments(argparse.ArgumentParser()).format_help().split())
    assert "--fallback {drop,original} " in help_text and "after-retries" not in help_text


def test_a_folder_of_an_earlier_version_goes_on_with_the_defaults_of_that_version():
    args = parsed("")
    for retry, retries in ((None, 0), ({"retries": 3, "slope_factor": 0.5}, 3)):
        begun = {"retry": retry, "more_room": 0.0, "analysis": {"marker": "require"}}
        found = resolve_settings(args, resolve_prompts(args).templates, 1000, begun)
        assert (found.retries, found.more_room, found.analysis_marker) == (retries, 0.0, "require")
    given = parsed("--retries 1 --more-room 3 --analysis-marker append")
    found = resolve_settings(given, resolve_prompts(given).templates, 1000, begun)
    assert (found.retries, found.more_room, found.analysis_marker) == (1, 3.0, "append")


def test_regeneration_has_own_responses_only():
    found = settings("--regenerate --rollout-samples 4 --more-room 3")
    assert (found.regenerate, found.only_right, found.templates, found.unverified) == (True, False, (), "keep")
    assert (found.rollout_samples, found.more_room) == (4, 3.0)
    described = found.describe()
    assert described["regenerate"] == {"only_right": False} and "mixing" not in described
    only = settings("--regenerate --only-right --verifier-plugin a:b")
    assert (only.only_right, only.unverified) == (True, "drop") and only.describe() != described
    assert "regenerate" not in settings("").describe()


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("--hint-prompt hint", "--hint-prompt"),
        ("--no-analysis", "--no-analysis"),
        ("--paper", "--paper"),
        ("--mix-beta 2 --temperature 1", "--mix-beta, --temperature"),
        ("--fallback original --original-weight 0.5", "--fallback, --original-weight"),
        ("--unverified keep", "--unverified"),
        ("--rollouts x.jsonl --analyses y.jsonl", "--rollouts, --analyses"),
        ("--retries 0", "--retries"),
        ("--verifier model --only-right", "--verifier would say nothing"),
        ("--nucleus-after-temperature", "--nucleus-after-temperature"),
        ("--verify-workers 3", "without --only-right, so --verify-workers"),
        ("--rollout-samples 0", "--rollout-samples K from 1"),
        ("--rollout-samples 2 --rollout-temperature 0", "the same 2 times"),
    ],
)
def test_flags_of_hints_and_references_are_refused_by_name_in_a_regeneration(words, flags):
    with pytest.raises(UserError, match=flags):
        settings(f"--regenerate {words}")
    with pytest.raises(UserError, match="only with --regenerate"):
        settings("--only-right")


def test_every_flag_that_a_regeneration_refuses_is_one():
    known = {action.dest for action in add_realign_arguments(argparse.ArgumentParser())._actions}
    assert set(UNUSED) <= known


def test_what_would_be_written_again_is_not_tried_unless_it_is_asked_for():
    assert settings("--temperature 0 --mix piecewise").retries == 0
    assert settings("--temperature 0").retries == 2
    assert settings("--more-room 1").more_room == settings("--more-room 0").more_room == 0


FORMER = "--mix fixed --mix-lambda 0.9 --mix-beta 2 --retry-beta-factor 3"


def test_the_former_flags_of_the_mix_mean_the_same():
    today = "--mix fixed --hint-share 0.1 --mix-slope 2 --retry-slope-factor 3"
    assert settings(FORMER) == settings(today)
    assert settings(FORMER).mixing.hint_share == 0.1  # not 0.09999999999999998
    for thousandth in range(1001):
        share = parsed(f"--mix fixed --mix-lambda {thousandth / 1000}").hint_share
        assert 1 - share == pytest.approx(thousandth / 1000, abs=1e-15)
        assert np.float32(1 - share) == np.float32(thousandth / 1000)  # what the streams are mixed with


def test_the_prompts_that_flags_name(tmp_path):
    assert [t.name for t in resolve_prompts(parsed("")).templates] == list(PACKAGED)
    assert resolve_prompts(parsed("")).auto and resolve_prompts(parsed("--hint-prompt auto")).auto
    assert [t.name for t in resolve_prompts(parsed("--hint-prompt analysis explain")).templates] == [
        "analysis",
        "explain",
    ]
    mine = tmp_path / "mine.txt"
    mine.write_text("---\n{{ question }} {{ answer }}")
    more = resolve_prompts(parsed(f"--hint-prompt auto {mine}"))
    assert (
        more.auto and [t.name for t in more.templates] == [*PACKAGED, str(mine)] and more.extra == more.templates[-1:]
    )
    # As they were meant before --hint-prompt named any prompt.
    for former, names in (
        ("--no-analysis", ["hint"]),
        (f"--no-analysis --hint-prompt {mine}", [str(mine)]),
        ("--analyses x.jsonl", ["analysis"]),
    ):
        found = resolve_prompts(parsed(former))
        assert not found.auto and [template.name for template in found.templates] == names
    plain = resolve_prompts(parsed("--no-analysis --hint-prompt auto"))
    assert plain.auto and {template.marker for template in plain.templates} == {None}
    with pytest.raises(InputError, match="--analysis-prompt needs a prompt with a header line"):
        resolve_prompts(parsed(f"--analysis-prompt {mine}"))
    marked = tmp_path / "marked.txt"
    marked.write_text("marker: X\n---\n{{ question }} {{ answer }} X")
    assert [t.name for t in resolve_prompts(parsed(f"--analysis-prompt {marked}")).templates] == [str(marked)]
    assert describe_renamed(parsed(f"--analysis-prompt {marked}")) == [
        f"--analysis-prompt is now --hint-prompt: write --hint-prompt {marked}"
    ]
    [line] = describe_renamed(parsed("--no-analysis"))
    assert line.endswith("write --hint-prompt hint")


def test_the_paper_leaves_lengths_to_the_user():
    found = settings("--paper --analysis-max-tokens 9 --max-new-tokens 8 --mix-slope 3")
    assert (found.analysis_max_tokens, found.max_tokens) == (9, 8)


def test_a_former_flag_is_announced_and_not_shown():
    assert describe_renamed(parsed(FORMER)) == [
        "--mix-lambda is now --hint-share: write --hint-share 0.1",
        "--mix-beta is now --mix-slope: write --mix-slope 2.0",
        "--retry-beta-factor is now --retry-slope-factor: write --retry-slope-factor 3.0",
    ]
    assert describe_renamed(parsed("--mix fixed --hint-share 0.1")) == []
    text = add_realign_arguments(argparse.ArgumentParser()).format_help()
    assert "--hint-share" in text and "lambda" not in text and "beta" not in text


def test_the_manifest_tells_apart_what_makes_other_responses():
    """Every flag that decides what is written shows up in what launches must agree on."""
    described = [
        str(settings(words, **layout).describe())
        for words, layout in [
            ("", {}), ("", {"seed": 1}), ("", {"seq_length": 8}), ("--max-new-tokens 9", {}),
            ("--rollout-samples 2", {}), ("--rollout-samples 0", {}), ("--rollout-temperature 2", {}),
            ("--rollout-top-p 0.5", {}),
            ("--rollout-top-k 5", {}), ("--no-analysis", {}), ("--hint-prompt hint analysis", {}),
            ("--analysis-max-tokens 9", {}),
            ("--analysis-temperature 1", {}), ("--mix sigmoid", {}), ("--mix piecewise", {}), ("--mix-slope 2", {}),
            ("--mix fixed --hint-share 0", {}), ("--mix fixed --hint-share 1", {}), ("--first-token mixed", {}),
            ("--entropy-vocab-size 9", {}), ("--temperature 1", {}), ("--top-p 0.5", {}), ("--top-k 5", {}),
            ("--nucleus-after-temperature", {}), ("--splitter x", {}), ("--repetition-ngram 9", {}),
            ("--repetition-ngram 0", {}), ("--repetition-count 9", {}), ("--repetition-every 9", {}),
            ("--stop-on-first-token", {}), ("--fallback original", {}), ("--retries 0", {}), ("--retries 9", {}),
            ("--retry-slope-factor 9", {}), ("--fallback original --original-weight 0.5", {}), ("--more-room 0", {}),
            ("--more-room 3", {}), ("--analysis-marker require", {}), ("--unverified keep", {}),
            ("--unverified original", {}),
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
        ("--hint-prompt nowhere", {}, "neither a packaged one .*solve-again.* nor a file"),
        ("--hint-prompt hint auto", {}, "auto comes first"),
        ("--hint-prompt hint hint", {}, "hint is the same as hint"),
        ("--hint-prompt hint --prompt-trial-records 9", {}, "only with --hint-prompt auto"),
        ("--no-analysis --hint-prompt analysis", {}, "analysis: with --no-analysis there is no marker"),
        ("--analysis-prompt x --hint-prompt y", {}, "drop one of them"),
        ("--analyses x.jsonl --hint-prompt hint", {}, "hint: --analyses needs a prompt with a header line"),
        ("--paper --hint-prompt hint", {}, "--paper sets .*, and --hint-prompt says otherwise"),
        ("--paper --retry-beta-factor 3 --mix-beta 1 --nucleus-after-temperature", {}, "--mix-beta, --nucleus-after"),
        ("--paper --no-analysis", {}, "--no-analysis says otherwise"),
        ("--mix fixed", {}, "needs --hint-share"),
        ("--hint-share 0.5", {}, "only with --mix fixed"),
        ("--mix fixed --hint-share 2", {}, "from 0 to 1"),
        ("--mix-slope -1", {}, "from 0"),
        ("--mix fixed --mix-lambda 2", {}, "--mix-lambda: 2: pass a number from 0 to 1"),
        ("--mix fixed --mix-lambda nan", {}, "--mix-lambda: nan: pass a number from 0 to 1"),
        ("--mix fixed --mix-lambda x", {}, "--mix-lambda: x: pass a number from 0 to 1"),
        ("--mix-lambda 0.5", {}, "drop --mix-lambda"),
        ("--retry-beta-factor 0", {}, "--retry-beta-factor 0.0: pass"),
        ("--rollout-samples -1", {}, "whole number from 0"),
        ("--retry-slope-factor 0", {}, "number above 0"),
        ("--kv-memory-gb 0", {}, "number above 0"),
        ("--estimate --retry-errors", {}, "pass one of them"),
        ("--retries 2 --temperature 0 --mix piecewise", {}, "the same again"),
        ("--fallback retry --retries 2 --temperature 0 --mix fixed --hint-share 0.5", {}, "the same again"),
        ("--retries -1", {}, "whole number from 0"),
        ("--more-room 0.5", {}, "from 1, or 0"),
        ("--more-room nan", {}, "from 1, or 0"),
        ("--more-room inf", {}, "from 1, or 0"),
        ("--fallback original --original-weight 0", {}, "above 0"),
        ("--fallback original --original-weight nan", {}, "above 0"),
        ("--original-weight 0.5", {}, "--fallback original or --unverified original"),
        ("--analysis-marker require --no-analysis", {}, "drop one of them"),
        ("--top-p 0", {}, "--top-p"),
        ("--rollout-temperature -1", {}, "--rollout-temperature"),
        ("--analysis-prompt nowhere", {}, "nor a file"),
        ("--hint-prompt .", {}, "name a UTF-8 text file"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_remedy(words, layout, remedy):
    with pytest.raises(UserError, match=remedy):
        settings(words, **layout)
