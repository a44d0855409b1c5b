"""The linter on corpora whose faults are known."""

import ast
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from megatron_idft.corpus.lint import thresholds as lint_thresholds
from megatron_idft.corpus.lint.linter import ROW_TESTS, lint, lint_null
from megatron_idft.corpus.scores.summary import EXAMPLES, CorpusSummary
from tests.corpus.scored_rows import END_ID, row_of, sampled_rows, without_lists

ROOT = Path(__file__).parents[2]


def summary(rows, **kwargs):
    corpus = CorpusSummary("train", "base", tests=ROW_TESTS, **kwargs)
    for row in rows:
        corpus.add(row)
    return corpus


def findings(rows, null=None):
    return {finding.check: finding for finding in lint(summary(rows), null and summary(null))}


def flagged(rows, null=None):
    return {check: f.verdict for check, f in findings(rows, null).items() if f.verdict in ("look", "problem")}


@cache
def own(seed=1, count=150, **columns):
    return tuple(sampled_rows(count, seed=seed, **columns))


def changed(rows, share, **changes):
    """The first `share` of the rows with other columns."""
    rows = list(rows)
    return [row | changes if index < share * len(rows) else row for index, row in enumerate(rows)]


def test_own_samples_are_in_order():
    assert flagged(own(1), null=own(2)) == {}


def test_tokens_of_another_hand_are_far_from_the_model_but_no_fault():
    foreign = list(sampled_rows(150, seed=1, foreign=0.1))
    assert flagged(foreign, null=own(2)) == {"distance from the model": "look"}
    assert flagged(foreign) == {"distance from the model": "look"}
    assert "see the distance" in findings(foreign, own(2))["foreign sources"].result  # there is only one source


def test_shuffled_responses_are_a_problem():
    found = findings(sampled_rows(100, seed=1, foreign=1.0), null=own(2))
    assert found["chat template"].verdict == "problem"
    assert found["chat template"].value["phi_mean"]["value"] < lint_thresholds.PHI_MEAN_ALARM
    assert found["distance from the model"].verdict == "look"


def spread_rows(mean, std, count=60):
    rng = np.random.default_rng(0)
    for index in range(count):
        yield row_of(index, mean - 1 + std * rng.normal(size=60), np.ones(60), rng.integers(0, 30, 60).tolist())


@pytest.mark.parametrize(
    ("mean", "std", "verdict"),
    [
        (-8, 6.5, "problem"),  # the published run with a broken template
        (-0.243, 1.69, "ok"),  # the published foreign corpora and own ones
        (0.054, 0.27, "ok"),
        (-3, 5.5, "problem"),  # two signs of three: about a third of the tokens lie below -5
        (-2.5, 1.5, "look"),
        (0.0, 5.5, "look"),
    ],
)
def test_the_template_alarm_at_published_values(mean, std, verdict):
    assert findings(spread_rows(mean, std))["chat template"].verdict == verdict


def test_a_template_that_fits_one_source_is_not_the_fault_of_another():
    foreign = [{**row, "source": "foreign"} for row in spread_rows(-12, 6.5)]
    assert findings(foreign)["chat template"].verdict == "problem"
    own = [{**row, "source": "own", "id": f"own {row['id']}"} for row in spread_rows(0.0, 0.4)]
    found = findings([*foreign, *own])["chat template"]
    assert found.verdict == "look" and "source 'own'" in found.result


@pytest.mark.parametrize(
    ("mean", "std", "verdict"),
    [
        (-0.243, 1.69, "look"),
        (-0.161, 1.26, "look"),
        (0.014, 0.48, "ok"),
        (0.031, 0.45, "ok"),
        (0.107, 0.31, "ok"),
        (-0.05, 0.4, "ok"),
        (-0.15, 0.4, "look"),
        (0.7, 0.4, "look"),
    ],
)
def test_distance_without_own_samples_follows_published_values(mean, std, verdict):
    found = findings(spread_rows(mean, std))["distance from the model"]
    assert found.verdict == verdict and "published values" in found.result


def test_a_negative_mean_is_never_called_bad():
    for found in findings(spread_rows(-0.3, 1.5)).values():
        assert found.verdict != "problem"
    assert "negative mean is not bad" in found_text(findings(spread_rows(-0.3, 1.5))["distance from the model"])


def found_text(finding):
    return " ".join(str(value) for value in finding.as_json().values())


SHARES = [  # check, changed columns, share that passes, share to look at, share that is a problem
    ("end of turn", {"ends_turn": False}, 0.0, 0.01, 0.06),
    ("truncated responses", {"truncated": True, "ends_turn": False}, 0.0, 0.01, 0.06),
    ("prompt in the trained text", {"prompt_overlap": 0.9}, 0.01, 0.02, 0.21),
    ("chat markers in the trained text", {"template_markers": 2}, 0.0, 0.01, 0.06),
]


@pytest.mark.parametrize(("check", "changes", "passes", "look", "problem"), SHARES)
def test_shares_of_records(check, changes, passes, look, problem):
    rows = own(count=100)
    for share, verdict in ((passes, "ok"), (look, "look"), (problem, "problem")):
        found = findings(changed(rows, share, **changes))[check]
        assert found.verdict == verdict
        assert found.value["records"] == round(100 * share)
        places = [(e["id"], e["file"], e["line"]) for e in found.evidence["examples"]]
        assert places == [(f"train-{i}", "train.jsonl", i + 1) for i in range(min(EXAMPLES, round(100 * share)))]


def test_a_truncated_record_is_not_blamed_for_its_missing_end():
    found = findings(changed(own(), 1.0, truncated=True, ends_turn=False))
    assert found["end of turn"].verdict == "ok" and found["truncated responses"].verdict == "problem"


def test_a_quoted_name_is_no_prompt_in_the_trained_text():
    rows = [row | {"prompt_overlap": 10 / row["num_tokens"]} for row in own()]
    assert findings(rows)["prompt in the trained text"].verdict == "ok"  # 10 tokens are fewer than 16
    long = [row_of(0, np.zeros(400), np.zeros(400), [1] * 400, prompt_overlap=0.1)]
    assert findings(long)["prompt in the trained text"].verdict == "ok"  # 40 tokens, but a tenth of the response


def test_empty_and_short_responses():
    rows = list(own(count=90))
    rows += [row_of(1000 + i, [0.0], [0.0], [END_ID]) for i in range(4)]
    rows += [row_of(2000 + i, [0.0, 0.0], [0.0, 0.0], [i, END_ID]) for i in range(6)]
    found = findings(rows)
    assert found["empty responses"].value["records"] == 4
    assert found["empty responses"].verdict == "look"
    assert found["very short responses"].value["records"] == 6
    assert found["very short responses"].verdict == "look"


def test_repeated_records_and_responses():
    rows = list(own(count=100))
    again = [row | {"id": row["id"] + "b", "line": 500 + row["line"]} for row in rows[:3]]
    found = findings(rows + again)
    assert found["repeated records"].verdict == "look"
    assert found["repeated records"].value["records"] == 3
    assert found["repeated responses"].value["records"] == 0  # the same pair, not another prompt
    first = found["repeated records"].evidence["largest"][0]
    assert [(e["id"], e["line"]) for e in first["examples"]] == [("train-0", 1), ("train-0b", 501)]
    many = [row | {"prompt_hash": f"other {i}"} for i, row in enumerate([rows[0]] * 9)]
    found = findings(rows + many + [rows[1]])
    assert found["repeated responses"].verdict == "look"
    assert found["repeated responses"].value["records"] == 9
    assert found["repeated responses"].evidence["largest"][0]["records"] == 10
    assert findings([rows[0]] * 20)["repeated records"].verdict == "problem"


def test_short_answers_may_be_repeated():
    rows = [row_of(i, [-0.1] * 5, [0.1] * 5, [1, 2, 3, 4, END_ID]) for i in range(50)]
    assert findings(rows)["repeated responses"].verdict == "ok"
    longer = [row_of(i, [-0.1] * 8, [0.1] * 8, [1, 2, 3, 4, 5, 6, 7, END_ID]) for i in range(50)]
    assert findings(longer)["repeated responses"].verdict == "problem"


def shifted(rows, where, by):
    for row in rows:
        log_prob = np.array(row["log_prob"])
        log_prob[where] += by
        index = row["line"] - 1
        yield row_of(index, log_prob, row["entropy"], row["token_ids"], source=row["source"])


@pytest.mark.parametrize(("by", "verdict"), [(0, "ok"), (-0.6, "ok"), (-1.5, "look"), (-3, "problem")])
def test_first_tokens(by, verdict):
    found = findings(shifted(own(), slice(4), by))["first tokens of responses"]
    assert found.verdict == verdict
    assert found.value["difference"]["value"] == pytest.approx(by, abs=4 * found.value["difference"]["se"])


def test_a_drop_within_the_noise_is_not_flagged():
    rng = np.random.default_rng(0)
    rows = []
    for index in range(30):  # the first tokens of half the records lie at -40, of the others at +36
        log_prob = rng.normal(size=50)
        log_prob[:4] += -40 if index % 2 else 36
        rows.append(row_of(index, log_prob, np.zeros(50), [1] * 50))
    found = findings(rows)["first tokens of responses"]
    assert found.value["difference"]["value"] < -1 and found.verdict == "ok"


@pytest.mark.parametrize(("by", "verdict"), [(0, "ok"), (-4, "look"), (-6, "problem")])
def test_end_of_turn_token(by, verdict):
    rows = list(shifted(own(), -1, by))
    assert findings(rows)["end-of-turn token"].verdict == verdict
    # Where it is so on the model's own samples too, whose mean is 0 all the same, it is what this model is like.
    assert findings(rows, null=shifted(shifted(own(2), -1, by), 10, -by))["end-of-turn token"].verdict == "ok"


def test_without_scores_per_token_the_edges_are_not_checked():
    found = findings(without_lists(own()))
    for check in ("first tokens of responses", "end-of-turn token"):
        assert found[check].verdict == "not checked" and "not kept" in found[check].result
    assert flagged(without_lists(own()), null=without_lists(own(2))) == {}


def test_the_foreign_source_is_named_and_no_other():
    parts = [own(i, 60, source=f"own-{i}", name=f"own-{i}") for i in range(3)]
    odd = list(sampled_rows(60, seed=9, foreign=0.15, source="odd", name="odd"))
    few = list(sampled_rows(5, seed=10, foreign=0.9, source="few", name="few"))
    for null in (None, own(20)):
        found = findings(chain(*parts, odd, few), null)["foreign sources"]
        assert found.verdict == "look" and found.value == {"sources": 5, "judged": 4, "foreign": 1}
        assert [entry["source"] for entry in found.evidence["foreign"]] == ["odd"]
        assert "1 not judged" in found.result
        rest = np.concatenate([row["phi"] for row in chain(*parts, few)])
        of_rest = found.evidence["foreign"][0]["phi_mean_of_the_rest"]["value"]
        assert of_rest == pytest.approx(rest.mean(), rel=1e-6)


def test_a_shift_of_the_mean_alone_makes_a_source_foreign():
    steady = [own(i, 60, source=f"s{i}", name=f"s{i}") for i in range(2)]
    lower = shifted(own(5, 60, source="lower", name="lower"), slice(None), -0.3)
    found = findings(chain(*steady, lower), own(20))["foreign sources"]
    assert [entry["source"] for entry in found.evidence["foreign"]] == ["lower"]
    assert len(found.evidence["foreign"][0]["reasons"]) == 1


def test_a_wider_spread_alone_makes_a_source_foreign():
    steady = [own(i, 60, source=f"s{i}", name=f"s{i}") for i in range(2)]
    wider = own(5, 60, source="wider", name="wider")
    for start, by in ((0, 3), (1, -3)):  # as many tokens up as down, so that the mean stays
        wider = list(shifted(wider, slice(start, 20, 2), by))
    found = findings(chain(*steady, wider), own(20))["foreign sources"]
    assert [entry["source"] for entry in found.evidence["foreign"]] == ["wider"]
    [reason] = found.evidence["foreign"][0]["reasons"]
    assert reason.startswith("spread")


def test_own_samples_that_fail_their_own_check_are_not_a_reference():
    cold = list(sampled_rows(100, temperature=0.3))
    assert "published values" in findings(own(), null=cold)["distance from the model"].result
    assert "own samples:" in findings(own(), null=own(2))["distance from the model"].result


def test_too_few_own_samples_are_not_a_reference():
    assert "published values" in findings(own(), null=own(2, count=10))["distance from the model"].result


def test_numbers_that_are_not_finite_are_a_problem():
    rows = changed(own(count=50), 0.04, phi_mean=float("nan"))
    found = findings(rows)
    assert found["numbers"].verdict == "problem" and found["numbers"].value == {"records": 2}
    assert "numbers" not in findings(own(count=50))


def null_verdict(rows, temperature):
    [finding] = lint_null(summary(rows), temperature)
    return finding.verdict


def test_the_measurement_itself_is_checked_on_own_samples():
    assert null_verdict(own(), 1.0) == "ok"
    assert null_verdict(sampled_rows(100, temperature=0.3), 0.3) == "ok"
    assert null_verdict(sampled_rows(100, temperature=0.3), 1.0) == "problem"
    assert null_verdict(own(), 0.3) == "problem"
    assert null_verdict(sampled_rows(100, foreign=0.02), 1.0) == "problem"
    assert null_verdict(sampled_rows(100, temperature=1.5), 1.5) == "ok"
    assert null_verdict(own(count=5), 1.0) == "not checked"


def test_every_finding_explains_itself():
    checked = lint(summary(own(), keep=0), summary(own(2))) + lint_null(summary(own()), 1.0)
    for finding in checked:
        entry = finding.as_json()
        for key in ("check", "result", "threshold", "source_of_threshold", "what_it_means", "what_it_does_not_prove"):
            assert isinstance(entry[key], str) and len(entry[key]) > 8, (finding.check, key)
        source = entry["source_of_threshold"]
        assert ("ours" in source and "chosen" in source) or "arXiv" in source or "mathematics" in source
    names = [finding.check for finding in checked]
    assert len(names) == len(set(names))


def test_alarms_are_those_of_training():
    tree = ast.parse((ROOT / "megatron_idft/integration/loss/alarms.py").read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("PHI_MEAN_ALARM", "PHI_STD_ALARM")
    }
    assert values == {
        "PHI_MEAN_ALARM": lint_thresholds.PHI_MEAN_ALARM,
        "PHI_STD_ALARM": lint_thresholds.PHI_STD_ALARM,
    }


def test_no_records_no_findings():
    assert lint(summary([])) == [] and lint_null(summary([]), 1.0) == []
