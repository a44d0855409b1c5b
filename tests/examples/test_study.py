"""The study's problems, its statistics against numbers by hand, and its claims beside PREDICTIONS.md."""

import argparse
import importlib.util
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_idft.corpus.verification.answers import final_answer
from tests.launch import ROOT

FOLDER = ROOT / "examples" / "study"


def program(path: str) -> ModuleType:
    """By a name of its own: other examples have files of the same names."""
    name = f"study_{path.replace('/', '_')}"
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{path}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def beside_each_other():
    """The report's files import each other by name."""
    names = ("estimates", "curves", "claims", "page", "picture")
    sys.path.insert(0, str(FOLDER / "report"))
    yield
    sys.path.remove(str(FOLDER / "report"))
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def world():
    return program("world")


@pytest.fixture(scope="module")
def estimates(beside_each_other):
    return program("report/estimates")


SIZES = {"train": 40, "test": 20, "selection": 20, "harder": 10, "retention": 5, "seeds": [1, 2], "wrong_share": 0.3}


@pytest.fixture(scope="module")
def splits(world):
    return world.splits(argparse.Namespace(**SIZES))


def test_no_question_is_in_two_splits_and_more_seeds_change_none(world, splits):
    questions = {name: [record["messages"][0]["content"] for record in found] for name, found in splits.items()}
    trained = {question for name in ("train-1", "train-2") for question in questions[name]}
    others = [question for name, found in questions.items() if not name.startswith("train") for question in found]
    assert len(set(others)) == len(others) and not trained & set(others)
    assert all(len(set(found)) == len(found) for found in questions.values())
    more = world.splits(argparse.Namespace(**SIZES | {"seeds": [1, 2, 3]}))
    assert {name: more[name] for name in splits} == splits


def test_solutions_are_right_and_a_wrong_step_is_all_that_noise_changes(world, splits):
    problems = splits["train-1"]
    originals = [world.solved(problem, 0) for problem in problems]
    noisy = [world.solved(problem, 0.3) for problem in problems]
    wrong = [record for record in noisy if record["source"] == "wrong"]
    assert 4 <= len(wrong) <= 20
    for original, other in zip(originals, noisy, strict=True):
        text, changed = (record["messages"][1]["content"] for record in (original, other))
        assert final_answer(text) == original["answer"]
        assert (final_answer(changed) == original["answer"]) == (other["source"] == "right") == (text == changed)
        assert re.sub(r"-?\d+", "", text) == re.sub(r"-?\d+", "", changed)


@pytest.mark.parametrize(("expression", "numbers"), [("12 - 5 + 3", [12, -5, 3]), ("7 + 10", [7, 10])])
def test_terms_of_an_expression(world, expression, numbers):
    assert world.terms(expression) == numbers
    assert world.solution(numbers, random.Random(1)).endswith(f"#### {sum(numbers)}")


def test_a_paired_difference_without_spread_has_its_exact_interval(estimates):
    a = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    assert estimates.paired_difference(a, a - 0.25) == pytest.approx((0.25, 0.25, 0.25))


def test_the_bootstrap_of_one_seed_is_that_of_the_problems(estimates):
    """Of n problems with k differences of 1 a draw's mean is binomial: standard deviation sqrt(p (1 - p) / n)."""
    a = np.array([[1.0] * 30 + [0.0] * 70])
    found = estimates.paired_difference(a, np.zeros_like(a), draws=4000)
    deviation = (0.3 * 0.7 / 100) ** 0.5
    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - 1.96 * deviation, abs=0.02)
    assert found.high == pytest.approx(0.3 + 1.96 * deviation, abs=0.02)


def test_seeds_that_disagree_widen_the_interval(estimates):
    same = np.full((2, 50), 0.5)
    apart = np.stack([np.zeros(50), np.ones(50)])
    assert estimates.paired_difference(same, np.zeros_like(same))[1:] == (0.5, 0.5)
    assert estimates.paired_difference(apart, np.zeros_like(apart))[1:] == (0.0, 1.0)  # both seeds are one in 1 of 2


@pytest.mark.parametrize(
    ("values", "level", "place"),
    [
        ([0.0, 1.0, 3.0], 2.0, (1, 0.5)),
        ([0.0, 1.0, 3.0], 1.0, (0, 1.0)),
        ([0.0, 1.0, 0.5, 2.0], 0.75, (0, 0.75)),  # the first time
        ([1.0, 0.5], 0.6, (0, 0.8)),  # falling
        ([0.0, 1.0], 1.5, None),
    ],
)
def test_where_a_curve_first_reaches_a_level(estimates, values, level, place):
    assert estimates.place_of(values, level) == (place if place is None else pytest.approx(place))


