"""`train` with a weight for each assistant turn: the weight multiplies loss and gradient, never the normaliser."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from megatron_idft.integration.training.batches import loss_func
from tests.launch import forked
from tests.run_outputs import load_scalars
from tests.tiny_tokenizers import train_tokenizer

FLAGS = """
    --num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 2 --global-batch-size 4 --position-embedding-type rope --lr 1e-3 --lr-decay-style constant
    --log-interval 1 --chat-template chatml --train-iters 1 --sft-loss idft
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def train(tokenizer: Path, folder: Path, first: float | None, second: float | None, flags: str = "") -> dict:
    """The scalars of one step over four conversations whose two assistant turns weigh `first` and `second`."""
    folder.mkdir()
    rows = []
    for a in range(3, 7):
        texts = [f"{a} + 4?", f"{a + 4}.", f"{a} + {a}?", f"it is {2 * a}."]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        messages[1]["loss"], messages[3]["loss"] = first, second
        rows.append(json.dumps({"messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(rows))
    words = (
        f"{FLAGS} --sft-data {folder / 'train.jsonl'} --tokenizer-model {tokenizer} --tensorboard-dir {folder} {flags}"
    )
    forked(["-m", "megatron_idft", "train", *words.split()])
    return {key: values[1] for key, values in load_scalars(folder).items() if 1 in values}


@pytest.fixture
def megatron_args(monkeypatch):
    from megatron.training import global_vars

    args = argparse.Namespace(check_for_nan_in_loss_and_grad=False)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    return args


def test_the_normaliser_is_the_number_of_trained_tokens(megatron_args):
    loss_mask = torch.tensor([[0.0, 2.0, 0.25, 1.0], [0.5, 0.0, 0.0, 0.0]])
    output = torch.tensor([[3.0, 5.0, 4.0, 1.0], [2.0, 7.0, 0.0, 9.0]], requires_grad=True)
    loss, num_tokens, report = loss_func(loss_mask, output)
    assert loss.item() == 10 + 1 + 1 + 1
    assert num_tokens.item() == 4
    assert num_tokens.dtype == torch.int32
    assert report["lm loss"].tolist() == [13.0, 4.0]
    loss.backward()
    assert torch.equal(output.grad, loss_mask)


def test_half_the_weight_is_half_the_gradient_and_the_last_turn_alone_is_a_weight_of_none(tokenizer, tmp_path):
    half = train(tokenizer, tmp_path / "a", 0, 0.5)
    last = train(tokenizer, tmp_path / "b", None, None, "--sft-last-turn-only")
    assert half["trained tokens"] == last["trained tokens"]
    assert half["lm loss"] == pytest.approx(0.5 * last["lm loss"], rel=1e-5)
    # What the method reports of tokens is a mean over them, whatever they weigh.
    assert half["sft loss"] == pytest.approx(last["sft loss"], rel=1e-5)
    assert half["grad-norm"] == pytest.approx(0.5 * last["grad-norm"], rel=1e-5)
