"""Megatron computes the real model's logits as transformers does, in fp32, with all 30 layers."""

import pytest
import torch

from tests.real.logits import assert_same_logits, megatron_logits

LENGTH = 96
LAYOUTS = {
    "TP 1": (1, ""),
    "TP 3": (3, "--tensor-model-parallel-size 3"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def tokens(records, tokenizer) -> torch.Tensor:
    """[2, LENGTH]: the beginnings of two conversations."""
    rendered = (tokenizer.apply_chat_template(r["messages"], return_dict=True)["input_ids"] for r in records)
    return torch.tensor([ids[:LENGTH] for ids in rendered if len(ids) >= LENGTH][:2])


@pytest.fixture(scope="module")
def expected(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers(megatron, model_flags, tokens, expected, layout, tmp_path):
    nproc, flags = LAYOUTS[layout]
    got = megatron_logits(megatron, model_flags, tokens, tmp_path, flags, nproc)
    assert_same_logits(got, expected, layout)
