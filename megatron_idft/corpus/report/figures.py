"""The report's figures, from the report's numbers: SVG as data URIs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_idft.corpus.report.drawing import (
    COLORS,
    LINES,
    OWN,
    finish_phi_axis,
    percent,
    phi_histogram,
    record_histogram,
    svg,
)
from megatron_idft.corpus.report.html import visible
from megatron_idft.corpus.report.numbers import CorpusNumbers, NullNumbers, PartNumbers, ReportNumbers
from megatron_idft.corpus.scores.display import source_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_SOURCES = 12
_LABEL = 34


def distribution_figure(data: ReportNumbers) -> str:
    """Histograms of phi over tokens (log scale, open tails), and of the records' means."""

    series = _series(data)
    listed = any(part["histogram"]["tokens"] for _, part, _ in series)

    def draw(figure: Figure) -> None:
        *tokens, records = figure.subplots(1, 2, width_ratios=(1.7, 1)) if listed else [figure.subplots()]
        for label, part, style in series:
            for axes in tokens:
                phi_histogram(axes, data["phi_edges"], part["histogram"], label=label, **style)
            record_histogram(records, data["record_edges"], part["record_histogram"], label=label, **style)
        for axes in tokens:
            finish_phi_axis(axes, data["phi_edges"])
            axes.set(xlabel="φ of a token, nats", ylabel="share of tokens per bin")
            axes.set_title("tokens (logarithmic scale, so that the tail shows)", loc="left")
        for axes in (*tokens, records):
            axes.axvline(0, color="#444444", linewidth=0.8)
        (tokens[0] if listed else records).legend(loc="upper left", fontsize=8.5)
        records.set(xlabel="mean φ of a record, nats", ylabel="share of records per bin", ylim=(0, None))
        records.yaxis.set_major_formatter(percent)
        records.set_title("records", loc="left")

    return svg((11, 3.9), draw)


def cumulative_figure(data: ReportNumbers) -> str:
    """Cumulative phi of every corpus by token position, against what its model's own samples do."""
    corpora = [corpus for corpus in data["corpora"] if corpus["cumulative"]["positions"]]
    panels: list[tuple[PartNumbers, NullNumbers | None]] = [(c, own_samples(data, c["model"])) for c in corpora]
    panels = panels or [(null, None) for null in data["nulls"] if null["cumulative"]["positions"]]
    if not panels:
        return ""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for index, (axes, (part, null)) in enumerate(zip(grid.flat, panels, strict=False)):
            curve, color = part["cumulative"], _style(index)["color"]
            at = [0, *curve["positions"]]
            axes.fill_between(at, [0, *curve["p10"]], [0, *curve["p90"]], color=color, alpha=0.18, linewidth=0)
            axes.plot(at, [0, *curve["mean"]], color=color, label="mean; band: 10th to 90th percentile of records")
            axes.plot(at, [0, *curve["p50"]], color=color, linewidth=0.9, linestyle=":", label="median record")
            if null and null["cumulative"]["positions"]:
                own, places = np.array([0, *null["cumulative"]["std"]]), [0, *null["cumulative"]["positions"]]
                # Nothing is known past the longest own sample: the lines end there.
                for sign in (-2, 2):
                    name = "own samples: 0 ± 2 standard deviations" if sign < 0 else None
                    axes.plot(places, sign * own, color="#444444", linewidth=1, linestyle="--", label=name)
            axes.axhline(0, color="#444444", linewidth=0.8)
            axes.set(xlabel="token of the response", ylabel="cumulative φ, nats", xlim=(0, _long(part)))
            axes.set_title(_label(part), loc="left")
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8.5)

    return svg((11, 3.1 * rows + 0.5), draw)


def sources_figure(data: ReportNumbers, corpus: CorpusNumbers) -> str:
    """One small histogram for each of the largest sources, with the whole corpus behind it."""
    sources = [source for source in corpus["sources"] if source["histogram"]["tokens"]][:SHOWN_SOURCES]
    if len(corpus["sources"]) < 2 or not sources:
        return ""
    null = own_samples(data, corpus["model"])
    columns = len(sources) if len(sources) <= 4 else 3 if len(sources) in (5, 6, 9) else 4
    rows = math.ceil(len(sources) / columns)
    behind = null if null and null["histogram"]["tokens"] else corpus

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        engine = figure.get_layout_engine()
        if engine is not None:
            engine.set(wspace=0.05)  # type: ignore[call-arg]  # else the outer tick labels of neighbours touch
        for axes in grid.flat[len(sources) :]:
            axes.set_visible(False)
        for axes, source in zip(grid.flat, sources, strict=False):
            name = "own samples" if behind is null else "whole corpus"
            phi_histogram(axes, data["phi_edges"], behind["histogram"], color="#d0d0d0", fill=True, label=name)
            phi_histogram(axes, data["phi_edges"], source["histogram"], color=COLORS[0], linewidth=1.3)
            axes.set_title(visible(source_name(source["source"], 26)), loc="left", fontsize=9)
            axes.tick_params(labelbottom=True, labelsize=8)
            axes.axvline(0, color="#444444", linewidth=0.8)
        finish_phi_axis(grid.flat[0], data["phi_edges"], (-5, 0), grid.flat)
        grid.flat[0].legend(loc="upper left", fontsize=8)

    return svg((11, 1.75 * rows + 0.3), draw)


def own_samples(data: ReportNumbers, model: str) -> NullNumbers | None:
    """The samples of `model` at temperature 1, if they were given."""
    return next((n for n in data["nulls"] if n["model"] == model and n["temperature"] == 1), None)


def _series(data: ReportNumbers) -> list[tuple[str, PartNumbers, dict[str, Any]]]:
    """Label, numbers and style of everything that is compared: own samples first, so that they lie behind."""
    nulls = [part for part in data["nulls"] if part["summary"]["tokens"]]
    series: list[tuple[str, PartNumbers, dict[str, Any]]] = []
    for part in nulls:
        filled = part["temperature"] == 1 and sum(null["temperature"] == 1 for null in nulls) == 1
        style = {"color": "#d0d0d0", "fill": True} if filled else {"color": OWN, "linestyle": "--", "linewidth": 1.2}
        series.append((_label(part), part, style))
    for index, corpus in enumerate(data["corpora"]):
        if corpus["summary"]["tokens"]:
            series.append((_label(corpus), corpus, _style(index)))
    return series


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": LINES[index // len(COLORS) % len(LINES)],
        "linewidth": 1.5,
    }


def _label(part: PartNumbers) -> str:
    def short(text: str) -> str:
        text = visible(text)
        return text if len(text) <= _LABEL else f"{text[: _LABEL // 2]}…{text[-_LABEL // 2 :]}"

    return f"{short(part['name'])} · {short(part['model'])}"


def _long(part: PartNumbers) -> float:
    """How far the curves are drawn: past the 99th percentile of lengths there is nearly nothing left to move them."""
    return max(4.0, min(float(part["lengths"]["p99"]) * 1.05, float(part["cumulative"]["positions"][-1])))
