"""The score example: what its corpora hold, and its run.sh with tiny sizes."""

import json
import os
import random
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from tests.launch import ROOT, forking_python

FOLDER = ROOT / "examples" / "score"
sys.path += [str(FOLDER), str(FOLDER.parent)]

import additions  # noqa: E402
import corpus  # noqa: E402


@pytest.mark.parametrize("numbers", [(47, 85), (10, 10), (99, 99), (23, 41)])
def test_both_styles_give_the_right_sum(numbers):
    a, b = numbers
    own = corpus.own_answer(numbers, random.Random(0))
    equations = re.findall(r"([\d+]+)=(\d+)", own)
    assert len(equations) == 2 and own.endswith(f" sum {a + b}.")
    assert all(sum(map(int, left.split("+"))) == int(right) for left, right in equations)
    ones, tens = (int(right) for _, right in equations)
    assert 10 * tens + ones % 10 == a + b
    assert additions.foreign_answer(numbers).endswith(f" {additions.in_words(a + b)}!")


def test_numbers_in_words():
    words = {7: "seven", 13: "thirteen", 20: "twenty", 42: "forty-two", 100: "one hundred"}
    words |= {105: "one hundred five", 198: "one hundred ninety-eight"}
    assert {number: additions.in_words(number) for number in words} == words
    assert len({additions.in_words(number) for number in range(200)}) == 200


def test_the_broken_source_is_broken_in_three_ways():
    sums = [(a, 50) for a in range(10, 40)]
    long, twice, prompted = (corpus.broken_records(sums, random.Random(0))[i : i + 10] for i in (0, 10, 20))
    assert all(record["response"].count("sum") == 5 for record in long)
    answers = [(record["prompt"], record["response"]) for record in twice]
    assert answers[0::2] == answers[1::2] and len(set(answers)) == 5
    assert all(record["response"].startswith(record["prompt"]) for record in prompted)


def test_run_sh_tells_the_foreign_source_from_the_models_own(tmp_path):
    """Up to the selection, with a model of few training steps: real programs, each in a process of its own."""
    sizes = {"RECORDS": "24", "STEPS": "40", "BATCH": "16", "TUNE_STEPS": "0", "PROCESSES": "1"}
    sizes |= {"PYTHON": forking_python()}
    command = ["bash", FOLDER / "run.sh", "--out", tmp_path / "out"]

    def run(**more: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, env={**os.environ, **sizes, **more}, capture_output=True, text=True, timeout=300)

    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    out = tmp_path / "out"
    assert (out / "model" / "model.safetensors").read_bytes() == (out / "back" / "model.safetensors").read_bytes()
    assert "MODEL_FLAGS=(" in (out / "megatron" / "model_flags.sh").read_text()
    assert (out / "scores" / "report.html").stat().st_size > 0

    rows = pq.read_table(out / "scores" / "scores.parquet").to_pylist()
    mean = {
        source: [row["phi_mean"] for row in rows if row["source"] == source] for source in ("own", "foreign", "broken")
    }
    assert {source: len(values) for source, values in mean.items()} == dict.fromkeys(mean, 24)
    assert max(mean["foreign"]) < min(mean["own"]) - 1

    (scored,) = json.loads((out / "scores" / "report.json").read_text())["corpora"]
    findings = {finding["check"]: finding for finding in scored["findings"]}
    foreign = [entry["source"] for entry in findings["foreign sources"]["evidence"]["foreign"]]
    assert "foreign" in foreign and "own" not in foreign
    for check in ("truncated responses", "repeated records", "prompt in the trained text"):
        assert findings[check]["verdict"] != "ok", check

    kept = [json.loads(line)["source"] for line in (out / "fitting.jsonl").read_text().splitlines()]
    assert "own" in kept and "foreign" not in kept

    written = [out / name for name in ("base/done", "back", "scores/scores.parquet", "fitting.jsonl")]
    before = [path.stat().st_mtime_ns for path in written]
    assert run().returncode == 0
    assert [path.stat().st_mtime_ns for path in written] == before, "started again, it does nothing twice"
    other = run(RECORDS="12")
    assert other.returncode == 1 and "another version or size" in other.stderr
