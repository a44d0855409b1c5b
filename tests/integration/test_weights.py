"""`train` with a weight for each assistant turn: the weight multiplies loss and gradient, never the normaliser."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from megatron_idft import objective_table
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.loss.arguments import DEFAULTS
from megatron_idft.integration.loss.negative_weights import check_negative_weights, fades, is_anchored
from megatron_idft.integration.training.batches import loss_func
from megatron_idft.objectives import resolve_objective
from megatron_idft.statistics import TokenStatistics
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


def train(
    tokenizer: Path, folder: Path, first: float | None, second: float | None, flags: str = ""
) -> tuple[dict[str, float], str]:
    """The scalars of one step over four conversations whose two assistant turns weigh `first` and `second`, and what
    the training said."""
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
    said = forked(["-m", "megatron_idft", "train", *words.split()])
    return {key: values[1] for key, values in load_scalars(folder).items() if 1 in values}, said


@pytest.fixture
def megatron_args(monkeypatch):
    from megatron.training import global_vars

    args = argparse.Namespace(check_for_nan_in_loss_and_grad=False)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    return args


def test_the_normaliser_is_the_number_of_trained_tokens(megatron_args):
    loss_mask = torch.tensor([[0.0, 2.0, 0.25, 1.0], [0.5, -0.0, -3.0, 0.0]])
    output = torch.tensor([[3.0, 5.0, 4.0, 1.0], [2.0, 7.0, 2.0, 9.0]], requires_grad=True)
    loss, num_tokens, report = loss_func(loss_mask, output)
    assert loss.item() == 10 + 1 + 1 + 1 - 6
    assert num_tokens.item() == 5
    assert num_tokens.dtype == torch.int32
    assert report["lm loss"].tolist() == [7.0, 5.0]
    loss.backward()
    assert torch.equal(output.grad, loss_mask)


def test_half_the_weight_is_half_the_gradient_and_the_last_turn_alone_is_a_weight_of_none(tokenizer, tmp_path):
    half, _ = train(tokenizer, tmp_path / "a", 0, 0.5)
    last, _ = train(tokenizer, tmp_path / "b", None, None, "--sft-last-turn-only")
    assert half["trained tokens"] == last["trained tokens"]
    assert half["lm loss"] == pytest.approx(0.5 * last["lm loss"], rel=1e-5)
    # What the method reports of tokens is a mean over them, whatever they weigh.
    assert half["sft loss"] == pytest.approx(last["sft loss"], rel=1e-5)
    assert half["grad-norm"] == pytest.approx(0.5 * last["grad-norm"], rel=1e-5)


def test_a_turn_of_negative_weight_is_a_trained_one_that_is_moved_away_from(tokenizer, tmp_path):
    last, _ = train(tokenizer, tmp_path / "a", 0, None)
    mixed, said = train(tokenizer, tmp_path / "b", -0.5, None, "--sft-loss ce")
    assert "have a negative weight, and the weight of ce stays where a token has become unlikely" in said
    assert "tokens of negative weight" in said and "⟧×-0.5" in said
    tokens, second = mixed["trained tokens"], last["lm loss"] * last["trained tokens"]
    first = mixed["sft loss"] * tokens - second  # the sum of cross-entropies, whatever they weigh
    assert mixed["lm loss"] == pytest.approx((second - 0.5 * first) / tokens, rel=1e-5)


def test_questions_are_trained_with_the_weight_of_prompts(tokenizer, tmp_path):
    answers, _ = train(tokenizer, tmp_path / "a", None, None, "--sft-loss ce")
    both, said = train(tokenizer, tmp_path / "b", None, None, "--sft-loss ce --sft-prompt-weight 0.2")
    assert "negative" not in said and "⟧×0.2" in said
    tokens, known = both["trained tokens"], answers["lm loss"] * answers["trained tokens"]
    assert tokens > answers["trained tokens"]
    asked = both["sft loss"] * tokens - known
    assert both["lm loss"] == pytest.approx((known + 0.2 * asked) / tokens, rel=1e-5)


# What becomes of an objective's weight as a token of negative weight becomes unlikely.
FADES, STAYS, ANCHORED = "falls to nothing", "stays", "rises, to hold the model at its reference"
OBJECTIVES = {
    **dict.fromkeys(("dft", "idft", "power", "chord", "deft", "cll", "psft"), FADES),
    **dict.fromkeys(("ce", "entropy", "prift", "iw"), STAYS),
    **dict.fromkeys(("asft", "sft_k3", "minor_sft"), ANCHORED),
}
WITH_KL = ("asft_topk", "sft_topk", "distill", "gift")


def test_the_table_names_every_objective():
    assert {*OBJECTIVES, *WITH_KL} == objective_table.OBJECTIVES.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_moving_away_from_a_token_ends_where_the_weight_fades(name):
    """Gradient descent on the logits of one token of weight -1, in float64; the reference is the beginning."""
    objective, fate = resolve_objective(name), OBJECTIVES[name]
    assert fades(objective) == (fate == FADES) and is_anchored(objective) == (fate == ANCHORED)
    spread = 0.0 if name == "entropy" else 0.5  # H falls only where the other tokens differ
    logits, onehot = torch.linspace(spread, -spread, 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)[0]
    begin, moved = logits.log_softmax(0), {}
    for step in range(4001):
        log_probs = logits.log_softmax(0)
        p = log_probs.exp()
        statistics = TokenStatistics(
            log_probs[:1], -(p * log_probs).sum()[None], torch.zeros(1, dtype=torch.int64), 8,
            max_prob=p.max()[None], sum_squared_prob=p.square().sum()[None], argmax=p.argmax()[None],
            reference_log_prob=begin[:1], reference_entropy=-(begin.exp() * begin).sum()[None],
        )  # fmt: skip
        moved[step] = log_probs[0].item()
        logits = logits + objective.weight(statistics).double() * (p - onehot)
    if fate == FADES:
        assert moved[4000] > -20 and moved[2000] - moved[4000] < 2, "twice the steps, a constant factor of p"
    else:
        assert moved[4000] < -50 and moved[4000] - moved[0] == pytest.approx(2 * (moved[2000] - moved[0]), rel=0.1)


def arguments(**values):
    flags = {"sft_loss": "idft", "sft_loss_weight_floor": 0.0, "sft_loss_exempt_tokens": [], "mtp_num_layers": None}
    return argparse.Namespace(**DEFAULTS | flags | values)


def test_a_run_says_where_moving_away_has_no_end():
    assert check_negative_weights(arguments(sft_loss=None), 0) is None
    assert check_negative_weights(arguments(), 7) is None
    for unending in (
        {"sft_loss": None},
        {"sft_loss": "entropy"},
        {"sft_loss_weight_floor": 0.01},
        {"idft_gamma_min": 0.0, "idft_gamma_max": 0.0},
        {"idft_weights": "reference"},
        {"sft_loss": "power", "power_q": 0.0},
        {"sft_loss_exempt_tokens": ["end-of-turn"]},
    ):
        assert "7 tokens" in (check_negative_weights(arguments(**unending), 7) or ""), unending
    with pytest.raises(ArgumentError, match=r"--mtp-num-layers 1: .*set the negative weights to 0"):
        check_negative_weights(arguments(mtp_num_layers=1), 7)
    for name in (*WITH_KL, *(name for name, fate in OBJECTIVES.items() if fate == ANCHORED)):
        with pytest.raises(ArgumentError, match=f"--sft-loss {name} holds the model at its reference, and 7 tokens"):
            check_negative_weights(arguments(sft_loss=name), 7)
        assert check_negative_weights(arguments(sft_loss=name), 0) is None
