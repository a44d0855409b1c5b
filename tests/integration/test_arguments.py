"""The flags: frozen, validated in one place, every refusal naming its remedy. Megatron's own parser is the real one."""

import argparse
import inspect
from contextlib import nullcontext

import pytest
import torch
from megatron.training.arguments import add_megatron_arguments

from megatron_idft import objectives
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.loss import arguments, flags
from megatron_idft.integration.plan.arguments import add_plan_arguments
from megatron_idft.integration.platform import flag_checks
from megatron_idft.integration.platform.gpu_libraries import GPULibraries
from megatron_idft.integration.training.arguments import add_data_arguments, validate_data_arguments
from megatron_idft.loss import triton_backend
from megatron_idft.objective_table import OBJECTIVE_FLAGS
from megatron_idft.statistics import REFERENCE_STATISTICS

LOSS_FLAGS = [
    "--anchor-cap",
    "--anchor-coefficient",
    "--anchor-kl-coefficient",
    "--cpu",
    "--gift-beta",
    "--idft-beta",
    "--idft-gamma-max",
    "--idft-gamma-min",
    "--idft-lambda-ramp",
    "--idft-lambda-warmup",
    "--idft-weights",
    "--iw-max",
    "--iw-min",
    "--minor-sft-beta",
    "--no-calculate-per-token-loss",
    "--power-q",
    "--psft-epsilon",
    "--sft-loss",
    "--sft-loss-backend",
    "--sft-loss-chunk-tokens",
    "--sft-loss-exempt-tokens",
    "--sft-loss-head",
    "--sft-loss-vocab-size",
    "--sft-loss-weight-floor",
]
DATA_FLAGS = [
    "--hf-cache",
    "--hf-model",
    "--hf-model-class",
    "--ignore-config",
    "--no-checkpoint-checksums",
    "--no-exit-signal-handler",
    "--no-sft-source-metrics",
    "--save-hf",
    "--sft-bad-records",
    "--sft-cache",
    "--sft-data",
    "--sft-keep-best",
    "--sft-keep-best-metric",
    "--sft-keep-best-mode",
    "--sft-last-turn-only",
    "--sft-normalization",
    "--sft-normalization-constant",
    "--sft-packing",
    "--sft-prompt-weight",
    "--sft-reference",
    "--sft-reference-dtype",
    "--sft-reference-top-k",
    "--sft-template-date",
    "--sft-truncation",
    "--sft-valid-data",
    "--train-epochs",
]
PLAN_FLAGS = [
    "--disk-gb-per-s",
    "--gpu",
    "--gpu-memory-gib",
    "--gpus",
    "--gpus-per-node",
    "--json",
    "--layouts",
    "--mfu",
    "--peak-tflops",
    "--reserve-gib",
]


def new_parser() -> argparse.ArgumentParser:
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def parse(line: str, provider=flags.add_arguments) -> argparse.Namespace:
    return provider(new_parser()).parse_args(line.split())


def validated(line: str) -> argparse.Namespace:
    args = parse(line)
    arguments.validate_arguments(args)
    return args


@pytest.mark.parametrize(
    ("provider", "flags"),
    [(flags.add_arguments, LOSS_FLAGS), (add_data_arguments, DATA_FLAGS), (add_plan_arguments, PLAN_FLAGS)],
)
def test_flags_are_frozen_and_documented(provider, flags):
    megatron = {option for action in new_parser()._actions for option in action.option_strings}
    added = [action for action in provider(new_parser())._actions if not set(action.option_strings) <= megatron]
    added = [action for action in added if action.help is not argparse.SUPPRESS]  # earlier spellings: test_flags.py
    assert sorted(option for action in added for option in action.option_strings) == flags
    assert all(action.help and len(action.help) > 40 for action in added)


def test_defaults_are_the_papers_and_resolved_into_plain_values():
    args = validated("--sft-loss idft")
    assert args.idft_beta == 1.0
    assert args.idft_gamma_min == 0.1
    assert args.idft_gamma_max == 2.0
    assert args.idft_lambda_warmup == 0.0
    assert args.idft_lambda_ramp == 0.0
    assert args.sft_loss_weight_floor == 0.0
    assert args.sft_loss_exempt_tokens == []
    assert args.sft_loss_backend == "auto"
    assert args.calculate_per_token_loss


