"""The report's numbers against numpy, its page under hostile text, and both in the corners."""

import base64
import json
import re
import tracemalloc
import xml.etree.ElementTree as ElementTree
from functools import cache
from itertools import chain

import numpy as np
import pytest

from megatron_idft.corpus.report.builder import ReportBuilder
from megatron_idft.corpus.report.html import environment, number, token
from megatron_idft.corpus.scores.display import MAX_SHOWN_TOKENS
from megatron_idft.corpus.scores.summary import CURVE_SAMPLE, MIN_TOKENS_TO_RANK, CorpusSummary
from megatron_idft.errors import InputError
from tests.corpus.scored_rows import END_ID, VOCABULARY, row_of, sampled_rows, without_lists
from tests.page_checks import CHROMIUM, browse, check_page


def report(rows, *, own=None, keep=3, name="train", model="base"):
    builder = ReportBuilder("A report", keep=keep)
    if own is not None:
        builder.add_null(model, 1.0, own)
    builder.add_corpus(name, model, rows)
    return builder.build()


@cache
def mixed_rows_once():
    return [
        *sampled_rows(60, seed=1, foreign=0.1, source="a", name="a"),
        *sampled_rows(40, seed=2, source="b", name="b"),
        *sampled_rows(30, seed=3, foreign=0.3, name="none"),
    ]


def mixed_rows():
    return list(mixed_rows_once())


def jackknife(rows, statistic):
    """Standard error of `statistic` of a list of phi arrays, leaving out one record at a time."""
    values = [statistic([*rows[:i], *rows[i + 1 :]]) for i in range(len(rows))]
    return np.sqrt((len(rows) - 1) / len(rows) * np.square(values - np.mean(values)).sum())


STATISTICS = {
    "phi_mean": lambda phi: np.concatenate(phi).mean(),
    "phi_std": lambda phi: np.concatenate(phi).std(),
    "phi_below_1": lambda phi: (np.concatenate(phi) < -1).mean(),
    "phi_below_3": lambda phi: (np.concatenate(phi) < -3).mean(),
    "phi_below_5": lambda phi: (np.concatenate(phi) < -5).mean(),
}


def check_estimates(summary, rows):
    phi = [np.array(row["phi"]) for row in rows]
    assert summary["records"] == len(rows)
    assert summary["tokens"] == sum(map(len, phi))
    for key, statistic in STATISTICS.items():
        assert summary[key]["value"] == pytest.approx(statistic(phi), rel=1e-9), key
        assert summary[key]["se"] == pytest.approx(jackknife(phi, statistic), rel=0.05), key
    for key, column in (("log_prob_mean", "log_prob"), ("entropy_mean", "entropy")):
        values = [np.array(row[column]) for row in rows]
        assert summary[key]["value"] == pytest.approx(np.concatenate(values).mean(), rel=1e-9)
        assert summary[key]["se"] == pytest.approx(jackknife(values, STATISTICS["phi_mean"]), rel=0.05)


def test_numbers_are_those_of_numpy():
    rows = mixed_rows()
    data = report(rows).to_json()
    [corpus] = data["corpora"]
    check_estimates(corpus["summary"], rows)
    assert [source["source"] for source in corpus["sources"]] == ["a", "b", None]
    for source in corpus["sources"]:
        check_estimates(source["summary"], [row for row in rows if row["source"] == source["source"]])

    phi = np.concatenate([row["phi"] for row in rows])
    counts, _ = np.histogram(phi, bins=[-np.inf, *data["phi_edges"], np.inf])
    assert corpus["histogram"] == {"tokens": len(phi), "counts": counts.tolist()}
    assert counts[0] > 0  # the open tail holds something
    means, _ = np.histogram([row["phi_mean"] for row in rows], bins=[-np.inf, *data["record_edges"], np.inf])
    assert corpus["record_histogram"] == means.tolist()

    lengths = [row["num_tokens"] for row in rows]
    assert corpus["lengths"]["p50"] == np.median(lengths) and corpus["lengths"]["p100"] == max(lengths)

    def drop(records):
        return np.concatenate([phi[:4] for phi in records]).mean() - np.concatenate([phi[4:] for phi in records]).mean()

    every = [np.array(row["phi"]) for row in rows]
    assert corpus["first_against_rest"]["value"] == pytest.approx(drop(every), rel=1e-9)
    assert corpus["first_against_rest"]["se"] == pytest.approx(jackknife(every, drop), rel=0.05)


