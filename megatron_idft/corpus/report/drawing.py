"""How figures are drawn: their style, histograms with open tails, and SVG as data URIs."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_idft.corpus.report.numbers import Histogram
from megatron_idft.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; own samples are grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", ":", "-.")
OWN = "#8a8a8a"
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names may hold dollar signs
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron-idft",  # else ids are random, and equal reports would differ
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def with_tails(edges: list[float]) -> list[float]:
    width = edges[1] - edges[0]
    return [edges[0] - width, *edges, edges[-1] + width]


def phi_histogram(axes: Axes, edges: list[float], histogram: Histogram, **style: Any) -> None:
    if histogram["tokens"]:
        share = np.array(histogram["counts"]) / histogram["tokens"]
        axes.stairs(np.where(share > 0, share, np.nan), with_tails(edges), baseline=1e-12, **style)


def record_histogram(axes: Axes, edges: list[float], counts: list[int], **style: Any) -> None:
    used = np.flatnonzero(counts)
    if len(used):
        low, high = int(used[0]), int(used[-1]) + 1
        axes.stairs(np.array(counts[low:high]) / sum(counts), with_tails(edges)[low : high + 1], **style)


def percent(share: float, _: object) -> str:
    return f"{100 * share:g} %"


def finish_phi_axis(
    axes: Axes, edges: list[float], ticks: Sequence[float] = (-8, -6, -4, -2, 0, 2), shared: Iterable[Axes] = ()
) -> None:
    """Give an axis of phi its scale, ticks and labels.

    Args:
        axes: with histograms.
        edges: of their bins.
        ticks: of phi, in nats.
        shared: the axes that share this scale.
    """
    tails = with_tails(edges)
    ticks = [edges[0], *ticks, edges[-1]]
    labels = [f"≤ {edges[0]:g}", *(f"{tick:g}" for tick in ticks[1:-1]), f"≥ {edges[-1]:g}"]
    axes.set_xticks(ticks, [label.replace("-", "−") for label in labels])
    axes.set(yscale="log", xlim=(tails[0], tails[-1]))
    patches = [patch for one in shared or [axes] for patch in one.patches if hasattr(patch, "get_data")]
    smallest = [float(np.nanmin(patch.get_data().values)) for patch in patches]
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(percent)
    axes.set_ylim(max(min(smallest, default=1e-3) * 0.5, 1e-7), 1.5)


def space_out(figure: Figure) -> None:
    """Room between neighbours, whose outer tick labels touch else."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(wspace=0.05, hspace=0.05)  # type: ignore[call-arg]


def svg(size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the report needs matplotlib, which is not installed: pip install matplotlib") from None

    out = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Measuring a label in a script that matplotlib's font lacks; the browser that draws it has more fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=metadata)
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode("ascii")