def test_per_token_loss_has_a_negative_form():
    assert not validated("--sft-loss idft --no-calculate-per-token-loss").calculate_per_token_loss


def test_without_the_flag_megatron_is_left_alone():
    args = parse("", lambda parser: flags.compose_providers(None, per_token_loss_default=False)(parser))
    arguments.validate_arguments(args)
    assert args.sft_loss is None and not args.calculate_per_token_loss


def test_a_scripts_own_provider_is_composed_with_ours():
    def provider(parser):
        parser.add_argument("--mine", type=int)
        return parser

    args = parse("--mine 3 --sft-loss dft", flags.compose_providers(provider, per_token_loss_default=True))
    assert args.mine == 3
    assert args.sft_loss == "dft"


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("--sft-loss idff", "Choose one of ce, dft, idft, entropy"),
        ("--idft-beta 2", "Add --sft-loss idft"),
        ("--power-q 2", "Add --sft-loss power"),
        ("--sft-loss-backend reference", "Add --sft-loss idft"),
        ("--sft-loss-head fused", "Add --sft-loss idft"),
        ("--sft-loss idft --sft-loss-chunk-tokens 64", "or use --sft-loss-head fused"),
        ("--sft-loss idft --sft-loss-head fused --sft-loss-chunk-tokens 0", "a whole number of tokens from 1"),
        ("--sft-loss dft --idft-beta 2", "use --sft-loss idft"),
        ("--sft-loss ce --idft-lambda-ramp 0.1", "use --sft-loss idft"),
        ("--sft-loss idft --power-q 1", "use --sft-loss power"),
        ("--sft-loss power --idft-beta 2", "use --sft-loss idft"),
        ("--sft-loss power --power-q -1", "q must lie in"),
        ("--sft-loss power --power-q nan", "q must lie in"),
        ("--anchor-cap 3", "Add --sft-loss asft"),
        ("--sft-loss prift --anchor-coefficient 0.1", "use --sft-loss asft or sft_k3"),
        ("--sft-loss asft --anchor-cap 0.5", "cap must be"),
        ("--sft-loss asft --sft-loss-weight-floor 0.1", "would raise the negative weights"),
        ("--sft-loss iw --iw-min 3", "ratio_min <= ratio_max"),
        ("--sft-loss idft --idft-beta 0", "beta must be"),
        ("--sft-loss idft --idft-gamma-min 3", "gamma_min <= gamma_max"),
        ("--sft-loss idft --idft-lambda-warmup 1.2", "share of training"),
        ("--sft-loss idft --idft-lambda-warmup 0.7 --idft-lambda-ramp 0.7", "must not exceed 1"),
        ("--sft-loss idft --sft-loss-weight-floor 2", "weight_floor must lie in"),
        ("--sft-loss idft --sft-loss-exempt-tokens -3", "non-negative"),
        ("--sft-loss nowhere:weight", "PYTHONPATH"),
        ("--sft-loss math:nothing", "has no 'nothing'"),
        ("--sft-loss idft --cross-entropy-loss-fusion", "Drop --cross-entropy-loss-fusion"),
        ("--sft-loss idft --fp16-lm-cross-entropy", "Drop --fp16-lm-cross-entropy"),
        ("--sft-loss idft --logits-save-dir x", "without --sft-loss"),
        ("--sft-loss idft --logits-load-dir x", "Drop --logits-load-dir"),
        ("--sft-loss idft --perform-rl-step", "Drop --perform-rl-step"),
        ("--sft-loss idft --ddp-average-in-collective", "--no-calculate-per-token-loss"),
    ],
)
def test_refusals_name_the_remedy(line, remedy):
    with pytest.raises(ValueError, match=remedy.replace("(", r"\(")):
        validated(line)


@pytest.mark.parametrize(
    "flag",
    [
        "--defer-embedding-wgrad-compute",
        "--use-megatron-fsdp",
        "--use-torch-fsdp2",
        "--tensor-parallel-num-weight-shards 2",
        "--fp8-output-proj",
        "--config-logger-dir x",
        "--save-activations-interval 2",
        "--save-dgrads-interval 2",
        "--reuse-grad-buf-for-mxfp8-param-ag",
        "--cuda-graph-warmup-steps 0 --cuda-graph-impl full_iteration",
    ],
)
def test_what_the_fused_head_cannot_serve_is_refused_by_name(flag):
    with pytest.raises(ArgumentError, match=f"^{flag.split()[0]}.*--sft-loss-head materialized"):
        validated(f"--sft-loss idft --sft-loss-head fused {flag}")
    assert validated(f"--sft-loss idft {flag}").sft_loss_head == "materialized"


