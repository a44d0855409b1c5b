"""One picture of a loss benchmark: forward + backward by implementation for each tensor-parallel size."""

from pathlib import Path
from typing import Any

SHAPE = "8192 x 131072, tp "


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [one for one in result["cases"] if one["name"].startswith(SHAPE) and one["dtype"] == "bf16"]
    records = [one for one in records if "not_measured" not in one and one["compared"] == "all"]
    names = list(dict.fromkeys(one["name"] for record in records for one in record["implementations"]))
    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    width = 0.85 / max(len(names), 1)
    colors = pyplot.get_cmap("tab20").colors
    for index, name in enumerate(names):
        for position, record in enumerate(records):
            one = next(one for one in record["implementations"] if one["name"] == name)
            if one["status"] != "measured":
                continue
            x = position - 0.425 + (index + 0.5) * width
            label = name if not any(text == name for text in axes.get_legend_handles_labels()[1]) else None
            axes.bar(x, one["total_ms"], width * 0.92, color=colors[index % 20], label=label)
            axes.text(x, one["total_ms"], f" {one['total_ms']:.3g}", rotation=90, ha="center", va="bottom", fontsize=7)
    for position, record in enumerate(records):
        # 2 bytes read in forward, 2 read and 2 written in backward: 1.5 times what a copy moves.
        floor = 1.5 * record["copy_ms"]
        label = "6 bytes per element at the speed of a copy" if position == 0 else None
        axes.hlines(floor, position - 0.45, position + 0.45, color="black", linestyle="--", linewidth=1, label=label)
    axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.set_xticks(range(len(records)), [f"tp {one['tp']}\n{one['columns']} columns" for one in records])
    axes.set_ylabel("forward + backward, ms (median, logarithmic)")
    axes.set_title(f"Loss of 8192 tokens over a vocabulary of 131072 in bf16: {result['machine']['device']}")
    if result["mode"] != "measured":
        axes.set_title("SMOKE RUN: shapes are tiny, times mean nothing", color="red")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=150)
