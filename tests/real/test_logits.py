"""Megatron computes the real model's logits as transformers does, in fp32, with all 30 layers."""

import json

import pytest
import torch

from tests.launch import ROOT, forked

LENGTH = 96
LAYOUTS = {
    "TP 1": (1, ""),
    "TP 3": (3, "--tensor-model-parallel-size 3"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def tokens(records, tokenizer) -> list[list[int]]:
    """[2, LENGTH]: the beginnings of two conversations."""
    rendered = (tokenizer.apply_chat_template(r["messages"], return_dict=True)["input_ids"] for r in records)
    return [ids[:LENGTH] for ids in rendered if len(ids) >= LENGTH][:2]


@pytest.fixture(scope="module")
def expected(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers(megatron, tokens, expected, layout, tmp_path):
    nproc, flags = LAYOUTS[layout]
    model = json.loads((megatron / "conversion.json").read_text())["megatron_flags"]
    case = {"flags": [*model, "--seq-length", str(LENGTH), "--load", str(megatron)], "tokens": tokens}
    (tmp_path / "cases.json").write_text(json.dumps({"logits": case}))
    script = ROOT / "tests" / "checkpoint" / "logits.py"
    log = forked([script, tmp_path / "cases.json", tmp_path, *flags.split()], nproc=nproc)
    assert "load_return" not in log, "Megatron found keys missing and went on without"
    got = torch.load(tmp_path / "logits.pt")
    assert got.shape == expected.shape and expected.std() > 0.5, "logits that are all alike would prove nothing"
    difference = (got - expected).abs().max().item()
    print(f"{layout}: {difference:.1e} at most, of logits up to {expected.max():.0f}")
    # Rounding alone: these logits in fp32 are up to 1.0e-4 away from those in float64.
    assert difference < 1e-4, f"{layout}: the logits differ by {difference:.1e} at most"
