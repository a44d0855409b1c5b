"""Every parallel layout trains the same model: loss, metrics, gradient norm and weights agree with one process.

One process trains one iteration and saves. The reference continues it on one process for five steps, every layout under
its own, so the steps also cross a resharded resume. Prompts have lengths of their own, so data- and context-parallel
ranks train different numbers of tokens: a normaliser that is off by one token cannot pass.
"""

from pathlib import Path

import pytest
import torch

from tests.launch import forked
from tests.run_outputs import load_scalars, load_weights

HERE = Path(__file__).parent
STEPS = range(2, 7)
COMPARED = ("grad-norm", "lm loss", "sft loss", "ddt/phi mean", "ddt/entropy", "idft/gamma mean", "trained tokens")
# Gradients of the same tokens are summed in another order; nothing else may differ.
RTOL = 1e-5

COMMON = """
    --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2
    --global-batch-size 8 --train-iters 6 --lr 1e-3 --lr-decay-style constant --hidden-dropout 0 --attention-dropout 0
    --vocab-size 127 --make-vocab-size-divisible-by 64 --eval-interval 100 --eval-iters 0
    --log-interval 1 --tensorboard-log-interval 1 --ckpt-format torch_dist
    --sft-loss idft --idft-lambda-ramp 0.5 --sft-loss-weight-floor 0.01
"""

MODELS = {
    # 127 tokens over 128 columns: padding is in play; four layers, so that two stages can hold two chunks each.
    "gpt": "--num-layers 4 --position-embedding-type rope",
    "gpt with mtp": "--num-layers 2 --position-embedding-type rope --mtp-num-layers 1"
    " --untie-embeddings-and-output-weights",
    "gpt with distributed optimizer": "--num-layers 2 --position-embedding-type rope --use-distributed-optimizer",
    "gpt moe": "--num-layers 2 --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
    " --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope",
    "hybrid": "--hybrid-layer-pattern *-*- --position-embedding-type rope --untie-embeddings-and-output-weights",
    "hybrid mlp": "--hybrid-layer-pattern=---- --position-embedding-type none",
}

LAYOUTS = [
    ("gpt", 2, "--tensor-model-parallel-size 2"),
    ("gpt", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    ("gpt", 2, "--pipeline-model-parallel-size 2"),
    ("gpt", 2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    ("gpt", 2, ""),  # data parallel
    ("gpt", 4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    ("gpt", 4, "--tensor-model-parallel-size 4 --make-vocab-size-divisible-by 32"),  # 128 columns again
    ("gpt with distributed optimizer", 2, ""),
    ("gpt with mtp", 2, "--tensor-model-parallel-size 2"),
    ("gpt with mtp", 2, "--pipeline-model-parallel-size 2"),
    ("gpt moe", 2, "--expert-model-parallel-size 2"),
    ("hybrid", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    ("hybrid", 2, "--pipeline-model-parallel-size 2"),
    ("hybrid mlp", 2, "--context-parallel-size 2"),
    ("hybrid mlp", 2, "--context-parallel-size 2 --sft-loss-head fused"),
    ("gpt", 4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sft-loss-head fused"),
]


# Megatron cannot cut the state of a plain optimizer anew for expert parallelism: there both runs start it afresh.
FRESH_OPTIMIZER = ("gpt moe",)


def launch(
    folder: Path, model: str, processes: int, layout: str, *more: str, script: str = "stock_pretrain.py"
) -> Path:
    folder.mkdir(exist_ok=True)
    flags = [*COMMON.split(), *MODELS[model].split(), *layout.split(), "--save", str(folder), *more]
    forked(
        ["-m", "megatron_idft", "run", HERE / script, *flags, "--tensorboard-dir", str(folder / "tensorboard")],
        nproc=processes,
    )
    return folder


def continue_from(
    start: Path, folder: Path, model: str, processes: int, layout: str, script: str = "stock_pretrain.py"
) -> Path:
    """Steps 2 to 6 from `start`'s checkpoint, under a layout."""
    load = ["--load", str(start), "--save-interval", "100"]
    if model in FRESH_OPTIMIZER:
        load += ["--no-load-optim", "--no-load-rng"]
    return launch(folder, model, processes, layout, *load, script=script)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Model -> (run that stopped after one iteration, the run that one process made of it), when first asked for."""
    made: dict[str, tuple[Path, Path]] = {}

    def reference(model: str) -> tuple[Path, Path]:
        if model not in made:
            start = launch(
                tmp_path_factory.mktemp("start"), model, 1, "", "--save-interval", "100", "--exit-interval", "1"
            )
            made[model] = start, continue_from(start, tmp_path_factory.mktemp("reference"), model, 1, "")
        return made[model]

    return reference


def assert_same_training(reference: Path, folder: Path) -> None:
    expected, got = load_scalars(reference / "tensorboard"), load_scalars(folder / "tensorboard")
    for key in COMPARED:
        for step in STEPS:
            torch.testing.assert_close(
                got[key][step],
                expected[key][step],
                rtol=RTOL,
                atol=1e-6,
                msg=lambda m, k=key, s=step: f"{k} at {s}: {m}",
            )
    weights, reference_weights = load_weights(folder, STEPS[-1]), load_weights(reference, STEPS[-1])
    assert len(reference_weights) > 5 and weights.keys() == reference_weights.keys()
    for name in weights:
        # Adam divides by the root of the second moment, so a weight whose gradient is rounding noise moves by up to
        # the learning rate in a random direction: the absolute part is 1 % of one step.
        torch.testing.assert_close(
            weights[name], reference_weights[name], rtol=RTOL, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("model", "processes", "layout"), LAYOUTS)
def test_layout_trains_like_one_process(references, tmp_path, model, processes, layout):
    start, compared = references(model)
    assert_same_training(compared, continue_from(start, tmp_path, model, processes, layout))


def test_a_normaliser_that_is_off_by_one_token_is_noticed(references, tmp_path):
    start, compared = references("gpt")
    folder = continue_from(start, tmp_path, "gpt", 2, "", script="off_by_one_pretrain.py")
    with pytest.raises(AssertionError, match="grad-norm"):
        assert_same_training(compared, folder)
