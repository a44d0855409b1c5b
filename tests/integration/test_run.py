"""`run SCRIPT.py`: scripts that know nothing of this library, real ones in its shape, in real processes."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.launch import forked, started, torchrun
from tests.run_outputs import load_scalars

HERE = Path(__file__).parent
TINY = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 2 --global-batch-size 8 --train-iters 3 --lr 1e-2 --lr-decay-style constant --vocab-size 127
    --eval-interval 3 --eval-iters 1 --log-interval 1 --position-embedding-type rope
    --hidden-dropout 0 --attention-dropout 0
"""


def run(script: Path | str, flags: str, tmp_path: Path, *more: str, launch: Callable[..., str] = forked) -> str:
    flags = f"{TINY} {flags} --tensorboard-dir {tmp_path / 'tensorboard'}"
    return launch(["-m", "megatron_idft", "run", script, *more, *flags.split()])


def failure(*args, **kwargs) -> str:
    with pytest.raises(AssertionError) as raised:
        run(*args, **kwargs)
    return str(raised.value)


def test_the_script_sees_what_python_would_show_it(tmp_path):
    # From another folder, by a relative path, as a user types it.
    script = os.path.relpath(HERE / "surroundings.py", tmp_path)
    output = torchrun(["-m", "megatron_idft", "run", script, "--theirs", "1"], cwd=tmp_path)
    seen = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert seen["argv"][:3] == [str(HERE / "surroundings.py"), "--theirs", "1"]
    assert seen["path"] == str(HERE) and seen["main"] == str(HERE / "surroundings.py") and seen["own class"]
    assert re.search(r"> megatron 0\.(19|20)\.\S+ \(core and training\) from ", output)


def test_both_ways_of_building_a_model_train_the_same(tmp_path):
    run(HERE / "stock_pretrain.py", "--sft-loss idft", tmp_path / "config")
    run(HERE / "variants.py", "--sft-loss idft", tmp_path / "provider", "model_provider")
    config, provider = (load_scalars(tmp_path / name / "tensorboard") for name in ("config", "provider"))
    for key in ("lm loss", "sft loss", "grad-norm", "lm loss validation"):
        assert config[key] == provider[key] and len(config[key]) >= 1, key


def test_values_stay_cross_entropy_and_the_flag_changes_the_gradient_only(tmp_path):
    """127 tokens in 128 columns: without padding columns in the sum, ce would be the stock loss to the bit."""
    no_padding = "--make-vocab-size-divisible-by 1"
    run(HERE / "stock_pretrain.py", f"{no_padding} --calculate-per-token-loss", tmp_path / "stock")
    run(HERE / "stock_pretrain.py", f"{no_padding} --sft-loss ce", tmp_path / "ce")
    run(HERE / "stock_pretrain.py", f"{no_padding} --sft-loss idft", tmp_path / "idft")
    stock, ce, idft = (load_scalars(tmp_path / name / "tensorboard") for name in ("stock", "ce", "idft"))
    assert not any(key.startswith(("sft", "ddt", "idft")) for key in stock)
    for step in (1, 2, 3):
        torch.testing.assert_close(ce["lm loss"][step], stock["lm loss"][step], rtol=1e-5, atol=0)
    # The same weights at first, so the same cross-entropy; from then on another gradient.
    torch.testing.assert_close(idft["lm loss"][1], stock["lm loss"][1], rtol=1e-6, atol=0)
    assert abs(idft["grad-norm"][1] / stock["grad-norm"][1] - 1) > 0.1
    assert abs(idft["lm loss"][3] / stock["lm loss"][3] - 1) > 1e-3
    assert idft["sft loss"][1] < idft["lm loss"][1]


def test_a_loss_function_that_weighs_tokens_itself_is_served_by_the_fused_head(tmp_path):
    found, outputs = [], []
    for head in ("materialized", "fused"):
        flags = f"--sft-loss idft --sft-loss-head {head}"
        outputs.append(run(HERE / "variants.py", flags, tmp_path / head, "own weights"))
        found.append(load_scalars(tmp_path / head / "tensorboard"))
    assert [output.count("so backward computes the logits again") for output in outputs] == [0, 1]
    for key in ("lm loss", "sft loss", "grad-norm", "lm loss validation"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-5) and found[1][key], key


def test_a_repeated_forward_backward_is_counted_once(tmp_path):
    run(HERE / "stock_pretrain.py", "--sft-loss idft", tmp_path / "once")
    (tmp_path / "trace").mkdir()
    run(HERE / "variants.py", f"--sft-loss idft --trace {tmp_path / 'trace'}", tmp_path / "twice", "reruns")
    traced = [json.loads(line) for line in (tmp_path / "trace" / "rank0.jsonl").read_text().splitlines()]
    assert sum(record["training"] for record in traced) == 2 * 3 * 4, "the case must run every micro-batch twice"
    once, twice = (load_scalars(tmp_path / name / "tensorboard") for name in ("once", "twice"))
    assert once["trained tokens"] == twice["trained tokens"]
    assert once["sft loss"] == twice["sft loss"]


@pytest.mark.parametrize(
    ("variant", "remedy"),
    [
        ("old loss_func", "Return (sum of losses, number of tokens as int tensor, metrics)"),
        ("own loss", "without the --sft-loss hook being called"),
    ],
)
def test_scripts_that_would_escape_the_loss_are_stopped(tmp_path, variant, remedy):
    assert remedy in failure(HERE / "variants.py", "--sft-loss idft", tmp_path, variant)


def test_without_a_mask_the_reason_for_missing_metrics_is_said_once(tmp_path):
    output = run(HERE / "variants.py", "--sft-loss idft", tmp_path, "no mask")
    assert output.count("the model is called without a loss_mask") == 1
    assert "ddt/phi mean" not in output


def test_mixed_installations_are_refused(tmp_path):
    """A checkout beside the script that has only one half of Megatron."""
    (tmp_path / "megatron" / "training").mkdir(parents=True)
    (tmp_path / "megatron" / "training" / "__init__.py").write_text("")
    script = tmp_path / "pretrain.py"
    script.write_text("import megatron.training\n")
    message = failure(script, "", tmp_path, launch=started)
    assert "two installations are mixed" in message and str(tmp_path) in message


def test_a_missing_script_is_named(tmp_path):
    assert "there is no script" in failure(tmp_path / "nowhere.py", "", tmp_path)


if "MEGATRON_LM" in os.environ:

    @pytest.mark.parametrize(
        ("script", "model"),
        [("pretrain_gpt.py", "--num-layers 2"), ("pretrain_hybrid.py", "--hybrid-layer-pattern *-*-")],
    )
    def test_megatron_lms_own_scripts(tmp_path, script, model):
        """Its scripts, unmodified, on mock data, over two tensor-parallel ranks; stock_pretrain.py has their shape."""
        flags = TINY.replace("--num-layers 2", model) + " --mock-data --tokenizer-type NullTokenizer --sft-loss idft"
        flags += f" --tensor-model-parallel-size 2 --tensorboard-dir {tmp_path / 'tensorboard'}"
        torchrun(["-m", "megatron_idft", "run", Path(os.environ["MEGATRON_LM"]) / script, *flags.split()], nproc=2)
        scalars = load_scalars(tmp_path / "tensorboard")
        assert sorted(scalars["sft loss"]) == [1, 2, 3] and scalars["lm loss validation"]
