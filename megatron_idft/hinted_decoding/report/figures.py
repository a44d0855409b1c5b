"""The report's figures, from the report's numbers: SVG as data URIs, empty where there is nothing to draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_idft.corpus.report.drawing import (
    COLORS,
    OWN,
    finish_phi_axis,
    percent,
    phi_histogram,
    record_histogram,
    space_out,
    svg,
)
from megatron_idft.corpus.report.html import visible
from megatron_idft.corpus.scores.display import source_name
from megatron_idft.corpus.scores.estimates import EstimateNumbers
from megatron_idft.hinted_decoding.report.mixing_numbers import SHARE_BINS
from megatron_idft.hinted_decoding.report.numbers import Part, Text
from megatron_idft.hinted_decoding.report.outcome import STAGES
from megatron_idft.hinted_decoding.report.stage_numbers import SPLIT_BINS
from megatron_idft.hinted_decoding.report.summary import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN_SOURCES = 12
_BEFORE, _AFTER = COLORS[1], COLORS[0]
_STAGE_COLORS: dict[str, str] = dict(zip(STAGES, (COLORS[2], COLORS[0], COLORS[3], COLORS[5]), strict=True))
_FATES = {**_STAGE_COLORS, "original": COLORS[4], "dropped": "#c9c9c9", "error": "#555555"}
_MARKERS = dict(zip(STAGES, "os^D", strict=True))
_TEXTS: tuple[tuple[Text, str, str], ...] = (
    ("original", OWN, "all originals"),
    ("original_changed", _BEFORE, "before"),
    ("new", _AFTER, "after"),
)


def fate_figure(data: Report) -> str:
    """Turns by their fate, and accuracy by stage: of the corpus and of its largest sources."""
    parts = [(name, part) for name, part in _parts(data) if part["turns"]["total"]]
    if not parts:
        return ""

    def draw(figure: Figure) -> None:
        fates, accuracy = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
        space_out(figure)
        rows = np.arange(len(parts))
        left = np.zeros(len(parts))
        for fate, color in _FATES.items():
            shares = np.array([part["turns"][fate] / part["turns"]["total"] for _, part in parts])
            if shares.any():
                fates.barh(rows, shares, left=left, color=color, height=0.7, label=fate)
                left += shares
        fates.set_yticks(rows, [name for name, _ in parts])
        fates.invert_yaxis()
        fates.set(xlim=(0, 1), xlabel="share of turns, by the stage that the output took them from")
        fates.xaxis.set_major_formatter(percent)
        for place, stage in enumerate(STAGES):
            found = [(row, part["stages"][stage]["accuracy"]) for row, (_, part) in zip(rows, parts, strict=True)]
            shown = [(row, value) for row, value in found if value is not None]
            if shown:
                accuracy.errorbar(
                    [value["value"] for _, value in shown],
                    [row + 0.15 * (place - 1.5) for row, _ in shown],
                    xerr=[value["se"] or 0 for _, value in shown],
                    fmt=_MARKERS[stage],
                    markersize=5,
                    color=_STAGE_COLORS[stage],
                    label=f"{stage}: right of compared candidates",
                )
        accuracy.set(xlim=(-0.02, 1.02), xlabel="accuracy, with standard error")
        accuracy.xaxis.set_major_formatter(percent)
        for axes in (fates, accuracy):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4 if axes is fates else 1, fontsize=8.5)

    return svg((11, 1.6 + 0.3 * len(parts)), draw)


def phi_figure(data: Report) -> str:
    """Mean phi of turns before and after, the paired differences, and the tokens of the new text."""
    part = data["corpus"]
    turns, tokens = part["turn_histograms"], part["token_histograms"]
    if not any(turns["original"]) and not any(turns["new"]):
        return ""

    def draw(figure: Figure) -> None:
        means, differences, new = figure.subplots(1, 3)
        space_out(figure)
        edges = data["record_edges"]
        if data["null"]["own_samples"]:
            record_histogram(means, edges, turns["rollouts"], color="#d0d0d0", fill=True, label="all rollouts")
        for text, color, label in _TEXTS:
            line = "--" if text == "original" else "-"
            record_histogram(means, edges, turns[text], color=color, label=label, linewidth=1.5, linestyle=line)
        means.set(xlabel="mean φ of a turn, nats", ylabel="share of turns per bin", ylim=(0, None))
        means.set_title("turns", loc="left")
        means.legend(loc="upper left", fontsize=8.5)
        counts = part["difference_histogram"]
        record_histogram(differences, data["difference_edges"], counts, color=_AFTER, fill=True, alpha=0.6)
        differences.set(xlabel="mean φ after − before, nats", ylabel="share of changed turns per bin", ylim=(0, None))
        differences.set_title("rewritten turns, paired", loc="left")
        for axes in (means, differences):
            axes.yaxis.set_major_formatter(percent)
        listed = [stage for stage in STAGES if tokens[stage]["tokens"]]
        for stage, line in zip(listed, ("-", "--", "-.", ":"), strict=False):
            style = {"color": _STAGE_COLORS[stage], "linestyle": line, "linewidth": 1.4}
            phi_histogram(new, data["phi_edges"], tokens[stage], label=stage, **style)
        new.set(xlabel="φ of a token, nats", ylabel="share of tokens per bin")
        new.set_title("tokens of the new text (log scale)", loc="left")
        if listed:
            finish_phi_axis(new, data["phi_edges"], (-5, 0))
            new.legend(loc="upper left", fontsize=8.5)
        for axes in (means, differences, new):
            axes.axvline(0, color="#444444", linewidth=0.8)

    return svg((11, 3.7), draw)


def sources_figure(data: Report) -> str:
    """Mean phi of the rewritten turns of each source, before and after."""
    parts = [(name, part) for name, part in _parts(data) if part["phi"]["new"]["tokens"]]
    if len(data["sources"]) < 2 or len(parts) < 2:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        series = [("original_changed", _BEFORE, "o", "before"), ("new", _AFTER, "s", "after")]
        if data["null"]["own_samples"]:
            series.insert(0, ("rollouts", OWN, "|", "all rollouts"))
        for text, color, marker, label in series:
            _dots(axes, [part["phi"][text]["phi_mean"] for _, part in parts], color, marker, label)
        axes.set_yticks(np.arange(len(parts)), [name for name, _ in parts])
        axes.invert_yaxis()
        axes.axvline(0, color="#444444", linewidth=0.8)
        axes.set(xlabel="mean φ per token, nats, with standard error")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8.5)

    return svg((11, 1.2 + 0.28 * len(parts)), draw)


def lengths_figure(data: Report) -> str:
    """Lengths of the rewritten turns, before and after."""
    lengths = data["corpus"]["lengths"]
    shown = [(lengths[text], color, label) for text, color, label in _TEXTS if lengths[text]["count"]]
    if not shown:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for part, color, label in shown:
            counts = np.array(part["histogram"])
            axes.stairs(counts / counts.sum(), 2 ** (np.arange(len(counts) + 1) / 2), color=color, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(percent)
        shortest = min(int(np.flatnonzero(part["histogram"])[0]) for part, _, _ in shown)
        axes.set(xlabel="tokens of a response", ylabel="share of turns per bin", xlim=(2 ** (shortest / 2), None))
        axes.legend(loc="upper left", fontsize=8.5)

    return svg((11, 2.7), draw)


def mixing_figure(data: Report) -> str:
    """The hint share and both streams' entropies along the response; the share's histogram; where the splitter fell."""
    mixing, splits = data["corpus"]["mixing"], _split_places(data["corpus"])
    if not mixing["tokens"]:
        return ""

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2, 3)
        space_out(figure)
        tenths = np.arange(len(mixing["deciles"]["tokens"])) + 0.5
        steps = np.arange(len(mixing["positions"]["tokens"]))
        for column, (places, part) in enumerate(((tenths, mixing["deciles"]), (steps, mixing["positions"]))):
            share, entropy = grid[0, column], grid[1, column]
            _line(share, places, part["hint_share"], color=COLORS[2])
            share.set(ylim=(-0.02, 1.02), ylabel="mean hint share")
            _line(entropy, places, part["entropy"], color=COLORS[1], linestyle="-", label="plain stream")
            _line(entropy, places, part["hinted_entropy"], color=COLORS[0], linestyle="--", label="hinted stream")
            entropy.set(ylim=(0, None), ylabel="mean entropy, nats")
            entropy.legend(fontsize=8.5)
        for axes in grid[:, 0]:
            axes.set_xticks(np.arange(0, 11, 2), [f"{10 * tenth} %" for tenth in range(0, 11, 2)])
            axes.set(xlabel="place in the response", xlim=(0, 10))
        starts = mixing["positions"]["from"]
        for axes in grid[:, 1]:
            every = max(1, -(-len(starts) // 8))
            axes.set_xticks(steps[::every], [f"{start + 1:,}" for start in starts[::every]])
            axes.set(xlabel="token of the response (buckets that double)")
        _share_histogram(grid[0, 2], mixing["histogram"])
        _splitter(grid[1, 2], splits)

    return svg((11, 5.4), draw)


def _dots(axes: Axes, values: list[EstimateNumbers | None], color: str, marker: str, label: str) -> None:
    shown = [(row, value) for row, value in enumerate(values) if value is not None]
    axes.errorbar(
        [value["value"] for _, value in shown],
        [row for row, _ in shown],
        xerr=[value["se"] or 0 for _, value in shown],
        fmt=marker,
        color=color,
        markersize=9 if marker == "|" else 5.5,
        label=label,
    )


def _parts(data: Report) -> list[tuple[str, Part]]:
    """The whole corpus, and its largest sources where there is more than one."""
    sources = data["sources"] if len(data["sources"]) > 1 else []
    named = [(visible(source_name(source["source"], 30)), source) for source in sources[:_SHOWN_SOURCES]]
    return [("whole corpus", data["corpus"]), *named]


def _line(axes: Axes, places: Any, values: list[EstimateNumbers | None], **style: Any) -> None:
    known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
    at, mean = [place for place, _ in known], np.array([value["value"] for _, value in known])
    error = np.array([value["se"] or 0 for _, value in known])
    axes.plot(at, mean, marker="o", markersize=3.5, linewidth=1.4, **style)
    axes.fill_between(at, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)


def _share_histogram(axes: Axes, counts: list[int]) -> None:
    shares = np.array(counts) / sum(counts)
    centres = (np.arange(SHARE_BINS) + 0.5) / SHARE_BINS
    axes.bar(centres, shares[1:-1], width=0.9 / SHARE_BINS, color=COLORS[2])
    axes.bar([-0.06, 1.06], shares[[0, -1]], width=0.06, color="#444444")
    axes.set_xticks([-0.06, 0.25, 0.5, 0.75, 1.06], ["= 0", "0.25", "0.5", "0.75", "= 1"])
    axes.yaxis.set_major_formatter(percent)
    axes.set(xlabel="hint share of a token from two streams", ylabel="share of tokens per bin")


def _splitter(axes: Axes, places: list[int]) -> None:
    if sum(places):
        axes.bar((np.arange(SPLIT_BINS) + 0.5) / SPLIT_BINS, np.array(places) / sum(places), width=0.09, color=OWN)
        axes.yaxis.set_major_formatter(percent)
    else:
        axes.text(0.5, 0.5, "no splitter was written", ha="center", transform=axes.transAxes)
        axes.set_yticks([])
    axes.xaxis.set_major_formatter(percent)
    axes.set(xlim=(0, 1), xlabel="where the splitter stood in the candidate", ylabel="share of split candidates")


def _split_places(part: Part) -> list[int]:
    by_stage = [part["stages"][stage]["splitter"]["places"] for stage in STAGES[1:]]
    return [sum(counts) for counts in zip(*by_stage, strict=True)]
