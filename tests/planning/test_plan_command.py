"""`megatron-idft plan` from outside: the trainer's own flags, published models, exit codes, warnings, layouts."""

import json
import shlex

import pytest

from tests.planning.plans import plans

TRAINING = (
    " --seq-length 4096 --micro-batch-size 1 --global-batch-size 128 --train-iters 100 --lr 1e-5 --bf16"
    " --use-distributed-optimizer --sft-loss idft"
)
# Shapes from the config.json of each model, and the number of parameters that its publisher states.
MODELS = {
    "Llama-3-8B": (
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
         "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        8_030_261_248,
    ),
    "Llama-3-70B": (
        {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
         "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
         "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        70_553_706_496,
    ),
    "Qwen2.5-7B": (
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
         "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1000000.0,
         "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        7_615_616_512,
    ),
    "Qwen3-30B-A3B": (
        {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
         "rope_theta": 1000000.0, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
         "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
         "decoder_sparse_step": 1, "mlp_only_layers": []},
        30_532_122_624,
    ),
}  # fmt: skip
SMALL = (
    "--num-layers 4 --hidden-size 512 --num-attention-heads 8 --max-position-embeddings 4096 --vocab-size 1000"
    " --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear" + TRAINING
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    calls = []
    for name, (config, _) in MODELS.items():
        (folder / name).mkdir()
        defaults = {"hidden_act": "silu", "torch_dtype": "bfloat16", "attention_dropout": 0.0}
        (folder / name / "config.json").write_text(json.dumps(defaults | config))
        calls.append(shlex.split(f"--gpus 64 --hf-model {folder / name} {TRAINING}"))
    return dict(zip(MODELS, plans(folder, *calls), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_that_the_publisher_states(published, name):
    answer = published[name]
    assert answer["code"] in (0, 1), answer["err"]
    assert answer["plan"]["parameters"]["model"] == MODELS[name][1]


def test_the_verdict_is_the_exit_code_and_layouts_that_fit_are_named(published):
    small, large = published["Llama-3-8B"], published["Llama-3-70B"]
    assert small["code"] == 0
    assert large["code"] == 1
    assert small["plan"]["fits"] and "\nfits" in f"\n{small['out']}" and not large["plan"]["fits"]
    assert "\nDOES NOT FIT" in f"\n{large['out']}"
    assert "does not fit" in [caution["key"] for caution in large["plan"]["warnings"]]
    layouts = large["plan"]["layouts_that_fit"]["layouts"]
    room = large["plan"]["memory"]["limit"] - large["plan"]["memory"]["reserve"]
    assert len(layouts) == 5 and all(layout["bytes"] <= room for layout in layouts)
    assert layouts[0]["share"] <= 0.9
    assert "--tensor-model-parallel-size" in layouts[0]["flags"]


def test_a_layout_that_is_shown_plans_as_it_says(published, tmp_path):
    """Its flags, pasted, give the same bytes: for a dense model, and for one with experts."""
    for name in ("Llama-3-70B", "Qwen3-30B-A3B"):
        first = published[name]["plan"]["layouts_that_fit"]["layouts"][0]
        kept = TRAINING.replace("--micro-batch-size 1", "").replace("--use-distributed-optimizer", "").split()
        folder = published[name]["plan"]["inputs"]  # the model's inputs are those of the plan itself
        assert folder["layout"]["gpus"] == 64
        config = tmp_path / name
        config.mkdir()
        defaults = {"hidden_act": "silu", "torch_dtype": "bfloat16", "attention_dropout": 0.0}
        (config / "config.json").write_text(json.dumps(defaults | MODELS[name][0]))
        (again,) = plans(tmp_path, ["--gpus", "64", "--hf-model", str(config), *kept, *first["flags"]])
        assert again["code"] == 0, again["err"]
        assert again["plan"]["memory"]["worst_bytes"] == first["bytes"]


def test_flops_are_megatrons_and_tokens_a_day_follow(published):
    numbers = published["Llama-3-8B"]["plan"]
    speed, machine = numbers["speed"], numbers["machine"]
    # 6 flops for each weight of a matrix and token, and 6 s h (causal) for the scores of each layer.
    matrices = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    expected = 6 * matrices + 6 * 4096 * 4096 * 32
    assert speed["flops_per_token"] == pytest.approx(expected, rel=1e-3)
    assert machine["efficiency"] == 0.4 and machine["peak"] == 989e12
    assert speed["tokens_per_day"] == pytest.approx(86400 * 64 * 0.4 * 989e12 / speed["flops_per_token"])


def test_refusals_and_warnings(tmp_path):
    (tmp_path / "packs.json").write_text(json.dumps({"packs": 1000}))
    calls = {
        "no gpus": SMALL,
        "unknown flag": f"--gpus 8 {SMALL} --no-such-flag 1",
        "no multiple": f"--gpus 8 {SMALL.replace('size 128', 'size 129')}",
        "uneven": f"--gpus 9 {SMALL.replace('size 128', 'size 126')} --pipeline-model-parallel-size 3",
        "not counted": f"--gpus 8 {SMALL} --mtp-num-layers 1",
        "symbol": f"--gpus 8 {SMALL.replace('--num-layers 4', '--hybrid-layer-pattern=M-*-')}",
        "conflict": f"--gpus 8 {SMALL} --cross-entropy-loss-fusion",
        "packs": f"--gpus 8 {SMALL.replace('--train-iters 100', '--train-epochs 3')} --tokenizer-model none"
        f" --sft-data {tmp_path}/packs:0.5",
        "warned": f"--gpus 32 --gpus-per-node 4 -- {SMALL.replace('size 128', 'size 3')}"
        " --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --group-query-attention"
        " --num-query-groups 2",
        "cpu": f"--gpus 2 --cpu {SMALL}",
        "bf16": f"--gpus 8 {SMALL}",
        "fp8": f"--gpus 8 {SMALL} --fp8-format hybrid",
        "fp8 weights": f"--gpus 8 {SMALL} --fp8-format e4m3 --fp8-recipe blockwise --fp8-param-gather",
        "fp8 local": f"--gpus 8 {SMALL} --fp8-format hybrid --transformer-impl local",
        "fp4": f"--gpus 8 {SMALL} --fp4-format e2m1",
        "too small": f"--gpus 1 --gpu-memory-gib 6.2 {SMALL.replace('--use-distributed-optimizer', '')}",
    }
    answers = dict(zip(calls, plans(tmp_path, *calls.values()), strict=True))
    expected = {
        "no gpus": "--gpus N",
        "unknown flag": "--no-such-flag",
        "no multiple": "--global-batch-size 129",
        "uneven": "layers",
        "not counted": "--mtp-num-layers",
        "symbol": "'M' in --hybrid-layer-pattern",
        "conflict": "--cross-entropy-loss-fusion",
        "fp8 local": "--fp8-format (without Transformer Engine's layers)",
        "fp4": "--fp4-format",
    }
    for name, text in expected.items():
        assert answers[name]["code"] == 2 and text in answers[name]["err"], (name, answers[name]["err"])
        assert answers[name]["plan"] is None and len(answers[name]["err"].splitlines()) == 1
    keys = {caution["key"] for caution in answers["warned"]["plan"]["warnings"]}
    assert keys >= {
        "tensor parallel across nodes",
        "more tensor parallel ranks than query groups",
        "no sequence parallelism",
        "fewer micro-batches than stages",
        "pipeline bubble",
        "padded vocabulary",
        "CUDA_DEVICE_MAX_CONNECTIONS",
    }
    assert answers["warned"]["plan"]["batch"]["pipeline_bubble"] == pytest.approx(3 / (3 + 3))
    assert answers["packs"]["plan"]["batch"]["iterations"] == 12  # ceil(1000 / 2 x 3 / 128)
    assert answers["cpu"]["code"] == 0 and answers["cpu"]["plan"]["memory"]["limit"] is None
    assert not answers["cpu"]["plan"]["inputs"]["implementation"]["transformer_engine"]
    bf16, fp8, weights = (answers[name]["plan"]["memory"]["stages"][0] for name in ("bf16", "fp8", "fp8 weights"))
    assert fp8["items"]["activations"] == weights["items"]["activations"] < bf16["items"]["activations"]
    assert fp8["items"]["weights"] > weights["items"]["weights"] == bf16["items"]["weights"]
    assert "FP8" in {caution["key"] for caution in answers["fp8"]["plan"]["warnings"]}
    assert answers["too small"]["code"] == 1
