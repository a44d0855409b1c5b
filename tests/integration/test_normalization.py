"""`--sft-normalization`: each formula exactly, in every layout, switched at an iteration, and resumed to the bit.

The corpus is that of test_packed_training.py: eight documents in four packs, all of them in every step, one with a
single trained token, some with weights. So records of one process and packs over ranks see the same conversations.
"""

import argparse
import json
from pathlib import Path

import pytest
import torch

from megatron_idft.errors import ArgumentError
from megatron_idft.integration import script
from megatron_idft.integration.loss import flags
from megatron_idft.integration.training.arguments import add_data_arguments, validate_data_arguments
from megatron_idft.integration.training.normalization import Normalization, normalization_schedule
from tests.integration import test_packed_training
from tests.integration.test_arguments import new_parser
from tests.integration.test_packed_training import COMMON, MODELS, assert_same_training, corpus, train  # noqa: F401  a fixture
from tests.launch import forked
from tests.run_outputs import differences, load_checkpoint, load_scalars

HERE = Path(__file__).parent
DATA = "--sft-data x --tokenizer-model t --train-epochs 1 --seq-length 64"
SWITCHED = "--sft-normalization token sample@1 constant@4"


def parsed(line: str) -> argparse.Namespace:
    words = f"{DATA} {line}".split()
    provider = flags.compose_providers(add_data_arguments, flags.wants_per_token_loss(words))
    args = provider(new_parser()).parse_args(words)
    validate_data_arguments(args)
    return args


def test_a_schedule_says_what_holds_for_each_step():
    args = parsed(SWITCHED)
    assert args.calculate_per_token_loss, "without --sft-loss too"
    schedule = normalization_schedule(args, 11)
    assert args.sft_normalization_constant == 64, "as checkpoints record it"
    token, sample, constant = Normalization(), Normalization("sample", 11), Normalization("constant", 64)
    assert [schedule.at(iteration) for iteration in range(5)] == [token, sample, sample, sample, constant]
    assert schedule.counts_conversations
    assert str(schedule) == (
        "per trained token, from iteration 1 on per conversation, from iteration 4 on per 64 tokens a sample"
    )
    whole = normalization_schedule(parsed("--sft-normalization constant --sft-normalization-constant 9"), 11)
    assert whole.at(0) == whole.at(10**9) == Normalization("constant", 9) and not whole.counts_conversations
    default = parsed("")
    assert not default.calculate_per_token_loss, "Megatron's own default"
    assert default.sft_normalization == ["token"] and default.sft_normalization_constant is None
    assert normalization_schedule(default, 11).at(3) == token


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("--sft-normalization tokens", "in the place of 'tokens' pass one of token, sample, constant"),
        ("--sft-normalization sample@3", "in the place of 'sample@3' pass one of token, sample"),
        ("--sft-normalization token sample", "in the place of 'sample' pass one of token@2000, sample@2000"),
        ("--sft-normalization token sample@-1", "in the place of 'sample@-1'"),
        ("--sft-normalization token sample@0", "must ascend, 0 follows 0"),
        ("--sft-normalization token sample@9 token@9", "must ascend, 9 follows 9"),
        ("--sft-normalization-constant 5", "without --sft-normalization constant: add it"),
        ("--sft-normalization sample --sft-normalization-constant 5", "without --sft-normalization constant: add it"),
        ("--sft-normalization constant --sft-normalization-constant 0", "pass the tokens that a sample counts for"),
        (
            "--sft-normalization constant --sft-normalization-constant 2000000 --global-batch-size 2000",
            "all samples of --global-batch-size at most 2147483647",
        ),
        ("--sft-normalization sample --no-calculate-per-token-loss", "drop one of the two"),
        ("--sft-normalization constant --ddp-average-in-collective", "drop one of the two"),
        ("--sft-normalization token sample@2 --cuda-graph-impl full_iteration", r"End the run at the switch"),
    ],
)
def test_refusals_name_the_remedy(line, remedy):
    with pytest.raises(ArgumentError, match=remedy):
        parsed(line)


def test_graphs_of_whole_iterations_take_one_normalization():
    assert parsed("--sft-normalization sample --cuda-graph-impl full_iteration").sft_normalization == ["sample"]


@pytest.mark.parametrize("flag", ["--sft-normalization", "--sft-normalization-constant=3"])
def test_run_names_the_program_that_has_the_flag(flag):
    with pytest.raises(ArgumentError, match=r"is a flag of `train`.*return these two there, or train with"):
        script.run_script("pretrain.py", ["--lr", "1", flag, "sample"])


def test_loss_and_gradient_are_those_of_the_formulas_over_ranks_packs_micro_batches_and_padding():
    found = json.loads(forked([HERE / "normalization_probe.py"], nproc=4).splitlines()[-1])
    print(found)
    exact = {f"{kind}, {mode}" for kind in ("packs", "records") for mode in ("token", "sample", "constant")}
    faults = {name: errors for name, errors in found.items() if name not in exact}
    assert found.keys() - faults.keys() == exact and len(faults) == 4
    for name in exact:
        assert max(found[name]) < 1e-6, (name, found[name])
    for name, errors in faults.items():
        assert min(errors) > 0.01, (name, errors)


