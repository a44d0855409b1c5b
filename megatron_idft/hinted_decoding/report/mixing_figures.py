"""Figures of lengths, and of lambda and entropy along the response, from the report's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_idft.corpus.report.drawing import COLORS, OWN, percent, space_out, svg
from megatron_idft.hinted_decoding.report.figures import AFTER, BEFORE
from megatron_idft.hinted_decoding.report.mixing import LAMBDA_BINS
from megatron_idft.hinted_decoding.report.stages import SPLIT_BINS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ENTROPIES = (("entropy", "plain stream", COLORS[1], "-"), ("hinted_entropy", "hinted stream", COLORS[0], "--"))


def lengths_figure(data: dict[str, Any]) -> str:
    """Lengths of the rewritten turns, before and after."""
    lengths = data["corpus"]["lengths"]
    shown = [(lengths[text], color, label) for text, color, label in _LENGTHS if lengths[text]["count"]]
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


_LENGTHS = (("original", OWN, "all originals"), ("original_changed", BEFORE, "before"), ("new", AFTER, "after"))


def mixing_figure(data: dict[str, Any]) -> str:
    """lambda and the entropies of both streams along the response; lambda's histogram; where the splitter fell."""
    mixing, splits = data["corpus"]["mixing"], _split_places(data["corpus"])
    if not mixing["tokens"]:
        return ""

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2, 3)
        space_out(figure)
        tenths = np.arange(len(mixing["deciles"]["tokens"])) + 0.5
        steps = np.arange(len(mixing["positions"]["tokens"]))
        for column, (places, part) in enumerate(((tenths, mixing["deciles"]), (steps, mixing["positions"]))):
            weight, entropy = grid[0, column], grid[1, column]
            _line(weight, places, part["mix_weight"], color=COLORS[2])
            weight.set(ylim=(-0.02, 1.02), ylabel="mean λ")
            for name, label, color, style in _ENTROPIES:
                _line(entropy, places, part[name], color=color, linestyle=style, label=label)
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
        _lambda_histogram(grid[0, 2], mixing["histogram"])
        _splitter(grid[1, 2], splits)

    return svg((11, 5.4), draw)


def _line(axes: Axes, places: Any, values: list[dict[str, Any] | None], **style: Any) -> None:
    known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
    at, mean = [place for place, _ in known], np.array([value["value"] for _, value in known])
    error = np.array([value["se"] or 0 for _, value in known])
    axes.plot(at, mean, marker="o", markersize=3.5, linewidth=1.4, **style)
    axes.fill_between(at, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)


def _lambda_histogram(axes: Axes, counts: list[int]) -> None:
    shares = np.array(counts) / sum(counts)
    centres = (np.arange(LAMBDA_BINS) + 0.5) / LAMBDA_BINS
    axes.bar(centres, shares[1:-1], width=0.9 / LAMBDA_BINS, color=COLORS[2])
    axes.bar([-0.06, 1.06], shares[[0, -1]], width=0.06, color="#444444")
    axes.set_xticks([-0.06, 0.25, 0.5, 0.75, 1.06], ["= 0", "0.25", "0.5", "0.75", "= 1"])
    axes.yaxis.set_major_formatter(percent)
    axes.set(xlabel="λ of a token from two streams", ylabel="share of tokens per bin")


def _splitter(axes: Axes, places: list[int]) -> None:
    if sum(places):
        axes.bar((np.arange(SPLIT_BINS) + 0.5) / SPLIT_BINS, np.array(places) / sum(places), width=0.09, color=OWN)
        axes.yaxis.set_major_formatter(percent)
    else:
        axes.text(0.5, 0.5, "no splitter was written", ha="center", transform=axes.transAxes)
        axes.set_yticks([])
    axes.xaxis.set_major_formatter(percent)
    axes.set(xlim=(0, 1), xlabel="where the splitter stood in the candidate", ylabel="share of split candidates")


def _split_places(part: dict[str, Any]) -> list[int]:
    by_stage = [part["stages"][stage]["splitter"]["places"] for stage in ("hinted", "retry")]
    return [sum(counts) for counts in zip(*by_stage, strict=True)]