def test_the_rest_of_a_corpus_is_what_the_other_records_say():
    rows = mixed_rows()
    whole, part, rest = (CorpusSummary("train", "base") for _ in range(3))
    for row in rows:
        whole.add(row)
        (part if row["source"] == "a" else rest).add(row)
    left = whole.total().without(part.total())
    assert left.records == rest.records
    assert left.ratio("phi") == pytest.approx(rest.total().ratio("phi"), rel=1e-6)
    assert left.std() == pytest.approx(rest.total().std(), rel=1e-6)


def test_cumulative_curves_are_those_of_numpy():
    rows = mixed_rows()
    [corpus] = report(rows).to_json()["corpora"]
    curve = corpus["cumulative"]
    longest = max(row["num_tokens"] for row in rows)
    assert curve["positions"][:16] == list(range(1, 17)) and curve["positions"][-2] < longest <= curve["positions"][-1]
    for index, position in enumerate(curve["positions"]):
        sums = [sum(row["phi"][:position]) for row in rows]  # slicing stops at the end: a record keeps its last value
        assert curve["mean"][index] == pytest.approx(np.mean(sums), rel=1e-9)
        assert curve["std"][index] == pytest.approx(np.std(sums, ddof=1), rel=1e-9)
        for key, percent in (("p10", 10), ("p50", 50), ("p90", 90)):
            assert curve[key][index] == pytest.approx(np.percentile(sums, percent), rel=1e-9)


def test_percentiles_of_many_records_come_from_a_sample_that_order_does_not_change():
    rows = [row_of(i, [-1.0, i / 1000], [1.0, 0.0], [1, 2]) for i in range(CURVE_SAMPLE + 500)]
    forth, back = (report(order).to_json()["corpora"][0]["cumulative"] for order in (rows, rows[::-1]))
    assert forth["records_in_percentiles"] == CURVE_SAMPLE and forth["records"] == len(rows)
    assert forth["p50"] == back["p50"]
    assert forth["p50"][1] == pytest.approx(0.75, abs=0.1)


def test_own_samples_do_not_drift_and_cold_ones_rise():
    builder = ReportBuilder("own")
    builder.add_null("base", 1.0, sampled_rows(400, seed=5))
    builder.add_null("base", 0.3, sampled_rows(100, seed=6, temperature=0.3))
    warm, cold = builder.build().to_json()["nulls"]
    mean = warm["summary"]["phi_mean"]
    assert abs(mean["value"]) < 4 * mean["se"] < 0.05
    curve = warm["cumulative"]
    assert np.all(np.abs(curve["mean"]) < 4 * np.array(curve["std"]) / np.sqrt(400))
    assert cold["summary"]["phi_mean"]["value"] > 0.3
    assert [finding["verdict"] for null in (warm, cold) for finding in null["findings"]] == ["ok", "ok"]


def test_the_error_counts_records_not_tokens():
    """Every record has a shift of its own, so 4,000 tokens tell no more than 40 records do."""
    rng = np.random.default_rng(0)
    rows = [row_of(i, np.full(100, -1 + rng.normal()), np.ones(100), [1] * 100) for i in range(40)]
    mean = report(rows).to_json()["corpora"][0]["summary"]["phi_mean"]
    assert mean["se"] == pytest.approx(np.std([row["phi_mean"] for row in rows], ddof=1) / np.sqrt(40), rel=1e-6)


def test_equal_tokens_leave_no_error():
    rows = [row_of(i, np.full(n, -5.0), np.ones(n), [1] * n) for i, n in enumerate((5, 30, 80))]
    [corpus] = report(rows).to_json()["corpora"]
    for estimate in (corpus["first_against_rest"], *(corpus["summary"][key] for key in ("log_prob_mean", "phi_mean"))):
        assert estimate["se"] == pytest.approx(0, abs=1e-6)


