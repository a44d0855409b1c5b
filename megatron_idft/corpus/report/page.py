"""The report's page: HTML with inline style and figures, no scripts, nothing loaded from elsewhere.

Everything on it comes from the JSON that stands beside it.
"""

from __future__ import annotations

from typing import Any

from megatron_idft.corpus.display import source_name
from megatron_idft.corpus.lint.finding import PROBLEM
from megatron_idft.corpus.report.document import document, image
from megatron_idft.corpus.report.figures import cumulative_figure, distribution_figure, sources_figure
from megatron_idft.corpus.report.findings import estimate, render_findings
from megatron_idft.corpus.report.html_text import escaped, number, table
from megatron_idft.corpus.report.records import legend, recurring_table, render_records, worst_table

TABLE_SOURCES = 50
_SECTIONS = (
    ("verdicts", "Verdicts"),
    ("numbers", "Numbers"),
    ("distribution", "Distribution"),
    ("drift", "Cumulative φ"),
    ("sources", "Sources"),
    ("shares", "Lengths and shares"),
    ("records", "Records"),
    ("tokens", "Worst tokens"),
    ("reading", "How to read this"),
)


def render_page(data: dict[str, Any]) -> str:
    """The whole document."""
    bodies = {
        "verdicts": _verdicts(data),
        "numbers": _numbers(data),
        "distribution": _distribution(data),
        "drift": _drift(data),
        "sources": _sources(data),
        "shares": _shares(data),
        "records": _records(data),
        "tokens": _tokens(data),
        "reading": _READING,
    }
    lead = (
        "How far text lies from a model’s own distribution, by φ = log p + entropy of each response token, in nats: 0"
        " on average for what the model samples itself, far below 0 for tokens that are improbable although the model"
        " was certain."
    )
    return document(data["title"], lead, [(anchor, title, bodies[anchor]) for anchor, title in _SECTIONS])


def _verdicts(data: dict[str, Any]) -> str:
    # Own samples that fail their check come first: nothing else can be trusted then.
    failed = [n for n in data["nulls"] if any(f["verdict"] == PROBLEM for f in n["findings"])]
    fine = [null for null in data["nulls"] if null not in failed]
    return "".join(render_findings(part) for part in [*failed, *data["corpora"], *fine])


def _numbers(data: dict[str, Any]) -> str:
    heads = ["text", "model", "records", "tokens", "mean φ", "spread φ", "below −1", "below −3", "below −5", "log p"]
    rows = []
    for part in data["corpora"] + data["nulls"]:
        numbers = part["summary"]
        name = escaped(part["name"]) if part in data["corpora"] else f"<i>{escaped(part['name'])}</i>"
        rows.append(
            [
                name,
                escaped(part["model"]),
                f"{numbers['records']:,}",
                f"{numbers['tokens']:,}",
                estimate(numbers["phi_mean"], sign=True),
                estimate(numbers["phi_std"]),
                *(estimate(numbers[f"phi_below_{limit}"], 2, percent=True) for limit in (1, 3, 5)),
                estimate(numbers["log_prob_mean"]),
            ]
        )
    text = (
        '<p class="soft">Per response token, with standard errors over records. The spread is the standard deviation of'
        " φ over tokens; it separates foreign text from the model’s own better than the mean.</p>"
    )
    return text + table([*heads, "entropy"], _with_entropy(rows, data), text_columns=2) + _paired(data)


def _with_entropy(rows: list[list[str]], data: dict[str, Any]) -> list[list[str]]:
    parts = data["corpora"] + data["nulls"]
    return [[*row, estimate(part["summary"]["entropy_mean"])] for row, part in zip(rows, parts, strict=True)]


def _paired(data: dict[str, Any]) -> str:
    rows = []
    for pair in data["paired"]:
        differences = [
            estimate(pair[key]["difference"], sign=True) if key in pair else "–"
            for key in ("phi_mean", "phi_std", "log_prob_mean")
        ]
        names = [escaped(pair["name"]), f"{escaped(pair['after'])} − {escaped(pair['before'])}"]
        rows.append([*names, f"{pair['pairs']:,}", f"{sum(pair['unpaired']):,}", *differences])
    if not rows:
        return ""
    heads = ["corpus", "difference", "pairs", "records without a partner", "mean φ", "spread φ", "log p"]
    return (
        "<h3>The same records under two checkpoints</h3>"
        '<p class="soft">Differences per token, paired by record id, with the standard error of the paired'
        " difference.</p>" + table(heads, rows, text_columns=2)
    )


def _distribution(data: dict[str, Any]) -> str:
    parts = [part for part in data["corpora"] + data["nulls"] if part["summary"]["tokens"]]
    if not parts:
        return ""
    text = (
        '<p class="soft">The first and last bin are open, so no token is left out. A pile near 0 is shared syntax; what'
        " tells texts apart is the left tail.</p>"
    )
    without = [escaped(part["name"]) for part in parts if not part["histogram"]["tokens"]]
    if without:
        text += f"<p>The scores per token were not kept for {', '.join(without)}: only records are shown.</p>"
    return text + image(distribution_figure(data), "Histograms of phi over tokens and of mean phi over records")


