"""The realign example: what its corpora hold, and its run.sh with tiny sizes."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_idft.corpus.verification.answers import final_answer
from megatron_idft.hinted_decoding.output.results import read_outcomes
from tests.examples.conftest import SIZES
from tests.launch import ROOT, forking_python

EXAMPLES = ROOT / "examples"
FOLDER = EXAMPLES / "realign"
sys.path += [str(EXAMPLES), str(FOLDER)]

import styles  # noqa: E402
from additions import foreign_answer, in_words  # noqa: E402


@pytest.mark.parametrize("numbers", [(47, 85), (10, 10), (99, 99), (23, 41), (50, 50)])
def test_the_stated_answer_is_found_in_both_styles(numbers):
    own = styles.own_answer(numbers, random.Random(0))
    assert final_answer(own) == str(sum(numbers))
    assert styles.stated_answer(own) == styles.stated_answer(foreign_answer(numbers)) == sum(numbers)
    assert styles.stated_answer(foreign_answer(numbers).replace("!", "")) is None
    assert styles.stated_answer("the answer is 1 7.") is None


def test_every_sum_in_words_is_read_back():
    for total in range(200):
        assert styles.stated_answer(f"If you put this together, you end up with {in_words(total)}!") == total


def test_a_hinted_prompt_holds_question_and_reference():
    record = styles.hinted((47, 85), random.Random(0))
    assert record["prompt"].startswith(styles.question((47, 85)))
    assert foreign_answer((47, 85)) in record["prompt"] and "132" in record["prompt"]
    assert record["response"] in {styles.own_answer((47, 85), random.Random(seed)) for seed in range(20)}


def run_sh(out: Path, **sizes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **SIZES, "PYTHON": forking_python(), **sizes}
    command = ["bash", FOLDER / "run.sh", "--out", out]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def run(realign_example):
    return realign_example


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_record_has_one_outcome_and_the_merged_ones_stand_in_input_order(run):
    out, _ = run
    corpus = [record["id"] for record in lines(out / "data" / "corpus.jsonl")]
    outcomes = list(read_outcomes(out / "realigned"))
    assert [row["id"] for row in outcomes] == corpus, "two launches: every record once"
    kept = [row["id"] for row in outcomes if row["status"] == "kept"]
    assert [record["id"] for record in lines(out / "realigned.jsonl")] == kept
    assert 0 < len(kept) < len(corpus), "some were wrong to the end"
    stages = Counter(turn["stage"] for row in outcomes for turn in row["turns"] if row["status"] == "kept")
    assert stages["hinted"] + stages["retry"] > 0


def test_what_is_accepted_is_right(run):
    out, _ = run
    for record in lines(out / "realigned.jsonl"):
        [turn] = record["realigned"]["turns"]
        assert turn["verdict"] == "right" and turn["finish_reason"] == "eos"
        text = record["messages"][-1]["content"]
        assert styles.stated_answer(text) == record["answer"] and "together" not in text
        assert record["source"] == "foreign" and len(record["token_ids"]) == len(record["loss_mask"])
    answers = {record["id"]: record["answer"] for record in lines(out / "data" / "corpus.jsonl")}
    for row in read_outcomes(out / "realigned"):
        [turn] = row["turns"]
        for candidate in turn["candidates"]:
            right = final_answer(candidate["text"]) == str(answers[row["id"]])
            assert not candidate["accepted"] or right
            assert candidate["verdict"] == "right" if right else candidate["verdict"] in ("wrong", "unknown", None)


def test_phi_rises_by_more_than_four_standard_errors(run):
    out, _ = run
    before = {row["id"]: row["phi_mean"] for row in pq.read_table(out / "scores" / "scores.parquet").to_pylist()}
    after = {row["id"]: row for row in pq.read_table(out / "scores-realigned" / "scores.parquet").to_pylist()}
    kept = {record["id"]: record for record in lines(out / "realigned.jsonl")}
    assert set(after) == set(kept)
    gains = [row["phi_mean"] - before[name] for name, row in after.items()]
    mean = sum(gains) / len(gains)
    error = (sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1) / len(gains)) ** 0.5
    assert mean > 4 * error > 0
    for name, row in after.items():  # what decoding said of its own tokens is what scoring finds
        assert row["phi_mean"] == pytest.approx(kept[name]["realigned"]["turns"][0]["phi_mean"], abs=1e-3), name


def test_fine_tuning_takes_the_ids_as_they_are_and_the_tables_say_what_was_found(run):
    out, printed = run
    report = (out / "tuned-realigned.log").read_text(encoding="utf-8")
    taken = re.search(r"pre-tokenized records +([0-9,]+) ", report)
    assert taken is not None and int(taken[1]) == len(lines(out / "realigned.jsonl"))
    assert "pre-tokenized records" not in (out / "tuned-original.log").read_text(encoding="utf-8")
    answers = json.loads((out / "answers.json").read_text())
    assert set(answers) == {"base", "original", "realigned"}
    assert all(0 <= found["right"] <= found["records"] == 16 for test in answers.values() for found in test.values())
    assert (out / "table.txt").read_text(encoding="utf-8").strip() in printed
    assert (out / "realigned" / "report.html").stat().st_size > 0


def test_a_folder_of_other_sizes_is_refused(run):
    out, _ = run
    command = ["bash", FOLDER / "run.sh", "--out", out]
    other = subprocess.run(
        command,
        env={**os.environ, **SIZES, "PYTHON": forking_python(), "RECORDS": "31"},
        capture_output=True,
        text=True,
    )
    assert other.returncode == 1 and "another version or size" in other.stderr
