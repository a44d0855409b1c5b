"""`score --hf-model`: per-token statistics against transformers in float64, on the same folder."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from checkpoint.test_training import ROWS, corpus  # noqa: F401  (a fixture)

from launch import forked


# transformers multiplies grouped experts in fp32 at most.
@pytest.mark.parametrize(("name", "dtype"), [("qwen2", torch.float64), ("qwen3_moe", torch.float32)])
def test_statistics_are_those_of_transformers(corpus, tmp_path, name, dtype):  # noqa: F811
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags = f"--hf-model {corpus / name} --hf-cache {tmp_path / 'cache'} --data {corpus / 'train.jsonl'}"
    flags += f" --output {tmp_path / 'out'} --seq-length 32 --per-token --tensor-model-parallel-size 2"
    forked(["-m", "megatron_idft", "score", *flags.split()], nproc=2)
    rows = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()

    model = AutoModelForCausalLM.from_pretrained(corpus / name).to(dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(corpus / name)
    lines = (corpus / "train.jsonl").read_text().splitlines()
    assert len(rows) == len(lines) and model.config.vocab_size == ROWS
    for row, line in zip(rows, lines, strict=True):
        record = json.loads(line)
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["response"]},
        ]
        ids = torch.tensor(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
        positions = torch.tensor(row["positions"])
        assert ids[positions].tolist() == row["token_ids"]
        assert tokenizer.decode(row["token_ids"]) == record["response"] + "[end]"
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, positions - 1].double().log_softmax(-1)
        log_prob = log_probs.gather(-1, ids[positions, None])[:, 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        for name_, expected in (("log_prob", log_prob), ("entropy", entropy), ("phi", log_prob + entropy)):
            torch.testing.assert_close(torch.tensor(row[name_]).double(), expected, rtol=1e-5, atol=2e-5)
