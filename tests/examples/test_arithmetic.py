"""The arithmetic example's corpora and how its answers are read."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
sys.path.insert(0, str(FOLDER))

import generate  # noqa: E402
import problems  # noqa: E402

from megatron_idft.corpus.records import read_records  # noqa: E402

CORPORA = generate.corpora(seed=1)
TRAINED = ("base-train", "foreign-train")
HELD_OUT = ("addition-own", "subtraction-own", "subtraction-foreign")


def ids(*names):
    return [record["id"] for name in names for record in CORPORA[name]]


@pytest.mark.parametrize("name", [*TRAINED, *HELD_OUT])
def test_every_equation_and_answer_is_right(name):
    for record in CORPORA[name]:
        question, solution = (message["content"] for message in record["messages"])
        a, operation, b = re.fullmatch(r"(\d\d)([+-])(\d\d)=\?", question).groups()
        value = int(a) + int(b) if operation == "+" else int(a) - int(b)
        assert record["answer"] == problems.stated_answer(solution) == value
        equations = re.findall(r"([\d+-]+)=(\d+)", solution)
        assert len(equations) == 2
        for left, right in equations:
            terms = re.findall(r"[+-]?\d+", left)
            assert sum(map(int, terms)) == int(right), solution


@pytest.mark.parametrize("problem", [(47, "+", 85), (83, "-", 47), (90, "-", 90), (99, "+", 99), (10, "+", 10)])
def test_the_columns_give_the_answer(problem):
    ones, tens = (int(step.split("=")[1]) for step in problems.steps(problem))
    assert 10 * tens + ones % 10 == problems.answer(problem)


def test_no_problem_is_trained_and_held_out():
    assert not set(ids(*TRAINED)) & set(ids(*HELD_OUT))
    assert not set(ids("base-train")) & set(ids("foreign-train"))
    for name in ("base-train", "foreign-train", "addition-own", "subtraction-own"):
        assert len(set(ids(name))) == len(ids(name))
    assert ids("subtraction-own") == ids("subtraction-foreign")


def test_the_foreign_corpus_is_subtraction_and_the_held_out_styles_are_what_they_say():
    assert {"+", "-"} == {record[2] for record in ids("base-train")}
    assert {record[2] for record in ids("foreign-train", "subtraction-own")} == {"-"}
    for name in ("addition-own", "subtraction-own"):
        assert all(record["messages"][1]["content"].startswith("ones: ") for record in CORPORA[name])
    for name in ("foreign-train", "subtraction-foreign"):
        assert all("At the back" in record["messages"][1]["content"] for record in CORPORA[name])


def test_one_seed_gives_one_result():
    assert generate.corpora(seed=1) == CORPORA
    other = generate.corpora(seed=2)
    assert {name: len(records) for name, records in other.items()} == {
        name: len(records) for name, records in CORPORA.items()
    }
    assert all(other[name] != CORPORA[name] for name in CORPORA)


def test_the_base_corpus_lacks_some_of_the_foreign_phrases():
    def openings(name):
        return {text.split(" At")[0] for record in CORPORA[name] if "At" in (text := record["messages"][1]["content"])}

    assert openings("base-train") < openings("foreign-train") == set(problems.OPENINGS)


def test_the_program_writes_records_that_training_reads(tmp_path):
    subprocess.run([sys.executable, FOLDER / "generate.py", tmp_path, "--seed", "1"], check=True, capture_output=True)
    assert {path.stem for path in tmp_path.iterdir()} == set(CORPORA)
    for name, expected in CORPORA.items():
        path = tmp_path / f"{name}.jsonl"
        read = list(read_records(path))
        assert [record.id for record in read] == [record["id"] for record in expected]
        assert [record.answer for record in read] == [record["answer"] for record in expected]
        assert {record.source for record in read} <= {"own", "foreign"}
        assert json.loads(path.read_text().splitlines()[0]) == expected[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ones: 13-7=6\ntens: 8-4-1=3\nanswer: 36", 36),
        ("In front 8-4-1=3, so I get 36!", 36),
        ("answer: 07", 7),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_stated_answer_is_the_last_number(text, expected):
    assert problems.stated_answer(text) == expected


def test_both_styles_end_in_the_answer():
    chance = random.Random(0)
    for problem in chance.sample(problems.problems("+"), 200) + chance.sample(problems.problems("-"), 200):
        for solution in (problems.own_solution(problem), problems.foreign_solution(problem, chance)):
            assert problems.stated_answer(solution) == problems.answer(problem)