def test_values_at_equal_distance_are_read_between_checkpoints_by_hand(estimates):
    """Distances 0, 0.2, 0.6 and 0, 0.4: at 0.3 a quarter of the way in the one, three quarters in the other."""
    x = [np.array([0.0, 0.2, 0.6]), np.array([0.0, 0.4])]
    y = [np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.array([[0.0, 0.0], [1.0, 0.0]])]
    assert estimates.at_equal(x, y, 0.3) == pytest.approx(np.array([[0.25, 1.0], [0.75, 0.0]]))
    assert estimates.at_equal(x, y, 0.5) is None


@pytest.mark.parametrize(
    ("rights", "next_rate"),
    [
        ({"3e-5": 5, "1e-4": 9}, "3e-4"),
        ({"3e-5": 9, "1e-4": 5}, "1e-5"),
        ({"3e-5": 9, "1e-4": 9}, "1e-5"),  # of equals the smallest
        ({"1e-5": 3, "3e-5": 9, "1e-4": 5}, None),
    ],
)
def test_the_grid_is_extended_where_the_best_lies_at_an_edge(rights, next_rate):
    choose = program("choose")
    assert choose.at_edges([choose.Run(rate, right, 0.1) for rate, right in rights.items()]) == next_rate


def test_a_smaller_rate_of_sft_is_looked_for_until_it_is_as_near_as_idft():
    choose = program("choose")
    inside = [choose.Run("1e-5", 1, 0.01), choose.Run("3e-5", 9, 0.05), choose.Run("1e-4", 2, 0.4)]
    far = [choose.Run("3e-5", 5, 0.1), choose.Run("1e-4", 9, 0.4), choose.Run("3e-4", 5, 1.0)]
    assert choose.wanted({"idft": inside, "sft": far}) == {("sft", "1e-5")}
    near = [choose.Run("1e-5", 1, 0.02), *far]
    assert choose.wanted({"idft": inside, "sft": near}) == set()
    assert choose.wanted({"idft-own": inside, "sft-own": far, "sft": near}) == {("sft-own", "1e-5")}


def test_every_claim_has_a_prediction(beside_each_other):
    claims = program("report/claims")
    expected = claims.predictions(FOLDER / "PREDICTIONS.md")
    assert set(expected) == {claim.id for claim in claims.CLAIMS}
    assert all(low < high and len(why) > 20 for (low, high), why in expected.values())


@pytest.mark.parametrize(
    ("paper", "found", "expected", "verdicts"),
    [
        (1, (0.1, 0.05, 0.15), (0.05, 0.2), ("agrees", "agrees")),
        (1, (-0.1, -0.15, -0.05), (0.0, 0.1), ("differs", "differs")),
        (-1, (-0.1, -0.15, -0.05), (-0.2, 0.0), ("agrees", "agrees")),
        (1, (0.02, -0.2, 0.3), (0.0, 0.1), ("cannot tell", "cannot tell")),
        (0, (0.01, -0.02, 0.02), (-0.05, 0.05), ("agrees", "agrees")),
        (0, (0.04, 0.01, 0.07), (-0.05, 0.0), ("differs", "differs")),
        (1, (float("nan"),) * 3, (0.0, 0.1), ("cannot tell", "cannot tell")),
    ],
)
def test_verdicts(beside_each_other, paper, found, expected, verdicts):
    claims = program("report/claims")
    claim = claims.CLAIMS[0]._replace(paper=paper)
    estimate = claims.Estimate(*found)
    assert (claims.beside_paper(claim, estimate), claims.beside_prediction(expected, estimate)) == verdicts


def answers(rights: dict[str, list[bool]]) -> list[dict]:
    """Greedy answers to the problems of each split, and one sample of the target's."""
    rows = []
    for split, values in rights.items():
        for i, right in enumerate(values):
            row = {
                "problem": f"{split}-{i}",
                "split": split,
                "kind": "greedy",
                "tokens": 10,
                "ended": True,
                "right": right,
            }
            rows += [row, row | {"kind": "sample 0"}] if split == "test" else [row]
    return rows


