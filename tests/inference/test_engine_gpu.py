"""The decode engine on a GPU: CUDA graphs and kernels against transformers on the CPU."""

import json

import pytest
import torch

from tests.inference import reference_decoding as reference
from tests.inference import test_engine as cpu
from tests.launch import torchrun

pytestmark = pytest.mark.gpu

# Local layers: Transformer Engine is not under test here. What they need besides is added.
PLAIN = "--transformer-impl local --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tests import tiny_models

    folder = tmp_path_factory.mktemp("gpu")
    return tiny_models.save("qwen3", folder / "qwen3"), folder


def decode(model, cases, flags=""):
    _, folder = model
    (folder / "cases.json").write_text(json.dumps(cases))
    words = ["--hf-model", folder / "qwen3", "--hf-cache", folder / "cache", "--tokenizer-model", folder / "qwen3"]
    torchrun([cpu.PROBE, folder / "cases.json", folder / "out.json", *words, *PLAIN.split(), *flags.split()])
    _, found = json.loads((folder / "out.json").read_text())
    return found


def test_graphs_change_nothing_and_greedy_pairs_equal_the_reference(model):
    vocab = model[0].config.vocab_size
    both = cpu.pairs(vocab, 14)
    case = {
        "requests": both,
        "slope": cpu.SLOPE,
        "sampling": {"temperature": 0},
        "stopping": {"stop_ids": [cpu.STOP], "max_tokens": 12, "stop_on_first_token": False},
        "max_rows": 5,
    }
    paper = case | {"sampling": {"temperature": 0.3, "top_p": 0.95, "cut_before_temperature": True}}
    found = decode(model, {"graphs": case, "paper": paper, "no graphs": case | {"graphs": False}})
    logits, ties = cpu.next_logits(model[0]), 0
    for request, got, without in zip(both, found["graphs"], found["no graphs"], strict=True):
        wanted = cpu.expected(logits, vocab, request, follow=got["tokens"])
        ties += len(wanted.near_ties)
        cpu.assert_same(got, wanted)
        assert got["tokens"] == without["tokens"]
    for request, got in zip(both, found["paper"], strict=True):
        wanted = cpu.expected(logits, vocab, request, follow=got["tokens"], **paper["sampling"])
        ties += len(wanted.near_ties)
        cpu.assert_same(got, wanted)
    assert ties <= 3


def test_bf16_follows_the_reference_where_it_is_sure(model):
    """Rounding moves near ties alone: of the tokens with a clear margin, all agree until the first that has none."""
    vocab = model[0].config.vocab_size
    both = cpu.pairs(vocab, 14)
    stopping = {"stop_ids": [], "max_tokens": 12, "stop_on_first_token": False}
    case = {"requests": both, "hint_share": 1.0, "sampling": {"temperature": 0}, "stopping": stopping}
    found = decode(model, {"bf16": case}, "--bf16")["bf16"]
    logits, checked = cpu.next_logits(model[0]), 0
    for request, got in zip(both, found, strict=True):
        for step, token in enumerate(got["tokens"]):
            scores = reference.log_softmax(logits([*request["hinted"], *got["tokens"][:step]]))
            best, second = torch.tensor(scores).topk(2).values.tolist()
            if best - second > 0.5:
                assert token == scores.argmax()
                checked += 1
    assert checked > 20