@pytest.mark.parametrize("device", ["", "--cpu "])
def test_a_backend_that_cannot_run_here_is_refused_before_training(device, monkeypatch):
    line = f"{device}--sft-loss idft --sft-loss-backend triton"
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match="CUDA device, got cpu; use backend='auto' or 'reference'"):
        validated(line)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if device:
        with pytest.raises(ValueError, match="CUDA device, got cpu"):
            validated(line)
    else:
        assert validated(line).sft_loss_backend == "triton"


def test_a_yaml_configuration_is_refused_because_it_would_drop_the_flags():
    with pytest.raises(arguments.ArgumentError, match="Pass Megatron's settings as flags"):
        arguments.refuse_yaml(wants_loss=True)
    arguments.refuse_yaml(wants_loss=False)


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("", "pass --sft-data"),
        ("--sft-data x", "pass --tokenizer-model"),
        ("--sft-data x --tokenizer-model t", "pass --train-epochs"),
        ("--sft-data x --tokenizer-model t --train-epochs 1 --train-iters 3", "pass one of them"),
        ("--sft-data x --tokenizer-model t --train-epochs 0", "a whole number from 1"),
        ("--sft-data x --tokenizer-model t --train-epochs 1 --sft", "Drop --sft"),
        ("--sft-data x --tokenizer-model t --train-epochs 1 --data-path y", "drop --data-path"),
        ("--sft-data x --tokenizer-model t --train-epochs 1 --dataloader-type cyclic", "drop the flag"),
    ],
)
def test_data_refusals_name_the_remedy(line, remedy):
    with pytest.raises(arguments.ArgumentError, match=remedy):
        validate_data_arguments(parse(line, add_data_arguments))


def test_the_schedule_is_recorded_in_iterations_and_kept():
    args = validated("--sft-loss idft --idft-lambda-warmup 0.2 --idft-lambda-ramp 0.1")
    args.train_iters = 100
    schedule = arguments.resolve_schedule(args)
    assert args.idft_lambda_warmup_iters == 20
    assert args.idft_lambda_ramp_iters == 10
    args.train_iters = 1000  # a longer continuation does not stretch what the weights have seen
    assert arguments.resolve_schedule(args) == schedule


def test_every_setting_reaches_the_objective():
    line = "--sft-loss idft --idft-beta 0.5 --idft-gamma-min 0.2 --idft-gamma-max 1.5 --sft-loss-weight-floor 0.1"
    objective = arguments.build_objective(validated(line + " --sft-loss-exempt-tokens 7 8"), torch.tensor(0.25))
    assert objective.weight_floor == 0.1 and objective.exempt_token_ids == (7, 8)
    assert objective.hyperparameters == {
        "beta": 0.5,
        "gamma_min": 0.2,
        "gamma_max": 1.5,
        "gamma_lambda": torch.tensor(0.25),
        "weights": "online",
    }


@pytest.mark.parametrize(
    ("line", "hyperparameters"),
    [
        ("power --power-q 3", {"q": 3.0}),
        ("power", {"q": 0.5}),
        ("asft", {"coefficient": 0.03, "cap": 10.0}),
        ("sft_k3 --anchor-coefficient 0.5 --anchor-cap 2", {"coefficient": 0.5, "cap": 2.0}),
        ("minor_sft --minor-sft-beta 0.3", {"beta": 0.3}),
        ("asft_topk --anchor-kl-coefficient 0.4", {"coefficient": 0.4}),
        ("gift --gift-beta 5", {"beta": 5.0}),
        ("distill", {}),
        ("iw --iw-min 0.5 --iw-max 1.5", {"ratio_min": 0.5, "ratio_max": 1.5}),
        ("psft --psft-epsilon 0.3", {"epsilon": 0.3}),
    ],
)
def test_every_setting_of_an_objective_reaches_it(line, hyperparameters):
    assert arguments.build_objective(validated(f"--sft-loss {line}")).hyperparameters == hyperparameters