def checkpoint(step: int, target: int, retained: int, kl: float) -> dict:
    """8 problems of each measure, of which so many are right; the base model's one chat sample has 10 tokens."""
    rights = {split: [i < target for i in range(8)] for split in ("test", "selection", "harder")}
    rights["retention-coins"] = [i < retained for i in range(8)]
    sums = {"tokens": 10, "phi": 0.0, "phi_squared": 2.5}
    samples = [{"split": split, "log_prob": -20 - 10 * kl, **sums} for split in ("chat", "test")]
    return {"step": step, "answers": answers(rights), "base_samples": samples, "corpus": [sums], "seconds": 3.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory, beside_each_other):
    """A study of few arms and two seeds whose numbers are known: its folder after make.py."""
    folder = tmp_path_factory.mktemp("study")
    curves = {  # per checkpoint: target and retention right of 8, KL
        "sft@1e-4": [(4, 6, 0.2), (6, 4, 0.4)],
        "idft@1e-4": [(4, 8, 0.1), (6, 7, 0.2)],
        "sft@3e-5": [(2, 8, 0.1), (4, 6, 0.2)],
        "sft-own@1e-4": [(4, 6, 0.2), (6, 4, 0.4)],
        "idft-own@1e-4": [(4, 8, 0.05), (6, 7, 0.1)],
        "sft-own@1e-5": [(2, 8, 0.05), (4, 6, 0.1)],
        "asft@1e-4": [(2, 8, 0.0), (2, 8, -0.01)],  # stays where it began
    }
    for name in ("base", "results"):
        (folder / name).mkdir()
    (folder / "base" / "0.json").write_text(json.dumps(checkpoint(0, 2, 8, 0.0)))
    training = {f"ddt/phi {name}": [[step, value] for step in (1, 2)] for name, value in (("mean", -0.1), ("std", 1.5))}
    for name, points in curves.items():
        run = {"checkpoints": [checkpoint(step, *point) for step, point in enumerate(points, start=1)]}
        run |= {"training": training, "phi_before": [-0.2, 1.6], "training_seconds": 5.0}
        for seed in (1, 2):
            (folder / "results" / f"{name}@{seed}.json").write_text(json.dumps(run))
    command = [sys.executable, FOLDER / "choose.py", folder / "results", "--seed", "1"]
    command += ["--arms", "sft", "idft", "sft-own", "idft-own", "asft"]
    chosen = subprocess.run([*command, "--out", folder / "choice.json"], check=True, capture_output=True, text=True)
    best = [f"{arm} 1e-4" for arm in ("sft", "idft", "sft-own", "idft-own", "asft")]
    assert chosen.stdout.splitlines() == [*best, "sft 3e-5", "sft-own 1e-5"]  # as near as idft on the same corpus
    return report(folder, "cpu")


def report(folder: Path, size: str) -> Path:
    subprocess.run([sys.executable, FOLDER / "report" / "make.py", folder, "--size", size], check=True)
    return folder


def test_differences_and_verdicts_of_a_study_whose_numbers_are_known(made):
    found = {claim["id"]: claim for claim in json.loads((made / "report.json").read_text())["claims"]}
    assert found["P1"]["found"][0] == 0 and found["P1"]["beside_paper"] == "cannot tell"
    assert found["P3"]["found"][0] == pytest.approx(3 / 8)
    # Beside sft at 3e-5, which ends as near as idft. At KL 0.18, nine tenths of the least distance: 3.6 and 5.6 of 8.
    assert found["P4"]["found"][0] == pytest.approx((5.6 - 3.6) / 8)
    # At 3.8 of 8 right: sft lies at 0.1 + 0.9 * 0.1, idft at 0.9 * 0.1.
    assert found["P5"]["found"][0] == pytest.approx(0.09 - 0.19)
    assert found["P6"]["missing"] == "not run: dft"
    # At the end sft-own has its chosen rate; at KL 0.09, nine tenths of what its fair one reaches, 3.6 of 8, idft 3.8.
    assert found["P16"]["found"][0] == pytest.approx((4 - 7) / 8)
    later = {claim["id"]: claim for claim in json.loads((made / "report.json").read_text())["seen_later"]}
    assert later["L1"]["found"][0] == pytest.approx((3.6 - 3.8) / 8)


def test_arms_are_compared_at_distances_that_idft_reaches(made):
    found = json.loads((made / "report.json").read_text())["equal_kl"]
    assert found["levels"] == pytest.approx([0.02, 0.05, 0.1, 0.2])
    assert found["arms"]["idft"][2] == pytest.approx([4 / 8, 1.0])
    assert found["arms"]["sft at 3e-5"][2] == pytest.approx([2 / 8, 1.0])
    assert found["arms"]["asft"] == [None] * 4


def test_the_page_and_the_picture_show_every_claim_and_arm(made):
    page, picture = (made / "study.md").read_text(), (made / "study.svg").read_text()
    assert "mean nothing" not in page + picture
    for id in (f"P{i}" for i in range(1, 31)):
        assert f"| {id} " in page
    assert "| sft (not chosen) | 3e-5 | 2 |" in page and "−0.20 ± 1.60" in page
    assert picture.startswith("<?xml") and ">idft<" in picture
    assert not re.search(r'href="(?!#)|url\((?!#)', picture)  # nothing is fetched


