"""The picture of a study: the target's accuracy against what was kept, and against the distance, all arms."""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

KEPT = "retention: of other tasks' problems that the base has right"
NEAR = 0.01  # nats; from there on the distance is drawn logarithmically


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the SVG. Each line is an arm at its chosen learning rate, from the base model along its checkpoints.

    Fair rivals are also shown: `sft` at the rate at which it stays as near as `idft` on the same corpus.
    """
    fair = report["choice"]["fair"]
    arms = [one for one in report["arms"] if one["chosen"] or fair.get(one["arm"]) == one["rate"]]
    settings = {"svg.fonttype": "none", "svg.hashsalt": "study", "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(10, 4.4), facecolor="white")
        kept, near = figure.add_axes((0.07, 0.12, 0.36, 0.76)), figure.add_axes((0.49, 0.12, 0.36, 0.76))
        colors = matplotlib.color_sequences["tab20"]
        for i, arm in enumerate(arms):
            color, dashes = colors[i % 20], (4, 2) if "-" in arm["arm"] else (1, 0)
            target, retention = ([known(point[key]) for point in arm["points"]] for key in ("target", "retention"))
            line = {"color": color, "dashes": dashes, "marker": "o", "markersize": 3, "linewidth": 1.2}
            kept.plot(
                retention, target, label=arm["arm"] if arm["chosen"] else f"{arm['arm']} at {arm['rate']}", **line
            )
            near.plot([point["kl"] for point in arm["points"]], target, **line)
            near.errorbar(
                arm["points"][-1]["kl"],
                target[-1],
                [[target[-1] - arm["target"][1]], [arm["target"][2] - target[-1]]],
                color=color,
                linewidth=0.8,
                alpha=0.6,
                capsize=2,
            )
        begin(kept, report, known(report["base"]["retention"]))
        begin(near, report, 0)
        kept.set(title="Learned and kept: up and right is better", xlabel=KEPT, ylabel="target: greedy answers right")
        near.set(title="Learned at the same distance", xlabel="KL from the base model, chat, nats per token")
        near.set_xscale("symlog", linthresh=NEAR)  # most arms end within a tenth of the way of the farthest ones
        near.xaxis.set_major_formatter("{x:g}")
        figure.legend(loc="center right", fontsize=8, frameon=False)
        if report["means_nothing"]:
            figure.suptitle("SMOKE RUN: sizes are tiny, the numbers mean nothing", color="red", y=0.99)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    path.write_text(re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", text.getvalue()), encoding="utf-8")


def known(value: float | None) -> float:
    """NaN, which is not drawn, for null."""
    return float("nan") if value is None else value


def begin(axes: Axes, report: dict[str, Any], x: float) -> None:
    """The base model."""
    axes.plot(x, report["base"]["target"], "k*", markersize=9, zorder=3)
    axes.annotate("base", (x, report["base"]["target"]), xytext=(4, -10), textcoords="offset points", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