def test_the_table_has_the_defaults_of_the_objectives():
    for flag in OBJECTIVE_FLAGS.values():
        for objective, name in flag.hyperparameters.items():
            assert inspect.signature(getattr(objectives, objective)).parameters[name].default == flag.default
    line = "--sft-loss idft --idft-weights reference"
    assert arguments.build_objective(validated(line)).reference_statistics == set(REFERENCE_STATISTICS)


def test_differences_from_a_checkpoint_are_named():
    then, now = validated("--sft-loss idft --idft-beta 2"), validated("--sft-loss idft")
    assert arguments.differences_from_checkpoint(now, then) == ["--idft-beta: 2.0 in the checkpoint, 1.0 now"]
    older = argparse.Namespace(**vars(now))
    del older.power_q, older.sft_loss_head, older.sft_loss_chunk_tokens  # before there were these flags
    assert arguments.differences_from_checkpoint(now, older) == []
    fused = validated("--sft-loss idft --sft-loss-head fused --sft-loss-chunk-tokens 64")
    assert arguments.differences_from_checkpoint(fused, now) == [
        "--sft-loss-head: materialized in the checkpoint, fused now",
        "--sft-loss-chunk-tokens: None in the checkpoint, 64 now",
    ]
    other = validated("--sft-loss ce")
    assert arguments.differences_from_checkpoint(now, other) == ["--sft-loss: ce in the checkpoint, idft now"]
    assert arguments.differences_from_checkpoint(now, argparse.Namespace())[0].startswith("--sft-loss: None")
    other.sft_normalization, other.sft_normalization_constant = ["token", "sample@2"], None
    assert len(arguments.differences_from_checkpoint(now, other)) == 1, "`run` has no such flag"
    now.sft_normalization, now.sft_normalization_constant = ["constant"], 4
    assert arguments.differences_from_checkpoint(now, other)[1:] == [
        "--sft-normalization: token sample@2 in the checkpoint, constant now",
        "--sft-normalization-constant: None in the checkpoint, 4 now",
    ], "whatever the objectives are"
    now.sft_normalization, now.sft_normalization_constant = ["token"], None
    assert arguments.differences_from_checkpoint(now, older) == [], "older checkpoints were per trained token"


def test_exempt_tokens_are_ids_or_names():
    def resolve(*tokens: int | str) -> list[int]:
        return arguments.resolve_exempt_tokens(tokens, lambda: [5, 6], {"<|im_end|>": 6, "<|x|>": 9})

    assert resolve() == [] and resolve(7, "end-of-turn", "<|im_end|>", "<|x|>", 7) == [7, 5, 6, 9]
    with pytest.raises(
        arguments.ArgumentError, match=r"end-of-turn`.*text of a special token \(<\|im_end\|>, <\|x\|>\)"
    ):
        resolve("eos" * 1000)
    with pytest.raises(arguments.ArgumentError, match="not known; pass its token id"):
        arguments.resolve_exempt_tokens(["end-of-turn"], lambda: [], {})
    args = validated("--sft-loss idft --sft-loss-exempt-tokens end-of-turn 7")
    assert args.sft_loss_exempt_tokens == ["end-of-turn", 7]
    assert arguments.build_objective(args).exempt_token_ids == (7,), "names wait for the tokenizer"


def test_logits_of_another_type_than_the_models_need_transformer_engine(monkeypatch):
    """--output-logit-dtype, which came with Megatron 0.20."""

    def check(asked, cpu=True, bf16=True):
        flag_checks.check_logits(argparse.Namespace(logit_dtype=asked, bf16=bf16, fp16=False, cpu=cpu))

    with pytest.raises(ArgumentError, match="--output-logit-dtype fp32 needs the matrix product of Transformer Engine"):
        check("fp32")
    for asked, bf16 in ((None, True), ("bf16", True), ("fp32", False)):
        check(asked, bf16=bf16)
    flag_checks.check_logits(argparse.Namespace())  # of 0.19
    for there in (False, True):
        monkeypatch.setattr(flag_checks, "find_gpu_libraries", lambda importing, there=there: GPULibraries(there))
        with nullcontext() if there else pytest.raises(ArgumentError):
            check("fp32", cpu=False)