def _drift(data: dict[str, Any]) -> str:
    figure = cumulative_figure(data)
    if not figure:
        return ""
    return (
        '<p class="soft">The sum of φ from the first token on. Own samples show no drift: their mean stays 0 at'
        " every position. Foreign text drifts, mostly downwards and in steps, at few tokens. A record that has ended"
        " keeps its last value.</p>" + image(figure, "Cumulative phi by token position for each corpus")
    )


def _sources(data: dict[str, Any]) -> str:
    bodies = []
    for corpus in data["corpora"]:
        if len(corpus["sources"]) < 2:
            continue
        rows = [
            [
                escaped(source_name(source["source"])),
                f"{source['summary']['records']:,}",
                f"{source['summary']['tokens']:,}",
                estimate(source["summary"]["phi_mean"], sign=True),
                estimate(source["summary"]["phi_std"]),
                *(estimate(source["summary"][f"phi_below_{limit}"], 2, percent=True) for limit in (1, 3, 5)),
            ]
            for source in corpus["sources"][:TABLE_SOURCES]
        ]
        heads = ["source", "records", "tokens", "mean φ", "spread φ", "below −1", "below −3", "below −5"]
        left_out = len(corpus["sources"]) - len(rows)
        more = f"<p>{left_out:,} smaller sources are in the JSON.</p>" if left_out else ""
        figure = sources_figure(data, corpus)
        bodies.append(_heading(corpus) + table(heads, rows) + more + image(figure, "Histograms of phi by source"))
    return "".join(bodies)


def _shares(data: dict[str, Any]) -> str:
    rows = []
    for part in data["corpora"] + data["nulls"]:
        lengths = [f"{part['lengths'][f'p{p}']:,.0f}" if part["lengths"] else "–" for p in (0, 10, 50, 90, 99, 100)]
        names = ("no end of turn", "truncated", "prompt in span", "template markers", "empty", "short")
        shares = [f"{number(100 * part['shares'][name], 2)} %" if name in part["shares"] else "–" for name in names]
        rows.append([escaped(part["name"]), escaped(part["model"]), *lengths, *shares])
    heads = ["text", "model", "min", "10 %", "median", "90 %", "99 %", "max"]
    heads += ["no end of turn", "truncated", "prompt inside", "chat markers", "empty", "very short"]
    text = '<p class="soft">Response tokens per record, and shares of records.</p>'
    return text + table(heads, rows, text_columns=2)


def _records(data: dict[str, Any]) -> str:
    bodies = []
    for index, corpus in enumerate(data["corpora"]):
        groups = []
        for title, key in (("Least in-distribution, lowest", "least"), ("Most in-distribution, highest", "most")):
            if corpus[key]:
                opened = " open" if index == 0 and key == "least" else ""
                records = render_records(corpus[key])
                groups.append(
                    f"<details{opened}><summary>{title} mean φ: {len(corpus[key])} records</summary>{records}</details>"
                )
        if groups:
            bodies.append(_heading(corpus) + "".join(groups))
    if not bodies:
        return ""
    text = (
        '<p class="soft">Ordered by mean φ; responses shorter than 16 tokens are shown only where nothing longer is'
        " left, and of equal responses one. Hold the pointer over a token for its numbers.</p>"
    )
    return text + legend() + "".join(bodies)


def _tokens(data: dict[str, Any]) -> str:
    bodies = []
    for index, corpus in enumerate(data["corpora"]):
        if corpus["worst_tokens"]:
            opened = " open" if index == 0 else ""
            body = worst_table(corpus["worst_tokens"])
            if corpus["recurring_tokens"]:
                body += "<h3>Tokens that recur among the worst of their records</h3>"
                body += recurring_table(corpus["recurring_tokens"])
            count = len(corpus["worst_tokens"])
            head = f"<details{opened}><summary>The {count} lowest φ of the corpus</summary>{body}</details>"
            bodies.append(_heading(corpus) + head)
    return "".join(bodies)


def _heading(corpus: dict[str, Any]) -> str:
    return f"<h3>{escaped(corpus['name'])} <span class='soft'>· {escaped(corpus['model'])}</span></h3>"


_READING = """
<p><b>φ</b> of a token is its log-probability plus the entropy of the distribution it was drawn from, in nats, at
temperature 1 (Distribution Discriminant Theory, arXiv 2602.12222). It compares what the model found likely with how
certain the model was: a rare word where anything could follow has φ near 0; the same word where the model was sure of
another lies far below.</p>
<p><b>A negative mean is not bad data.</b> For text from another distribution q the mean of φ is
H(p) − H(q) − KL(q‖p): its sign also depends on the difference of the entropies, so foreign text can come out at 0, and
cold samples (T &lt; 1) of the model itself come out above 0. Distance is not badness either: a model learns only from
what it would not have written.</p>
<p><b>Standard errors</b> treat a record as one draw, because its tokens depend on each other. Records that are copies
of each other make them too small.</p>
<p><b>Verdicts</b> are signs to look at, with the threshold and where it comes from; “nothing found” does not mean that
nothing is there.</p>
"""
