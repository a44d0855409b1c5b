"""The real model from Hugging Face to Megatron and back."""

import json
import subprocess

from tests.checkpoint.test_round_trip import assert_same
from tests.launch import ROOT, forked_codes, forking_python


def convert(*words) -> subprocess.CompletedProcess[str]:
    command = [forking_python(), "-m", "megatron_idft", "convert", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_there_and_back_is_the_same_to_the_bit_and_loads_in_transformers(huggingface, megatron, tmp_path):
    from transformers import AutoModelForCausalLM

    back = tmp_path / "back"
    done = convert("to-hf", megatron, back)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(huggingface, back)
    assert json.loads((back / "config.json").read_text()) == json.loads((huggingface / "config.json").read_text())
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (back / name).read_bytes() == (huggingface / name).read_bytes(), name
    _, loading = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(loading.values()), loading


def test_two_ranks_cannot_share_nine_heads(huggingface, verb, tmp_path):
    refusal = "--tensor-model-parallel-size 2 does not divide the 9 attention heads"
    done = convert("check", huggingface, "--tensor-model-parallel-size", "2")
    assert done.returncode == 2 and refusal in done.stderr
    assert convert("check", huggingface, "--tensor-model-parallel-size", "3").returncode == 0
    (tmp_path / "data.jsonl").write_text('{"prompt": "2 + 2?", "response": "4."}\n')
    flags = f"--sft-data {tmp_path / 'data.jsonl'} --output {tmp_path / 'out'} --seq-length 128"
    codes, text = forked_codes(verb("score", *flags.split(), "--tensor-model-parallel-size", 2), nproc=2)
    assert 2 in codes and refusal in text and "Traceback" not in text