def test_paired_differences_between_checkpoints():
    before = list(sampled_rows(80, seed=1, model=0.0))
    after = list(sampled_rows(80, seed=1, model=0.4))
    builder = ReportBuilder("pairs")
    builder.add_corpus("train", "step 0", before)
    builder.add_corpus("train", "step 9", after[::-1][:70])
    builder.add_corpus("other", "step 9", sampled_rows(30, seed=4))
    built = builder.build()
    [pair] = built.to_json()["paired"]
    assert pair["before"] == "step 0"
    assert pair["after"] == "step 9"
    assert pair["pairs"] == 70
    assert pair["unpaired"] == [10, 0]
    both = [(np.array(a["phi"]), np.array(b["phi"])) for a, b in zip(before, after, strict=True)][10:]
    for key in ("phi_mean", "phi_std"):
        one = STATISTICS[key]

        def difference(records, one=one):
            return one([b for _, b in records]) - one([a for a, _ in records])

        assert pair[key]["difference"]["value"] == pytest.approx(difference(both), rel=1e-6)
        assert pair[key]["difference"]["se"] == pytest.approx(jackknife(both, difference), rel=0.05)
    unpaired = built.to_json()["corpora"][0]["summary"]["phi_mean"]["se"]
    assert pair["phi_mean"]["difference"]["se"] < unpaired
    assert "step 9 − step 0" in built.to_html()


def test_extreme_records():
    rows = mixed_rows()
    rows += [row | {"id": row["id"] + "-copy"} for row in rows]  # copies are shown once
    rows += [row_of(9000 + i, [-50.0] * 3, [0.0] * 3, [5, i, END_ID]) for i in range(4)]  # too short to rank
    [corpus] = report(rows, keep=5).to_json()["corpora"]
    means = sorted({row["phi_mean"] for row in rows if row["num_tokens"] >= MIN_TOKENS_TO_RANK})
    assert [record["phi_mean"] for record in corpus["least"]] == means[:5]
    assert [record["phi_mean"] for record in corpus["most"]] == means[:-6:-1]
    tokens = sorted({token["phi"] for row in rows for token in row["worst_tokens"]})
    assert [token["phi"] for token in corpus["worst_tokens"]] == tokens[:1] * 12 + tokens[1:9]

    first = corpus["least"][0]
    row = next(row for row in rows if row["id"] == first["id"])
    shown = [token for excerpt in first["excerpts"] for token in excerpt["tokens"]]
    assert [token[0] for token in shown] == row["tokens"]
    assert [token[1] for token in shown] == pytest.approx(row["phi"], abs=1e-4)


def test_least_and_most_share_no_record_of_a_small_corpus():
    rows = list(sampled_rows(5, seed=1))
    [corpus] = report(rows, keep=4).to_json()["corpora"]
    shown = [record["id"] for record in corpus["least"] + corpus["most"]]
    assert len(corpus["least"]) == 3 and sorted(shown) == sorted(row["id"] for row in rows)
    assert report(rows, keep=0).to_json()["corpora"][0]["least"] == []


def test_a_long_response_is_shown_at_its_beginning_and_at_its_worst():
    phi = np.zeros(5000)
    phi[3000] = -20
    row = row_of(0, phi - 1, np.ones(5000), [1] * 5000)
    built = report([row])
    head, around = built.to_json()["corpora"][0]["least"][0]["excerpts"]
    assert head["start"] == 0 and len(head["tokens"]) + len(around["tokens"]) == MAX_SHOWN_TOKENS
    assert around["tokens"][3000 - around["start"]][1] == -20
    assert re.search(r"… 2,\d\d\d tokens …", built.to_html()) and "1,900 more tokens" in built.to_html()


def test_without_lists_the_sums_are_the_same():
    rows = mixed_rows()
    full, bare = report(rows), report(without_lists(rows))
    [a], [b] = full.to_json()["corpora"], bare.to_json()["corpora"]
    for key in ("summary", "record_histogram", "lengths", "shares", "worst_tokens"):
        assert a[key] == b[key]
    assert b["histogram"]["tokens"] == 0 and b["cumulative"]["positions"] == []
    page = bare.to_html()
    check_page(page)
    assert "were not kept" in page and "Cumulative φ" not in page


def test_lists_may_be_numpy_arrays():
    rows = list(sampled_rows(20))
    arrays = [row | {key: np.array(row[key]) for key in ("token_ids", "log_prob", "entropy", "phi")} for row in rows]
    assert report(arrays).to_json() == report(rows).to_json()


def test_equal_input_gives_equal_bytes():
    pages, numbers = set(), set()
    for _ in range(2):
        built = report(mixed_rows(), own=sampled_rows(40, seed=8))
        pages.add(built.to_html())
        numbers.add(json.dumps(built.to_json(), allow_nan=False))
    assert len(pages) == len(numbers) == 1


HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</span></div></main><h1>",
    "&amp;&lt;",
    "\0\x07\x1b[31m",
    "👩‍👩‍👧 你好 \u202e evil \u2028 \ufeff \ud800 \uffff",
    "$x_1$ $\\frac{1}{2}$ ${",
    "x" * 1_000_000,
    "\n",
    "\t",
    "   ",
    "",
    "]]> --> <!--",
    "javascript:alert(1) https://example.org/a.png",
]


def hostile_report():
    rows = []
    for index, text in enumerate(HOSTILE):
        phi = np.linspace(-9, 1, 20)
        row = row_of(index, phi - 1, np.ones(20), [1] * 20, source=text, file=text[:300], ends_turn=index % 2 == 0)
        row |= {"id": f"{text[:300]}{index}", "tokens": [text] * 20, "response_hash": str(index)}
        row["worst_tokens"] = [token | {"token": text, "context": text} for token in row["worst_tokens"]]
        rows.append(row)
    builder = ReportBuilder(HOSTILE[0] + HOSTILE[1], keep=len(HOSTILE))
    for name in (HOSTILE[1], "".join(HOSTILE[4:7])):
        builder.add_corpus(name, HOSTILE[0], rows)
    builder.add_null(HOSTILE[0], 1.0, sampled_rows(30))
    return builder.build()


def test_hostile_text_stays_text(tmp_path):
    built = hostile_report()
    page, numbers = built.save(tmp_path)
    text = page.read_text(encoding="utf-8")
    check_page(text)
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    for bad in "\0\x07\x1b\u202e\u2028\ufeff\uffff":
        assert bad not in text
    assert "\\u202e" in text and "\\ud800" in text and "\\x00" in text and "👩‍👩‍👧" in text
    assert len(text) < 30e6 and "x" * 10_000 not in text and "(1,000,000 characters)" in text
    assert json.loads(numbers.read_text(encoding="utf-8")) == built.to_json()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_texts_and_numbers():
    page = environment("megatron_idft.corpus.report").from_string('<i title="{{ text }}">{{ text }}</i>')
    shown = "&lt;&amp;&#34;&#39;&gt;\\x00\\x85é↵"
    assert page.render(text="<&\"'>\0\x85é\n") == f'<i title="{shown}">{shown}</i>'
    assert token(" a\nb\tc") == " a↵\nb⇥c" and token("  ") == "␣␣" and token("") == "∅" and token("<b>") == "&lt;b&gt;"
    assert token(" the", blanks=True) == "␣the"
    assert number(-0.0001) == "0.000" and number(-1.5, sign=True) == "−1.500" and number(1234.5, 1) == "1,234.5"


def test_the_page_shows_the_numbers():
    built = report(mixed_rows(), own=sampled_rows(60, seed=8))
    page = check_page(built.to_html())
    text = "".join(page.text)
    [corpus] = built.to_json()["corpora"]
    for key in ("phi_mean", "phi_std", "entropy_mean"):
        assert number(corpus["summary"][key]["value"], sign=key == "phi_mean") in text
    for record in corpus["least"] + corpus["most"]:
        assert record["id"] in text and number(record["phi_mean"], sign=True) in text
    assert len(page.images) == 3
    for word in ("Verdicts", "▲ look", "own samples", "negative mean is not bad", "What it does not prove"):
        assert word in text
    assert text.index("Verdicts") < text.index("Numbers") < text.index("Worst tokens")