@pytest.fixture(scope="module")
def one_process(corpus, tmp_path_factory) -> Path:  # noqa: F811
    """The records one by one: a step per token, three per conversation, one over a constant."""
    folder = tmp_path_factory.mktemp("one")
    words = f"--micro-batch-size 8 --global-batch-size 8 --train-iters 5 --save-interval 2 {MODELS['mlp']}"
    output = train(corpus, folder, corpus / "packs.jsonl", f"{words} {SWITCHED} --sft-normalization-constant 16")
    assert "loss: idft, per trained token, from iteration 1 on per conversation, from iteration 4 on per 16" in output
    return folder


def continued(corpus: Path, start: Path, folder: Path, data: str, flags: str, nproc: int = 1) -> str:  # noqa: F811
    """Steps 3 to 5: two per conversation, and one over a constant."""
    words = f"--load {start} --ckpt-step 2 --override-opt_param-scheduler --exit-interval 5 {MODELS['mlp']}"
    return train(corpus, folder, corpus / data, f"{words} {flags}", nproc)


@pytest.mark.parametrize(
    ("data", "layout"),
    [
        ("packs", "--pipeline-model-parallel-size 2"),
        ("packs", "--tensor-model-parallel-size 2 --sequence-parallel"),
        ("packs.jsonl", "--context-parallel-size 2"),
    ],
)
def test_every_layout_trains_like_one_process(corpus, one_process, tmp_path, data, layout):  # noqa: F811
    """Each with two data-parallel ranks that accumulate the gradients of several micro-batches."""
    size, constant = (4, 32) if data == "packs" else (8, 16)
    words = f"--micro-batch-size 1 --global-batch-size {size} --train-iters 8 {layout}"
    words += f" {SWITCHED} --sft-normalization-constant {constant}"
    continued(corpus, one_process, tmp_path, data, words, nproc=4)
    assert_same_training(one_process, tmp_path)


def test_a_run_resumes_to_the_bit_across_a_switch(corpus, one_process, tmp_path):  # noqa: F811
    words = "--micro-batch-size 8 --global-batch-size 8 --train-iters 5"
    again, other = tmp_path / "again", tmp_path / "other"
    flags = f"{words} {SWITCHED} --sft-normalization-constant 16"
    assert "with another loss" not in continued(corpus, one_process, again, "packs.jsonl", flags)
    expected, got = load_scalars(one_process / "tensorboard"), load_scalars(again / "tensorboard")
    assert sorted(got["grad-norm"]) == [3, 4, 5]
    for key in ("grad-norm", "lm loss"):
        assert got[key] == {step: expected[key][step] for step in got[key]}, key
    assert differences(load_checkpoint(one_process, 5), load_checkpoint(again, 5)) == []
    output = continued(corpus, one_process, other, "packs.jsonl", f"{words} --sft-normalization token")
    assert (
        "with another loss: --sft-normalization: token sample@1 constant@4 in the checkpoint, token now;"
        " --sft-normalization-constant: 16 in the checkpoint, None now" in output
    )
    got = load_scalars(other / "tensorboard")
    assert got["lm loss"][3] == expected["lm loss"][3], "of a conversation's tokens or not, per trained token"
    for step in (3, 5):  # per conversation, and over a constant
        assert got["grad-norm"][step] != pytest.approx(expected["grad-norm"][step], rel=0.02)


def test_megatrons_own_loss_is_normalized_too(corpus, one_process, tmp_path, monkeypatch):  # noqa: F811
    """Its gradient is that of `--sft-loss ce`, where that counts padded columns too."""
    steps = "--micro-batch-size 4 --global-batch-size 8 --train-iters 5 --sft-normalization sample"
    continued(corpus, one_process, tmp_path / "ce", "packs.jsonl", f"{steps} --sft-loss ce --sft-loss-vocab-size 64")
    monkeypatch.setattr(test_packed_training, "COMMON", COMMON.replace("--sft-loss idft", ""))
    output = continued(corpus, one_process, tmp_path / "none", "packs.jsonl", steps)
    assert "loss: cross-entropy, of Megatron, per conversation" in output
    expected, got = (load_scalars(tmp_path / name / "tensorboard") for name in ("ce", "none"))
    for key in ("grad-norm", "lm loss"):
        assert got[key] == pytest.approx(expected[key], rel=1e-5), key


def weightless(statistics):
    """An objective that trains nothing: the gradient that is left is that of other losses."""
    return torch.zeros_like(statistics.log_prob)


def test_other_losses_keep_their_size_and_evaluations_their_meaning(corpus, tmp_path):  # noqa: F811
    """Load balancing and multi-token prediction under each normalization, of one model that does not move."""
    words = "--lr 0 --train-iters 3 --micro-batch-size 8 --global-batch-size 8 --eval-interval 1"
    words += f" --sft-loss tests.integration.test_normalization:weightless --sft-valid-data {corpus / 'packs.jsonl'}"
    words += " --sft-normalization token sample@1 constant@2 --sft-normalization-constant 10"
    words += " --num-layers 2 --mtp-num-layers 1 --num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 1"
    train(corpus, tmp_path, corpus / "packs.jsonl", f"{words} --disable-bias-linear --position-embedding-type rope")
    got = load_scalars(tmp_path / "tensorboard")
    trained, average = 39, 5  # of 8 conversations: 4.875 tokens each
    assert got["trained tokens"][1] == trained
    token, sample, constant = (got["grad-norm"][step] for step in (1, 2, 3))
    assert sample == pytest.approx(token * trained / (8 * average), rel=1e-5)
    assert constant == pytest.approx(token * trained / (8 * 10), rel=1e-5)
    for key in ("lm loss", "lm loss validation"):
        assert list(got[key].values()) == pytest.approx([got["lm loss"][1]] * len(got[key]), rel=1e-6), key
