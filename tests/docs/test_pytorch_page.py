"""The program on docs/pytorch.md runs, without Megatron, and trains what it says."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny_tokenizers import byte_level

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pytorch.md"


def program() -> str:
    """The page's block that is a whole program."""
    (block,) = (block for block in re.findall(r"(?s)```python\n(.*?)```", PAGE.read_text()) if "sys.argv" in block)
    return block


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama with its tokenizer, and eight records."""
    folder = tmp_path_factory.mktemp("llama")
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    records = [{"prompt": f"What is {i} + {i}?", "response": f"It is {2 * i}."} for i in range(8)]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_program_of_the_page_trains_two_steps(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tune.py", str(folder), str(folder / "records.jsonl"), str(tmp_path)])
    names: dict = {"__name__": "__main__"}
    exec(compile(program(), str(PAGE), "exec"), names)

    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 2
    start = LlamaForCausalLM.from_pretrained(folder)
    total = trained = 0.0
    for record in names["trainer"].train_dataset:  # the first step sees all of them
        ids, labels = (torch.tensor(record[key]) for key in ("input_ids", "labels"))
        log_prob = start(ids[None]).logits[0, :-1].log_softmax(-1)
        kept = labels[1:] >= 0
        total -= log_prob.gather(-1, ids[1:, None])[kept].sum().item()
        trained += kept.sum().item()
    assert losses[0] == pytest.approx(total / trained, rel=1e-3)
    assert LlamaForCausalLM.from_pretrained(tmp_path).num_parameters() == start.num_parameters()

    logits = torch.randn(1, 5, 11, requires_grad=True)
    labels = torch.tensor([[-100, 3, 4, -100, 5]])
    names["idft_loss"](type("Outputs", (), {"logits": logits}), labels).backward()
    p = logits.detach().softmax(-1)[0]
    for position, label in ((0, 3), (1, 4), (3, 5)):
        entropy = -(p[position] * p[position].log()).sum()
        weight = p[position, label] ** (-(p[position, label].log() + entropy)).exp().clamp(0.1, 2)
        expected = weight * (p[position] - torch.nn.functional.one_hot(torch.tensor(label), 11)) / 3
        torch.testing.assert_close(logits.grad[0, position], expected)
    assert logits.grad[0, [2, 4]].abs().sum() == 0
