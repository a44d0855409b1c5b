"""`score --hf-model`: per-token statistics against transformers in float64, on the same folder."""

import json
import os
import pickle
import shutil

import pyarrow.parquet as pq
import pytest
import torch

from megatron_idft.checkpoint.convert import to_megatron
from tests.checkpoint.test_training import ROWS, corpus  # noqa: F401  (a fixture)
from tests.checkpoint.test_unpickling import Call
from tests.launch import forked, forked_codes


# transformers multiplies grouped experts in fp32 at most.
@pytest.mark.parametrize(("name", "dtype"), [("qwen2", torch.float64), ("qwen3_moe", torch.float32)])
def test_statistics_are_those_of_transformers(corpus, tmp_path, name, dtype):  # noqa: F811
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shutil.copytree(corpus / name, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"strange": 7, "unsloth_version": "2025.3"}))
    flags = (
        f"--hf-model {folder} --ignore-config strange --hf-cache {tmp_path / 'cache'} --data {corpus / 'train.jsonl'}"
    )
    flags += f" --output {tmp_path / 'out'} --seq-length 32 --per-token --tensor-model-parallel-size 2"
    output = forked(["-m", "megatron_idft", "score", *flags.split()], nproc=2)
    assert output.count("ignored by --ignore-config: strange") == 1 == output.count("model computes: unsloth_version")
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


@pytest.mark.parametrize("verb", ["score", "realign"])
def test_a_damaged_or_crafted_checkpoint_is_refused(corpus, tmp_path, verb):  # noqa: F811
    """By `--load`, on two ranks: what `train` and `convert to-hf` refuse."""
    checkpoint = tmp_path / "megatron"
    to_megatron(corpus / "qwen2", checkpoint, progress=False)
    model_flags = json.loads((checkpoint / "conversion.json").read_text())["megatron_flags"]
    flags = f"--load {checkpoint} --tokenizer-model {corpus / 'qwen2'} --data {corpus / 'train.jsonl'}"
    flags += f" --output {tmp_path / 'out'} --seq-length 64 --tensor-model-parallel-size 2"

    def refused(told: str) -> None:
        codes, text = forked_codes(["-m", "megatron_idft", verb, *model_flags, *flags.split()], nproc=2)
        assert any(codes) and told in text and "Traceback" not in text, text[-2000:]

    path = checkpoint / "release" / "__0_0.distcp"
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2] + bytes([sound[len(sound) // 2] ^ 1]) + sound[len(sound) // 2 + 1 :])
    refused("release/__0_0.distcp: its content has changed since it was saved")
    path.write_bytes(sound)
    mark = tmp_path / "mark"
    (checkpoint / "release" / "checksums.json").unlink()
    (checkpoint / "release" / ".metadata").write_bytes(pickle.dumps(Call(os.system, f"touch {mark}")))
    refused("it names posix.system")
    assert not mark.exists() and not list((tmp_path / "out").glob("*.parquet"))