def test_names_of_sources_are_not_read_as_mathematics():
    rows = [*sampled_rows(20, source="$x$ 你好", name="a"), *sampled_rows(20, seed=2, source="${", name="b")]
    page = check_page(report(rows).to_html())
    drawn = ElementTree.fromstring(base64.b64decode(page.images[-1].split(",")[1]))
    assert {"$x$ 你好", "${"} <= {text.strip() for text in drawn.itertext()}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        list(sampled_rows(1)),
        [row_of(0, [-1.0], [1.0], [3])],
        [row_of(0, [-1.0], [1.0], [3]), row_of(1, [-1.0], [1.0], [3])],
        [row_of(0, [0.0] * 9, [0.0] * 9, [3] * 9) for _ in range(3)],
        list(without_lists(sampled_rows(1))),
        [next(sampled_rows(1)) | {"phi_mean": None}],
        [next(sampled_rows(1)) | {"log_prob_mean": float("-inf")}],
        [row_of(0, [-np.inf, 0.0], [1.0, 1.0], [1, 2])],
        [next(without_lists(sampled_rows(1))) | {"num_tokens": 0, "worst_tokens": None, "phi_mean": None}],
        [
            next(sampled_rows(1))
            | {"worst_tokens": [], "tokens": None, "template_markers": None, "prompt_overlap": None}
        ],
    ],
    ids=lambda rows: f"{len(rows)} records",
)
def test_corners(rows):
    built = report(rows, own=[])
    json.dumps(built.to_json(), allow_nan=False)
    check_page(built.to_html())
    assert built.to_json()["corpora"][0]["summary"]["records"] == len(rows)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; on Debian: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path):
    page, _ = report(mixed_rows(), own=sampled_rows(40, seed=8), name=HOSTILE[1]).save(tmp_path)
    console, document = browse(page, "--dump-dom")
    assert console == []
    assert document.count("<section") == 9 and "Lengths and shares" in document

    # The same page with a script: the console is heard, every image decodes, and nothing is wider than the window.
    probe = tmp_path / "probe.html"
    script = """<script>addEventListener("load", () => console.log("probe",
        [...document.images].map(i => i.naturalWidth > 300 && i.naturalHeight > 100).join(), document.images.length,
        document.documentElement.scrollWidth <= innerWidth))</script>"""
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", script + "</body>"), encoding="utf-8")
    console, _ = browse(probe, "--dump-dom")
    assert len(console) == 1 and "probe true,true,true 3 true" in console[0]


def test_many_sources_stay_bounded():
    rows = chain.from_iterable(sampled_rows(1, seed=i, length=(4, 6), source=f"s{i}") for i in range(1100))
    built = report(rows)
    sources = built.to_json()["corpora"][0]["sources"]
    assert len(sources) == 1001 and sum(source["summary"]["records"] for source in sources) == 1100
    assert sources[0]["source"] == "(further sources)" and sources[0]["summary"]["records"] == 100
    assert "smaller sources are in the JSON" in built.to_html()


def test_memory_does_not_grow_with_tokens():
    def rows(count):
        for index in range(count):
            row = dict(long, id=f"train-{index}", line=index + 1, response_hash=str(index))
            yield row | {"phi_mean": index * 7919 % 1000 / 1000, "phi": row["phi"].copy()}

    long = row_of(0, -np.ones(5000), np.ones(5000), [1] * 5000)
    long |= {key: np.array(long[key]) for key in ("token_ids", "log_prob", "entropy", "phi")}
    report(rows(10))
    peaks = []
    for count in (50, 350):
        tracemalloc.start()
        report(rows(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1e6  # 300 records of 5,000 tokens: 12 MB of phi alone


def test_faults_of_the_caller_are_named():
    builder = ReportBuilder("faults")
    with pytest.raises(InputError, match="nothing to report on"):
        builder.build()
    row = next(sampled_rows(1))
    with pytest.raises(InputError, match=r"train.*train-0.*no response_hash.*`score`"):
        builder.add_corpus("train", "base", [{key: row[key] for key in row if key != "response_hash"}])
    with pytest.raises(InputError, match=r"train-0.*entries in log_prob"):
        builder.add_corpus("train", "base", [row | {"log_prob": [0.0]}])
    builder.add_corpus("train", "base", [row])
    with pytest.raises(InputError, match="added twice"):
        builder.add_corpus("train", "base", [row])
    builder.add_null("base", 1.0, [row])
    with pytest.raises(InputError, match="added twice"):
        builder.add_null("base", 1.0, [row])
    with pytest.raises(InputError, match="above 0"):
        builder.add_null("base", 0.0, [row])
    with pytest.raises(InputError, match="keep is -1"):
        ReportBuilder("faults", keep=-1)


def test_a_corpus_that_failed_is_not_in_the_report():
    builder = ReportBuilder("faults")
    row = next(sampled_rows(1))
    with pytest.raises(InputError):
        builder.add_corpus("train", "base", [row, row | {"phi": [0.0]}])
    builder.add_corpus("train", "base", [row])
    assert len(builder.build().to_json()["corpora"]) == 1


def test_vocabulary_is_long_enough_for_the_tests():
    assert len(VOCABULARY) == END_ID