def test_a_smoke_run_says_that_it_means_nothing(made, tmp_path):
    """Also where the base model has nothing of retention right, so that nothing can be kept."""
    smoke = shutil.copytree(made, tmp_path / "smoke")
    (smoke / "base" / "0.json").write_text(json.dumps(checkpoint(0, 2, 0, 0.0)))
    report(smoke, "smoke")
    assert "no problem of retention" in (smoke / "study.md").read_text()
    assert "the numbers mean nothing" in (smoke / "study.md").read_text()
    assert "mean nothing" in (smoke / "study.svg").read_text()
    verdicts = [claim["beside_paper"] for claim in json.loads((smoke / "report.json").read_text())["claims"]]
    assert set(verdicts) == {"cannot tell"}


def test_a_single_seed_is_not_judged(made, tmp_path):
    alone = shutil.copytree(made, tmp_path / "alone")
    for path in (alone / "results").glob("*@2.json"):
        path.unlink()
    found, before = (
        {claim["id"]: claim for claim in json.loads((report(folder, "cpu") / "report.json").read_text())["claims"]}[
            "P3"
        ]
        for folder in (alone, made)
    )
    assert (found["seeds"], found["found"], found["beside_paper"]) == (1, before["found"], "cannot tell")
    assert (before["seeds"], before["beside_paper"]) == (2, "agrees")


def test_the_pages_have_the_numbers_of_the_committed_results(made, beside_each_other):
    readme = program("report/readme")
    for page in readme.PAGES:
        text = page.read_text()
        assert readme.written(page, FOLDER / "results" / "cpu.json") == text
    page = FOLDER / "README.md"
    other, text = readme.written(page, made / "report.json"), page.read_text()
    assert "+0.375 [" in other and other.endswith(text[text.index("<!-- end -->") :])


def test_the_kind_of_each_token_of_an_answer():
    """A number is calculated where neither the question nor the answer before has it."""
    where = program("where")
    pieces = ["My", " purse", " holds", " ", "3", ".", " In", " go", " ", "1", "5", ":", " now", " ", "1", "8", ".\n"]
    found = where.kinds("What is 3 + 15?", [*pieces, "####", " ", "1", "8", "<|im_end|>"])
    numbers = ["words", "copied", "words", "words", "words", "words", "copied", "copied"]
    numbers += ["words", "words", "words", "calculated", "calculated", "words", "words", "words", "copied", "copied"]
    assert found == ["first", "words", "words", *numbers, "end"]


def test_where_weight_and_gradient_go_by_hand(monkeypatch):
    """Two tokens of words, of p = 1/4 and 1/2, and an end of p = 1/2, at entropies that make phi 0."""
    where = program("where")
    rows = [("words", math.log(p), -math.log(p)) for p in (0.25, 0.5)] + [("end", math.log(0.5), math.log(2))]
    monkeypatch.setattr(where, "tokens", lambda packs, tokenizer: iter(rows))
    found = where.measured(Path("packs"), SimpleNamespace(vocab_size=8))
    assert found["tokens"] == 3 and found["kinds"]["words"]["share"] == pytest.approx(2 / 3)
    assert found["kinds"]["end"]["cross_entropy"] == pytest.approx(math.log(2))
    assert found["losses"]["ce"]["words"] == {"weight": 1.0, "share": pytest.approx(1.25 / 1.75)}
    words, end = 0.25 * 0.75 + 0.5 * 0.5, 0.5 * 0.5
    for loss in ("dft", "idft"):  # with phi = 0 they are the same
        assert found["losses"][loss]["words"]["weight"] == pytest.approx(0.375)
        assert found["losses"][loss]["end"]["share"] == pytest.approx(end / (words + end))


def test_pairs_are_right_and_wrong_answers_to_one_problem(tmp_path):
    preference = program("preference")
    answers = {
        "a": ["right", "wrong", "wrong", "unknown"],
        "b": ["wrong"] * 4,
        "c": ["right", "right", "wrong", "wrong"],
    }
    rows = [
        {"id": f"{name}#{i}", "turns": [{"candidates": [{"verdict": verdict, "text": f"{name}{i}"}]}]}
        for name, verdicts in answers.items()
        for i, verdict in enumerate(verdicts)
    ]
    (tmp_path / "parts").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parts" / "chunk-000000.parquet")
    made = preference.pairs(tmp_path, {name: f"question {name}" for name in answers}, seed=1)
    found = {
        (pair["prompt"][0]["content"], pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in made
    }
    assert found == {("question a", "a0", "a1"), ("question c", "c0", "c2"), ("question c", "c1", "c3")}
    assert len(made) == 3
