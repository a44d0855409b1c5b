"""tools/vllm_rollouts.py around vLLM and, where VLLM_PYTHON names an interpreter that has it, with it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_idft.cli import main
from megatron_idft.hinted_decoding.output.results import read_outcomes
from tests.data.chat_templates import CHATML
from tests.launch import ROOT, forked
from tests.tiny_models import build
from tests.tiny_tokenizers import save_tokenizer

PROGRAM = ROOT / "tools" / "vllm_rollouts.py"
ANALYSIS = "marker: # CoT\n---\n{{ question }} {{ solution }} # CoT\n"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("vllm_rollouts", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Records, a tokenizer, and the prompts of two stages."""
    folder = tmp_path_factory.mktemp("vllm")
    save_tokenizer(folder / "model", CHATML)
    lines = [{"id": f"r{i}", "prompt": f"{i} + {i}?", "response": f"\\boxed{{{2 * i}}}"} for i in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "hint.txt").write_text(ANALYSIS)
    words = [*flags(folder), "--tokenizer-model", str(folder / "model"), "--output", str(folder / "prompts.jsonl")]
    assert main(["realign", "prompts", *words]) == 0
    return folder


def flags(folder: Path) -> list[str]:
    words = f"--sft-data {folder / 'data.jsonl'} --seq-length 200 --max-new-tokens 24 --analysis-max-tokens 20"
    return (
        f"{words} --rollout-temperature 0 --rollout-samples 2 --more-room 1 --hint-prompt {folder / 'hint.txt'}".split()
    )


def answered(folder: Path, program, count: int) -> list[dict]:
    """Lines as the program writes them."""
    header = program.read_header(folder / "prompts.jsonl")
    sampling = {name: header["sampling"]["own"][name] for name in ("temperature", "top_p", "top_k")}
    made = {"tokenizer_fingerprint": header["tokenizer_fingerprint"], "sampling": sampling, "model": "model"}
    rows = list(program.read_prompts(folder / "prompts.jsonl", "own"))[:count]
    identity = [{"id": row["id"], "turn": row["turn"], "prompt_sha256": row["prompt_sha256"]} for row in rows]
    return [one | {"responses": ["a", "b"], "token_ids": [[1], [2]]} | made for one in identity]


def write(path: Path, lines: list[dict], more: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + more)
    return path


def run(program, monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm_rollouts.py", *words])
    program.main()


def words_of(folder: Path, output: Path, more: str = "") -> list[str]:
    words = f"{folder / 'prompts.jsonl'} --model {folder / 'model'} --stage own --output {output} {more}"
    return words.split()


def test_what_is_answered_is_not_asked_again_and_a_torn_line_is(folder, program, monkeypatch, tmp_path, capsys):
    torn = write(tmp_path / "a.jsonl", lines := answered(folder, program, 4), '{"id": "torn')
    run(program, monkeypatch, *words_of(folder, torn))
    assert "4 prompts are answered, 0 to go" in capsys.readouterr().out
    assert [json.loads(line) for line in torn.read_text().splitlines()] == lines  # without vLLM: nothing was to do
    part = write(tmp_path / "b.jsonl", lines[:1])
    sys.modules.pop("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError):
        run(program, monkeypatch, *words_of(folder, part))
    assert "1 prompts are answered, 3 to go" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "more", "what"),
    [
        ({"sampling": {"temperature": 0.5}}, "", "line 1: its sampling is"),
        ({"tokenizer_fingerprint": "0"}, "", "line 1: its tokenizer_fingerprint is 0"),
        ({}, "--samples 3", "line 1: 2 samples, now 3: name another --output"),
        ({"prompt_sha256": "0"}, "", "another prompt of record r0"),
        ({}, "--batch 0", "--batch 0: pass a whole number from 1"),
        ({}, "--output /proc/nowhere/a.jsonl", "name a file that can be written"),
    ],
)
def test_an_output_of_other_prompts_is_not_continued(
    folder, program, monkeypatch, tmp_path, capsys, change, more, what
):
    output = write(tmp_path / "a.jsonl", [answered(folder, program, 1)[0] | change])
    before = output.read_text()
    with pytest.raises(SystemExit) as ended:
        run(program, monkeypatch, *words_of(folder, output, more))
    assert what in f"{ended.value} {capsys.readouterr().err}" and output.read_text() == before


def test_a_file_that_holds_no_prompts_is_named(folder, program, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no header of `megatron-idft realign prompts`"):
        run(program, monkeypatch, str(folder / "data.jsonl"), *words_of(folder, tmp_path / "a.jsonl")[1:])


def test_each_request_has_a_seed_of_its_own_that_stays(folder, program):
    header = program.read_header(folder / "prompts.jsonl")
    rows = [*program.read_prompts(folder / "prompts.jsonl", "own")]
    rows += program.read_prompts(folder / "prompts.jsonl", "analysis")
    seeds = [program.seed_of(header, row) for row in rows]
    assert len(set(seeds)) == 8 and all(0 <= seed < 2**31 for seed in seeds)
    assert program.seed_of(header | {"seed": header["seed"] + 1}, rows[0]) != seeds[0]
    assert seeds[0] == 503779841  # of another version of the program too


def test_vllm_draws_the_tokens_that_the_engine_draws(folder, tmp_path):
    """Greedily: the same texts with the same log probabilities, whoever decoded them."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("vLLM was not run: set VLLM_PYTHON to the interpreter of an environment that has it")
    rows = json.loads((folder / "prompts.jsonl").read_text().splitlines()[0])["vocab_size"]
    build("qwen3", vocab_size=rows, head_dim=32, max_position_embeddings=256).save_pretrained(folder / "model")
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""}
    files = {}
    for stage, kind in (("own", "rollouts"), ("analysis", "analyses")):
        files[kind] = tmp_path / f"{kind}.jsonl"
        words = words_of(folder, files[kind], f"--dtype float32 --batch 3 --stage {stage}")
        done = subprocess.run(
            [python, str(PROGRAM), *words, "--engine-args", '{"enforce_eager": true}'],
            env=environment, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0 and "4 of 4 prompts answered" in done.stdout, done.stderr[-3000:]
    common = [*flags(folder), "--cpu", "--hf-model", str(folder / "model"), "--kv-memory-gb", "0.1"]
    given = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    found = []
    for name, more in (("ours", []), ("theirs", given)):
        said = forked(["-m", "megatron_idft", "realign", *common, *more, "--output", str(tmp_path / name)])
        found.append(list(read_outcomes(tmp_path / name)))
    assert "for 4 of 4 records" in said and "name no tokenizer" not in said
    for ours, theirs in zip(*found, strict=True):
        assert theirs["status"] == ours["status"] != "error"
        [ours], [theirs] = ours["turns"], theirs["turns"]
        assert [hint["analysis_text"] for hint in ours["hints"]] == [hint["analysis_text"] for hint in theirs["hints"]]
        assert len(ours["candidates"]) == len(theirs["candidates"]) >= 2
        for one, other in zip(ours["candidates"], theirs["candidates"], strict=True):
            for name in ("stage", "text", "num_tokens", "finish_reason"):
                assert one[name] == other[name]
            assert other["log_prob_sum"] == pytest.approx(one["log_prob_sum"], rel=1e-4)
