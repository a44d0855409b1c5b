"""`convert check`: what it says of a model's folder, and of the inputs that a program's flags name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_idft.checkpoint.input_check import check_inputs
from megatron_idft.cli.convert import main
from megatron_idft.errors import InputError, UserError
from tests.launch import ROOT


def test_a_folder_that_converts(converted, capsys):
    for name, model in converted.items():
        assert main(["check", str(model.huggingface)]) == 0
        assert f"{model.huggingface}: {name.partition('-')[0]}, 4 layers" in capsys.readouterr().out


def test_what_is_wrong_is_said_without_reading_weights(converted, tmp_path):
    folder = shutil.copytree(converted["qwen3"].huggingface, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"missing \(11\):\n  - model.layers.4"):
        main(["check", str(folder)])
    assert main(["check", str(folder), "--config-only"]) == 0
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="model_type null"):
        main(["check", str(folder), "--config-only"])
    with pytest.raises(InputError, match="is not a folder"):
        main(["check", str(folder / "config.json")])


def test_the_flags_of_a_program(converted, tmp_path):
    model = str(converted["qwen2"].huggingface)  # 4 heads in 2 groups, 128 positions
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "packs.json").touch()
    here = str(tmp_path)
    good = f"--cpu --hf-model={model} --tensor-model-parallel-size 2 --seq-length 128 --sft-data {here}/packs:0.5"
    good += f" --lr 1e-5 --sft-valid-data math={here}/a.jsonl {here}/packs --load /elsewhere/ckpt --bf16"
    assert len(check_inputs(good.split())) == 1
    away = check_inputs(
        ["--hf-model", "/elsewhere/m", "--data", "/elsewhere/a.jsonl", "--tokenizer-model", "/elsewhere/t"]
    )
    assert len(away) == 3 and all("not seen from here" in line for line in away)
    for words, told in (
        (f"--hf-model {model} --tensor-model-parallel-size 3", "does not divide the 4 attention heads"),
        (f"--hf-model {model} --tensor-model-parallel-size two", "pass a whole number from 1"),
        (f"--hf-model {model} --seq-length 129", "more than the 128 positions"),
        ("--num-attention-heads 9 --tensor-model-parallel-size 2", "does not divide the 9 attention heads"),
        (
            "--num-attention-heads 12 --num-query-groups 3 --tensor-model-parallel-size 2",
            "does not fit the 3 query groups",
        ),
        (f"--data {here}/a.jsonl {here}/b.jsonl", f"--data: there is no {here}/b.jsonl"),
        (f"--sft-valid-data math={here}/b.jsonl", "--sft-valid-data: there is no"),
        (f"--tokenizer-model {here}/packs", "--tokenizer-model: there is no"),
    ):
        with pytest.raises(UserError, match=told):
            check_inputs(words.split())


def test_neither_torch_nor_megatron_is_imported(converted):
    code = "import sys; from megatron_idft.cli.convert import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "check", str(converted["qwen3_moe"].huggingface)]
    done = subprocess.run(command, cwd=Path(ROOT), capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr
