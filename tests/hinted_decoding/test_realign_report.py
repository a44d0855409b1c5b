"""The report on a realigned corpus: its numbers against numpy, its page under hostile text, and both in the corners."""

import json
import tracemalloc
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from megatron_idft.corpus.report.html import number
from megatron_idft.errors import InputError
from megatron_idft.hinted_decoding.output.outcomes import OUTCOME_SCHEMA
from megatron_idft.hinted_decoding.report.page import write_report
from megatron_idft.hinted_decoding.report.summary import summarize
from megatron_idft.hinted_decoding.report.tallies import MAX_NAMES, Lengths
from tests.hinted_decoding.outcome_rows import candidate, realigned_rows, record, scores, turn
from tests.page_checks import CHROMIUM, browse, check_page

PLAIN = {"samples": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
SETTINGS = {
    "model": "a/model", "data": ["train.jsonl", "more.jsonl"], "records": 200,
    "mixing": {"mode": "linear", "slope": 3.0}, "rollouts": PLAIN,
    "hinted": {"temperature": 0.5, "top_p": 0.95, "top_k": 0},
    "fallback": "original", "unverified": "drop",
}  # fmt: skip
STAGES = ("rollout", "hinted", "second_hint", "retry")


@cache
def rows_once():
    """As they come back from the files, so that they fit the schema."""
    return pa.Table.from_pylist(list(realigned_rows(160, seed=3)), OUTCOME_SCHEMA).to_pylist()


@cache
def data_once():
    return summarize(rows_once(), SETTINGS, "A report")


def turns_of(rows, *statuses):
    return [(row, one) for row in rows if row["status"] in statuses for one in row["turns"] or ()]


def accepted(one):
    [chosen] = [candidate for candidate in one["candidates"] if candidate["accepted"]]
    return chosen


def ratio(pairs, reach=None):
    """Sum over sum and its error by the jackknife over records. pairs: record id -> [(numerator, denominator), …]."""
    both = np.array([np.sum(values, axis=0) for values in pairs.values()], dtype=float)
    rest = both.sum(0) - both
    left_out = rest[:, 0] / rest[:, 1]
    error = np.sqrt((len(both) - 1) / len(both) * np.square(left_out - left_out.mean()).sum())
    return both[:, 0].sum() / both[:, 1].sum(), error


def by_record(items):
    grouped = {}
    for row, value in items:
        grouped.setdefault(row["id"], []).append(value)
    return grouped


def check_ratio(estimate, items):
    value, error = ratio(by_record(items))
    assert estimate["value"] == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert estimate["se"] == pytest.approx(error, rel=0.08, abs=1e-9)


@pytest.mark.parametrize("source", ["all", "algebra", None])
def test_what_became_of_records_and_candidates(source):
    rows = [row for row in rows_once() if source in ("all", row["source"])]
    data = data_once()
    part = data["corpus"] if source == "all" else next(s for s in data["sources"] if s["source"] == source)
    counted = {status: sum(row["status"] == status for row in rows) for status in ("kept", "dropped", "error")}
    assert part["records"] == {"total": len(rows)} | counted and all(counted.values())
    assert part["reasons"]["error"] == [{"name": "the prompt is longer than the context", "count": counted["error"]}]
    kept = [one["stage"] for _, one in turns_of(rows, "kept")]
    for stage in (*STAGES, "original"):
        assert part["turns"][stage] == kept.count(stage) > 0
    assert part["turns"]["dropped"] == len(turns_of(rows, "dropped"))

    for stage in STAGES:
        tried = [(r, [c for c in one["candidates"] if c["stage"] == stage], one) for r, one in turns_of(rows, *counted)]
        tried = [entry for entry in tried if entry[1]]
        every = [one for _, candidates, _ in tried for one in candidates]
        numbers = part["stages"][stage]
        assert (numbers["turns"], numbers["candidates"]) == (len(tried), len(every))
        for verdict in ("right", "wrong", "unknown"):
            assert numbers[verdict] == sum(one["verdict"] == verdict for one in every)
        assert numbers["not_compared"] == sum(one["verdict"] is None for one in every)
        assert numbers["leak"] == sum(one["leak"] is not None for one in every)
        assert numbers["unfinished"] == sum(one["finish_reason"] != "eos" for one in every)
        assert numbers["accepted"] == sum(one["accepted"] for one in every)
        finished = {entry["name"]: entry["count"] for entry in numbers["finish_reasons"]}
        assert finished.get("repetition", 0) == numbers["unfinished"]
        compared = [(r, (one["verdict"] == "right", 1)) for r, c, _ in tried for one in c if one["verdict"]]
        check_ratio(numbers["accuracy"], compared)
        taken = [(r, (r["status"] == "kept" and one["stage"] == stage, 1)) for r, _, one in tried]
        check_ratio(numbers["turns_accepted_share"], taken)
        split = [one["split_at"] for one in every if one["split_at"] is not None]
        assert numbers["splitter"]["never"] == len(every) - len(split)
        places = [Fraction(one["split_at"], one["num_tokens"]) for one in every if one["split_at"] is not None]
        tenths = [Fraction(tenth, 10) for tenth in range(11)]
        assert numbers["splitter"]["places"] == [
            sum(low <= place < high for place in places) for low, high in pairwise(tenths)
        ]
        if split:
            assert numbers["splitter"]["tokens_before"]["p50"] == sorted(split)[(len(split) - 1) // 2]


COLUMNS = {"phi_mean": "phi_sum", "log_prob_mean": "log_prob_sum", "entropy_mean": "entropy_sum"} | {
    f"phi_below_{limit}": f"phi_below_{limit}" for limit in (1, 3, 5)
}


def test_phi_before_and_after():
    rows, part = rows_once(), data_once()["corpus"]
    changed = [(row, one) for row, one in turns_of(rows, "kept") if one["stage"] in STAGES]
    before = [(row, {key: one[f"original_{key}"] for key in ("num_tokens", *COLUMNS.values())}) for row, one in changed]
    after = [(row, accepted(one)) for row, one in changed]
    whole = [
        (row, {key: one[f"original_{key}"] for key in ("num_tokens", *COLUMNS.values())})
        for row, one in turns_of(rows, "kept", "dropped")
    ]
    unchanged = [
        pair for pair, (row, one) in zip(whole, turns_of(rows, "kept", "dropped"), strict=True)
        if row["status"] == "kept" and one["stage"] == "original"
    ]  # fmt: skip
    rollouts = [
        (row, one)
        for row, t in turns_of(rows, "kept", "dropped")
        for one in t["candidates"]
        if one["stage"] == "rollout"
    ]
    texts = {"original": whole, "original_changed": before, "new": after, "output": after + unchanged}
    texts |= {"rollouts": rollouts, "new_hinted": [pair for pair in after if pair[1]["stage"] == "hinted"]}
    for text, responses in texts.items():
        numbers = part["phi"][text]
        assert numbers["tokens"] == sum(one["num_tokens"] for _, one in responses)
        for key, column in COLUMNS.items():
            check_ratio(numbers[key], [(row, (one[column], one["num_tokens"])) for row, one in responses])
        if text in part["turn_histograms"]:
            means = [one["phi_sum"] / one["num_tokens"] for _, one in responses]
            edges = [-np.inf, *data_once()["record_edges"], np.inf]
            assert part["turn_histograms"][text] == np.histogram(means, edges)[0].tolist()
            lengths = [one["num_tokens"] for _, one in responses]
            assert part["lengths"][text]["mean"] == pytest.approx(np.mean(lengths))
            assert part["lengths"][text]["p90"] == np.percentile(lengths, 90, method="inverted_cdf")
    assert part["phi"]["new_hinted"]["phi_mean"]["value"] > 0.2  # sampled below temperature 1
    phi = np.concatenate([one["phi"] for _, one in changed if one["stage"] == "hinted"])
    counts = np.histogram(phi, [-np.inf, *data_once()["phi_edges"], np.inf])[0].tolist()
    assert part["token_histograms"]["hinted"] == {"tokens": len(phi), "counts": counts}
    assert part["phi"]["new_hinted"]["phi_std"]["value"] == pytest.approx(phi.std(), rel=1e-6)


def test_the_paired_difference_counts_each_record_once():
    rows, paired = rows_once(), data_once()["corpus"]["paired"]
    pairs = by_record(
        (
            row,
            (
                one["original_num_tokens"],
                one["original_phi_sum"],
                accepted(one)["num_tokens"],
                accepted(one)["phi_sum"],
            ),
        )
        for row, one in turns_of(rows, "kept")
        if one["stage"] in STAGES
    )
    sums = np.array([np.sum(values, axis=0) for values in pairs.values()])

    def difference(total):
        return total[..., 3] / total[..., 2] - total[..., 1] / total[..., 0]

    rest = difference(sums.sum(0) - sums)
    assert (paired["records"], paired["turns"]) == (len(sums), sum(map(len, pairs.values())))
    assert len(sums) < paired["turns"]
    assert paired["phi_mean"]["value"] == pytest.approx(difference(sums.sum(0)), rel=1e-9)
    error = np.sqrt((len(sums) - 1) / len(sums) * np.square(rest - rest.mean()).sum())
    assert paired["phi_mean"]["se"] == pytest.approx(error, rel=0.05)
    part = data_once()["corpus"]
    spread = part["phi"]["new"]["phi_std"]["value"] - part["phi"]["original_changed"]["phi_std"]["value"]
    assert paired["phi_std"]["value"] == pytest.approx(spread, rel=1e-9) and paired["phi_std"]["se"] > 0
    gains = [
        accepted(one)["phi_sum"] / accepted(one)["num_tokens"] - one["original_phi_sum"] / one["original_num_tokens"]
        for _, one in turns_of(rows, "kept")
        if one["stage"] in STAGES
    ]
    edges = [-np.inf, *data_once()["difference_edges"], np.inf]
    assert part["difference_histogram"] == np.histogram(gains, edges)[0].tolist()
    assert paired["turns_risen"]["value"] == np.mean(np.array(gains) > 0)
    assert paired["length_ratio"]["value"] == pytest.approx(sums[:, 2].sum() / sums[:, 0].sum())


def test_a_record_that_is_the_same_before_and_after_has_no_difference_and_no_error():
    rng = np.random.default_rng(0)
    rows = []
    for index in range(30):
        drawn = scores(rng, 20 + index)
        rows.append(
            record(index, "kept", [turn(drawn, [candidate(drawn, "rollout", accepted=True)], "rollout", drawn)])
        )
    paired = summarize(rows, SETTINGS, "")["corpus"]["paired"]
    for key in ("phi_mean", "phi_std", "phi_below_1"):
        assert paired[key] == {"value": 0, "se": pytest.approx(0, abs=1e-9)}
    assert paired["length_ratio"] == {"value": 1, "se": pytest.approx(0, abs=1e-9)}


def test_hint_share_and_entropy_along_the_response():
    rows, mixing = rows_once(), data_once()["corpus"]["mixing"]
    tokens = []  # record, place as a share, position, hint share, entropy, hinted entropy
    for row, one in turns_of(rows, "kept"):
        two = ~np.isnan(one["hinted_entropy"])
        assert two.any() == (one["stage"] in STAGES[1:])
        for i in np.flatnonzero(two):
            place = 10 * i // len(two)
            tokens.append((row, place, i, one["hint_share"][i], one["entropy"][i], one["hinted_entropy"][i]))
    assert mixing["tokens"] == len(tokens) < mixing["tokens_of_response"]
    for name, column in (("hint_share", 3), ("entropy", 4), ("hinted_entropy", 5)):
        check_ratio(mixing["means"][name], [(token[0], (token[column], 1)) for token in tokens])
        for place in range(10):
            inside = [(token[0], (token[column], 1)) for token in tokens if token[1] == place]
            assert mixing["deciles"]["tokens"][place] == len(inside)
            check_ratio(mixing["deciles"][name][place], inside)
        starts = mixing["positions"]["from"]
        assert starts == [0, 1, 2, 4, 8, 16, 32]
        for bucket, (start, stop) in enumerate(zip(starts, [*starts[1:], 64], strict=True)):
            inside = [token[column] for token in tokens if start <= token[2] < stop]
            assert mixing["positions"]["tokens"][bucket] == len(inside)
            assert mixing["positions"][name][bucket]["value"] == pytest.approx(np.mean(inside), rel=1e-9)
    assert mixing["positions"]["hint_share"][0]["value"] == 1  # the first token is the hinted stream's
    shares = np.array([token[3] for token in tokens])
    assert mixing["means"]["at_0"]["value"] == pytest.approx(np.mean(shares == 0))
    assert mixing["means"]["at_1"]["value"] == pytest.approx(np.mean(shares == 1))
    inner = np.histogram(shares[(shares > 0) & (shares < 1)], np.linspace(0, 1, 21))[0].tolist()
    assert mixing["histogram"] == [int((shares == 0).sum()), *inner, int((shares == 1).sum())]


def test_own_samples_are_the_null_only_where_nothing_was_tempered_or_cut(tmp_path):
    assert data_once()["null"] | {"why": ""} == {"own_samples": True, "why": "", "check": "ok"}
    cold = list(realigned_rows(60, seed=5, temperature=0.4))
    assert summarize(cold, SETTINGS, "")["null"]["check"] == "failed"  # as if the settings were not those of the run
    assert summarize(rows_once()[:15], SETTINGS, "")["null"]["check"] == "not checked"
    assert summarize(cold, SETTINGS | {"rollouts": PLAIN | {"top_k": None}}, "")["null"]["own_samples"]
    for rollouts, why in (
        (PLAIN | {"temperature": 0.4}, "temperature 0.4"),
        (PLAIN | {"top_p": 0.9}, "top_p 0.9"),
        (PLAIN | {"top_k": 40}, "top_k 40"),
        ({"temperature": 1.0}, "do not say with which top_p"),
        (None, "no rollouts"),
    ):
        null = summarize(cold, SETTINGS | {"rollouts": rollouts}, "")["null"]
        assert not null["own_samples"] and why in null["why"]
    pages = []
    for settings in (SETTINGS, SETTINGS | {"rollouts": PLAIN | {"temperature": 0.4}}):
        page, _ = write_report(cold, settings, tmp_path, "cold")
        pages.append("".join(check_page(page.read_text(encoding="utf-8")).text))
    assert "no φ on this page can be trusted" in pages[0]
    assert "no φ on this page can be trusted" not in pages[1] and "What remains is the theory" in pages[1]


def test_examples():
    rows, examples = rows_once(), data_once()["examples"]
    gains = {}
    for row, one in turns_of(rows, "kept"):
        if one["stage"] in STAGES:
            chosen = accepted(one)
            before = one["original_phi_sum"] / one["original_num_tokens"]
            gains[row["id"], one["message"]] = chosen["phi_sum"] / chosen["num_tokens"] - before
    ranked = sorted(gains, key=gains.get)
    places = {kind: [(example["id"], example["message"]) for example in shown] for kind, shown in examples.items()}
    assert places["largest"] == ranked[:-5:-1] and places["smallest"] == ranked[:4]
    assert len(places["drawn"]) == 4 and not set(places["drawn"]) & set(places["largest"] + places["smallest"])
    assert summarize(rows[::-1], SETTINGS, "")["examples"] == examples

    example = next(one for shown in examples.values() for one in shown if one["split_at"] is not None)
    row = next(row for row in rows if row["id"] == example["id"])
    [one] = [one for one in row["turns"] if one["message"] == example["message"]]
    [excerpt] = example["excerpts"]
    for column, name in enumerate(("tokens", "hint_share", "phi", "entropy")):
        values = [token[column] for token in excerpt["tokens"]]
        assert values == (one[name] if name == "tokens" else pytest.approx(one[name], abs=1e-4))
    assert [token[4] is None for token in excerpt["tokens"]] == np.isnan(one["hinted_entropy"]).tolist()
    assert example["original"] == {"head": one["original_text"], "tail": "", "left_out": 0}


def test_long_texts_are_shown_at_both_ends(tmp_path):
    drawn = scores(np.random.default_rng(0), 3000, hinted=True)
    row = record(0, "kept", [turn(drawn, [candidate(drawn, "hinted", accepted=True)], "hinted", drawn)])
    row["turns"][0]["original_text"] = "a" * 50_000 + "z" * 50_000
    page, numbers = write_report([row], SETTINGS, tmp_path, "long")
    [example] = json.loads(numbers.read_text())["examples"]["largest"]
    assert [excerpt["start"] for excerpt in example["excerpts"]] == [0, 2800]
    text = page.read_text(encoding="utf-8")
    assert "… 2,300 tokens …" in text and "… 94,000 characters …" in text and len(text) < 1e6


def test_the_page_shows_the_numbers_of_the_json(tmp_path):
    page, numbers = write_report(iter(rows_once()), SETTINGS, tmp_path / "new folder", "A <title>")
    data = json.loads(numbers.read_text())
    assert data | {"title": ""} == data_once() | {"title": ""}
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json"]
    parsed = check_page(page.read_text(encoding="utf-8"))
    text = "".join(parsed.text)
    assert len(parsed.images) == 5 and "A <title>" in text
    part = data["corpus"]
    for estimate in (part["paired"]["phi_mean"], *(part["phi"][name]["phi_mean"] for name in part["phi"])):
        assert number(estimate["value"], sign=True) in text and number(estimate["se"]) in text
    for stage in STAGES:
        assert f"{number(100 * part['stages'][stage]['accuracy']['value'], 1)} %" in text
    assert number(part["mixing"]["means"]["hint_share"]["value"]) in text
    for shown in data["examples"].values():
        for example in shown:
            assert example["id"] in text and number(example["gain"], sign=True) in text
    for said in ("mixing.slope", "train.jsonl, more.jsonl", "What these numbers do not prove", "that of the verifier"):
        assert said in text
    for said in ("φ alone does not make data good or bad", "Unknown verdicts", "the prompt is longer than the context"):
        assert said in text


def test_the_page_shows_the_trial_of_prompts(tmp_path):
    share = {"value": 0.625, "se": 0.171}
    prompt = dict.fromkeys(("right", "kept", "bare", "phi", "tokens_per_turn"), share)
    prompts = [prompt | {"name": "one", "analysis": False, "turns": 8}, dict.fromkeys(prompt) | {"name": "<two>"}]
    trial = {"order": ["one"], "rule": "the best", "prompts": [prompts[0], prompts[1] | {"analysis": True, "turns": 0}]}
    page, numbers = write_report(rows_once(), SETTINGS, tmp_path, "t", trial | {"sources": {"a": "long"}})
    text = "".join(check_page(page.read_text(encoding="utf-8")).text)
    assert json.loads(numbers.read_text())["prompt_trial"] == trial
    assert "Chosen: one" in text and "<two>" in text and "62.5 %" in text
    assert data_once()["prompt_trial"] is None


def test_equal_rows_give_equal_bytes(tmp_path):
    written = [write_report(rows_once(), SETTINGS, tmp_path / name, "equal") for name in "ab"]
    for one, other in zip(*written, strict=True):
        assert one.read_bytes() == other.read_bytes()


HOSTILE = (
    "</script><script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "</span></div></main><h1>", "&amp;&lt;",
    "\0\x07\x1b[31m", "👩‍👩‍👧 你好 \u202e evil \u2028 \ufeff \ud800 \uffff", "$x_1$ ${", "x" * 100_000, "\n", "", "   ",
    "]]> --> <!--", "javascript:alert(1) https://example.org/a.png",
)  # fmt: skip


def hostile_rows():
    rng = np.random.default_rng(0)
    for index, bad in enumerate(HOSTILE):
        drawn, original = scores(rng, 20, hinted=True), scores(rng, 20)
        chosen = candidate(drawn, "hinted", accepted=True, text=bad, extracted=bad, verified_by=bad, leak=bad)
        one = turn(original, [chosen], "hinted", drawn, tokens=[bad] * 20, original_text=bad, reason=bad)
        yield record(index, "kept", [one], source=bad, id=f"{bad[:300]}{index}", file=bad[:300] or "f")
        yield record(100 + index, "error", [], source=bad, reason=bad)


def test_hostile_text_stays_text(tmp_path):
    settings = SETTINGS | {bad[:50]: bad[:500] for bad in HOSTILE} | {"bad": [float("nan"), {"a": object}]}
    page, numbers = write_report(hostile_rows(), settings, tmp_path, HOSTILE[0])
    text = page.read_text(encoding="utf-8")
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text and "<script" not in text
    for bad in "\0\x07\x1b\u202e\u2028\ufeff\uffff":
        assert bad not in text
    assert "\\ud800" in text and "\\x00" in text and "x" * 10_000 not in text
    data = json.loads(numbers.read_text(encoding="utf-8"))
    assert [source["source"] for source in data["sources"]].count(HOSTILE[5]) == 1
    # A setting that is no number is shown as text, and no number of the page is one.
    check_page(text.replace("nan, ", ""))


def corner_rows():
    rng = np.random.default_rng(1)
    one = list(realigned_rows(1, seed=4))
    drawn, original = scores(rng, 1, hinted=True), scores(rng, 1)
    short = turn(original, [candidate(drawn, "hinted", accepted=True, split_at=1)], "hinted", drawn)
    broken = candidate(scores(rng, 9), "rollout", accepted=True, phi_sum=float("-inf"))
    infinite = scores(rng, 9) | {"phi": np.full(9, -np.inf, np.float32)}
    empty = candidate(drawn, "retry", num_tokens=0, phi_sum=None, finish_reason="length")
    return {
        "nothing": [],
        "one": one,
        "one token": [record(0, "kept", [short])],
        "errors": [record(i, "error", None, reason=None) for i in range(3)],
        "all dropped": [
            record(i, "dropped", [turn(original, [candidate(original, "rollout", verdict="wrong")], reason="wrong")])
            for i in range(3)
        ],
        "no turns": [record(0, "kept", [])],
        "no original": [record(0, "kept", [turn(None, [candidate(drawn, "retry", accepted=True)], "retry", drawn)])],
        "no lists": [record(0, "kept", [turn(original, [candidate(drawn, "retry", accepted=True)], "retry")])],
        "infinite": [record(0, "kept", [turn(original, [broken], "rollout", infinite)])],
        "empty": [record(0, "dropped", [turn(original, [empty])])],
        "all original": [record(i, "kept", [turn(original, [], "original", reason="no answer")]) for i in range(2)],
    }


@pytest.mark.parametrize("corner", corner_rows())
@pytest.mark.parametrize("settings", [SETTINGS, {}], ids=["settings", "none"])
def test_corners(corner, settings, tmp_path):
    rows = corner_rows()[corner]
    table = pa.Table.from_pylist(rows, OUTCOME_SCHEMA).to_pylist()
    page, numbers = write_report(table, settings, tmp_path, corner)
    check_page(page.read_text(encoding="utf-8"))
    part = json.loads(numbers.read_text())["corpus"]
    assert part["records"]["total"] == len(rows)
    assert part["responses_not_finite"] == (corner == "infinite")
    if corner == "all dropped":
        assert part["turns"]["dropped"] == 3 and part["stages"]["rollout"]["accuracy"]["value"] == 0
        assert part["phi"]["original"]["tokens"] == 3 and part["phi"]["new"]["tokens"] == 0
    if corner == "one token":
        assert part["mixing"]["means"]["at_1"] == {"value": 1, "se": None}
        assert part["stages"]["hinted"]["splitter"]["places"][-1] == 1


def test_lists_may_be_numpy_arrays():
    rows = pa.Table.from_pylist(list(realigned_rows(30, seed=6)), OUTCOME_SCHEMA).to_pylist()
    listed = summarize(rows, SETTINGS, "")
    for _, one in turns_of(rows, "kept", "dropped"):
        one |= {key: np.array(one[key]) for key in ("token_ids", "hint_share", "phi", "entropy", "hinted_entropy")}
        one["tokens"] = np.array(one["tokens"], dtype=object)
    assert summarize(rows, SETTINGS, "") == listed


def test_faults_name_the_record():
    def fault(change):
        drawn = scores(np.random.default_rng(0), 9, hinted=True)
        row = record(4, "kept", [turn(drawn, [candidate(drawn, "hinted", accepted=True)], "hinted", drawn)])
        change(row)
        with pytest.raises(InputError) as raised:
            summarize([row], SETTINGS, "")
        return str(raised.value)

    assert "no status" in fault(lambda row: row.pop("status"))
    for change, said in (
        (lambda row: row.update(status="done"), "status 'done'"),
        (lambda row: row["turns"][0].update(stage="guess"), "stage 'guess'"),
        (lambda row: row["turns"][0].update(stage="retry"), "no candidate of that stage was accepted"),
        (lambda row: row["turns"][0].update(phi=[0.0]), "1 entries in phi, but 9"),
        (lambda row: row["turns"][0]["candidates"][0].update(verdict="maybe"), "verdict 'maybe'"),
        (lambda row: row["turns"][0]["candidates"][0].update(stage="guess"), "stage 'guess'"),
    ):
        text = fault(change)
        assert said in text and "train.jsonl:5, record 'r4'" in text and "`realign`" in text


def test_reasons_and_lengths_stay_bounded():
    rows = [record(i, "error", None, reason=f"reason {i}") for i in range(MAX_NAMES + 50)]
    reasons = summarize(rows, SETTINGS, "")["corpus"]["reasons"]["error"]
    assert len(reasons) == MAX_NAMES + 1 and reasons[0] == {"name": "(further)", "count": 50}
    lengths = Lengths()
    for length in (0, 1, 2, 3, 4, 8192):
        lengths.add(length)
    histogram = lengths.as_json()["histogram"]
    # 2^(3/2) < 3 < 4 = 2^(4/2), and 8192 = 2^(26/2)
    assert {b: count for b, count in enumerate(histogram) if count} == {0: 2, 2: 1, 3: 1, 4: 1, 26: 1}


def test_memory_does_not_grow_with_records():
    drawn = scores(np.random.default_rng(0), 3000, hinted=True)
    one = turn(drawn, [candidate(drawn, "hinted", accepted=True)], "hinted", drawn)

    def rows(count):
        for index in range(count):
            chosen = one["candidates"][0] | {"phi_sum": index * 7919 % 1000 / 1000, "text": f"{index}"}
            yield record(index, "kept", [one | {"candidates": [chosen], "phi": one["phi"].copy()}])

    summarize(rows(30), SETTINGS, "")
    peaks = []
    for count in (40, 140):
        tracemalloc.start()
        summarize(rows(count), SETTINGS, "")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1e6  # 100 lists of 3,000 numbers: 2.4 MB for phi alone


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; on Debian: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path):
    page, _ = write_report(rows_once(), SETTINGS, tmp_path, HOSTILE[1])
    probe = tmp_path / "probe.html"
    script = """<script>addEventListener("load", () => console.log("probe",
        [...document.images].map(i => i.naturalWidth > 300 && i.naturalHeight > 100).join(),
        document.querySelectorAll("section").length, document.documentElement.scrollWidth <= innerWidth))</script>"""
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", script + "</body>"), encoding="utf-8")
    console, _ = browse(probe, "--dump-dom")
    assert len(console) == 1 and "probe true,true,true,true,true 9 true" in console[0]
