"""The example of anchored objectives from its scores to its table, with the real model's first two layers."""

import json
import os
import re
import subprocess

import pytest

from tests.launch import ROOT, forked_codes, forking_python
from tests.run_outputs import load_scalars
from tests.tiny_corpora import write_records

SCRIPT = ROOT / "examples" / "reference" / "run.sh"
OBJECTIVES = ("ce", "prift", "asft", "asft_topk")
SIZES = {"PROBLEMS": "64", "STEPS": "3", "OBJECTIVES": " ".join(OBJECTIVES)}


@pytest.fixture(scope="module")
def example(shallow, tmp_path_factory):
    """Its folder and what it printed."""
    out = tmp_path_factory.mktemp("reference") / "out"
    keep = out.with_name("keep.jsonl")  # in the place of answers: a model of two layers ends none
    write_records(keep, [{"prompt": "Where is the sea?", "response": "Behind the hills."}])
    environment = os.environ | SIZES | {"MODEL": str(shallow), "KEEP": str(keep), "PYTHON": forking_python()}
    command = ["bash", SCRIPT, "--out", out]
    first, again = (
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        for _ in range(2)
    )
    assert first.returncode == again.returncode == 0, first.stdout + first.stderr + again.stdout + again.stderr
    assert "step 3 of 3: " in first.stdout and "step 3 of 3: " not in again.stdout  # nothing is done twice
    return out, again.stdout


def test_every_training_begins_at_the_reference_and_leaves_it(example):
    """The reference is the model that training begins with: score, prepare and the first step agree about it."""
    out, printed = example
    for name in OBJECTIVES:
        scalars = load_scalars(out / name / "tensorboard")
        ratio, k3 = scalars["reference/log ratio mean"], scalars["reference/k3"]
        assert sorted(ratio) == [1, 2, 3]
        assert abs(ratio[1]) < 1e-4 and abs(k3[1]) < 1e-6, name
        assert k3[3] > 100 * abs(k3[1]), name
        row = re.search(rf"^ +{name} +([\d.]+) +([\d.]+) ", printed, re.MULTILINE)
        assert row is not None, printed
        assert float(row[1]) == pytest.approx(scalars["lm loss validation-problems"][3], abs=1e-4)
        assert float(row[2]) == pytest.approx(scalars["lm loss validation-answers"][3], abs=1e-4)


def test_the_columns_have_the_size_that_is_printed(example):
    out, printed = example
    tokens = json.loads((out / "packs" / "train.json").read_text())["tokens"]
    columns = dict(re.findall(r"packs/train\.(reference\S*)\.bin: \d+ bytes, (\d+) for each of", printed))
    assert columns == {"reference": "4", "reference_top": "80", "reference_top_ids": "80"}
    for name, width in columns.items():
        assert (out / "packs" / f"train.{name}.bin").stat().st_size == int(width) * tokens


@pytest.mark.parametrize(
    ("data", "flags", "said"),
    [
        ("train", ["--chat-template", "plain"], "made with another tokenizer or chat template"),
        ("validation", [], "validation.jsonl, line "),
    ],
)
def test_scores_of_something_else_are_refused(example, shallow, data, flags, said, tmp_path):
    out, _ = example
    command = ["-m", "megatron_idft", "prepare", "--tokenizer-model", shallow, "--output", tmp_path / "packs"]
    command += ["--sft-data", out / "problems" / f"{data}.jsonl", "--seq-length", 160, "--sft-truncation", "drop"]
    codes, text = forked_codes([*command, "--sft-reference", out / "scores", *flags], alone=True)
    assert codes[0] != 0 and said in text, text
    assert not (tmp_path / "packs.json").exists()
