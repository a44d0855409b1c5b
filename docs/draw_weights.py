"""Draw docs/token_weights.svg, the README's picture: the weight that IDFT gives a token.

    python docs/draw_weights.py [FILE.svg]

The weights are those of `megatron_idft.objectives`, with the default settings.
"""

import io
import math
import re
import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from megatron_idft.objectives import resolve_objective
from megatron_idft.statistics import TokenStatistics

VOCABULARY = 100_000
LOWEST_LOG_PROB, LARGEST_ENTROPY = -6.0, 5.5
ENTROPIES = (0.7, 1.5, 3.0)  # of the curves on the right, in nats
LEVELS = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9)


def weight(objective: str, log_prob: Tensor, entropy: Tensor) -> Tensor:
    """[...] fp32 weights of trained tokens. log_prob, entropy: [...] fp32, in nats."""
    labels = torch.zeros(log_prob.shape, dtype=torch.int64)
    return resolve_objective(objective).weight(TokenStatistics(log_prob, entropy, labels, VOCABULARY))


def possible_entropies(prob: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest entropy of a distribution over VOCABULARY tokens, one of which has `prob`."""
    of_two = -torch.xlogy(prob, prob) - torch.xlogy(1 - prob, 1 - prob)
    return of_two, of_two + (1 - prob) * math.log(VOCABULARY - 1)


def draw_map(axes: Axes) -> None:
    """w over log p and H. White: such a pair does not occur in a vocabulary of this size."""
    log_prob = torch.linspace(LOWEST_LOG_PROB, 0, 49)
    entropy = torch.linspace(0, LARGEST_ENTROPY, 49)
    w = weight("idft", *torch.meshgrid(log_prob, entropy, indexing="xy"))
    filled = axes.contourf(log_prob, entropy, w, levels=[i / 10 for i in range(11)], cmap="YlGnBu")
    axes.figure.colorbar(filled, ax=axes, label="weight w", ticks=[0, 0.5, 1], pad=0.02)
    lines = axes.contour(log_prob, entropy, w, levels=LEVELS, colors="0.25", linewidths=0.6)
    axes.clabel(lines, fmt="%g", fontsize=7)
    edge = torch.linspace(LOWEST_LOG_PROB, 0, 121)
    low, high = possible_entropies(edge.exp())
    axes.fill_between(edge, 0, low, color="white", zorder=3)
    axes.fill_between(edge, high, LARGEST_ENTROPY, where=high <= LARGEST_ENTROPY, color="white", zorder=3)
    axes.plot(log_prob, -log_prob, color="tab:red", dashes=(4, 2), linewidth=1.4)
    axes.text(-4.85, 4.4, "φ = 0", color="tab:red", ha="right")
    axes.text(-5.8, 1.0, "φ ≪ 0: improbable, though\nthe model is sure", fontsize=8)
    axes.text(-0.7, 4.6, "φ > 0: likelier\nthan usual here", fontsize=8, color="white", ha="right")
    axes.set(title="The weight of a token in IDFT", xlabel="log p of the token (nats)")
    axes.set(ylabel="entropy H of the distribution (nats)", xlim=(LOWEST_LOG_PROB, 0), ylim=(0, LARGEST_ENTROPY))


def draw_curves(axes: Axes) -> None:
    """w over p: cross-entropy, DFT, and IDFT at three entropies."""
    prob = torch.linspace(0.002, 1, 120)
    log_prob = prob.log()
    axes.plot(prob, weight("ce", log_prob, log_prob), color="0.6", label="ce: w = 1", gid="ce")
    axes.plot(prob, weight("dft", log_prob, log_prob), color="0.2", dashes=(4, 2), label="dft: w = p", gid="dft")
    for entropy, color in zip(ENTROPIES, ("tab:green", "tab:blue", "tab:purple"), strict=True):
        low, high = possible_entropies(prob)
        w = weight("idft", log_prob, torch.full_like(prob, entropy))
        w = torch.where((entropy < low) | (entropy > high), torch.nan, w)
        axes.plot(prob, w, color=color, label=f"idft, H = {entropy:g} nats", gid=f"idft-{entropy:g}")
    axes.set(title="Beside cross-entropy and DFT", xlabel="p of the token", ylabel="weight w")
    axes.set(xlim=(0, 1), ylim=(0, 1.05))
    axes.legend(fontsize=8, loc="lower right")


def draw(path: Path) -> None:
    """Write the picture. The axes have fixed places, so every version of matplotlib gives the same coordinates."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "weights", "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9, 3.8), facecolor="white")
        draw_map(figure.add_axes((0.06, 0.14, 0.47, 0.76)))
        draw_curves(figure.add_axes((0.61, 0.14, 0.37, 0.76)))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # Hundredths of a point are enough, and halve the file.
    path.write_text(re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", text.getvalue()), encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("token_weights.svg"))
