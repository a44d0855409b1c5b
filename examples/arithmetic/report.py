"""Table, plot and JSON out of each seed's results: `python report.py FOLDER --seeds 1 2 3`."""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

# Column title -> where it stands in a model's results.
COLUMNS = {
    "foreign CE": ("score", "subtraction-foreign", "cross_entropy"),
    "new task": ("decode", "subtraction-own", "accuracy"),
    "base task": ("decode", "addition-own", "accuracy"),
    "phi foreign": ("score", "subtraction-foreign", "phi_mean"),
    "std foreign": ("score", "subtraction-foreign", "phi_std"),
    "phi own": ("score", "addition-own", "phi_mean"),
    "std own": ("score", "addition-own", "phi_std"),
}
LEGEND = """foreign CE   plain cross-entropy on held-out records of the fine-tuning corpus, nats per token
new task     held-out subtractions answered right (greedy), whatever the style
base task    held-out additions answered right: what fine-tuning on subtractions left of them
phi, std     mean and standard deviation of phi = log p + entropy over trained tokens: of the same held-out records of
             the fine-tuning corpus (foreign), and of held-out additions in the base model's own style (own)"""
COLORS = {"base": "black", "ce": "tab:red", "dft": "tab:blue", "idft": "tab:green"}


def collect(results: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Model -> column -> one value for each seed."""
    return {
        model: {title: [seed[model][a][b][c] for seed in results] for title, (a, b, c) in COLUMNS.items()}
        for model in results[0]
    }


def table(values: dict[str, dict[str, list[float]]]) -> str:
    def cell(title: str, numbers: list[float]) -> str:
        scale, form = (100, "{:.1f}") if title.endswith("task") else (1, "{:.3f}")
        text = form.format(scale * mean(numbers)) + ("%" if scale == 100 else "")
        return text + (f" ± {form.format(scale * stdev(numbers))}" if len(numbers) > 1 else "")

    rows = [["model", *COLUMNS]]
    rows += [[model, *(cell(title, numbers) for title, numbers in cells.items())] for model, cells in values.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot(values: dict[str, dict[str, list[float]]], label: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (trade, foreign, spread) = pyplot.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    models, colors = list(values), [COLORS[model.split("-")[0]] for model in values]
    for model, color in zip(models, colors, strict=True):
        x, y = values[model]["new task"], values[model]["base task"]
        trade.scatter(x, y, color=color, s=12, alpha=0.4)  # each seed
        trade.scatter(mean(x), mean(y), color=color)
        place = (5, -11) if model.startswith("dft") else (5, 4)  # dft and idft often lie together
        trade.annotate(model, (mean(x), mean(y)), xytext=place, textcoords="offset points", fontsize=8, color=color)
    trade.set(
        xlabel="new task: subtractions right", ylabel="base task: additions right", xlim=(-0.03, 1.1), ylim=(-0.03, 1.1)
    )
    trade.set_title("learnt and kept: up and right is better")
    foreign.bar(models, [mean(values[model]["foreign CE"]) for model in models], color=colors)
    foreign.set_title("cross-entropy on held-out foreign records")
    places = range(len(models))
    for corpus, marker, shift in (("foreign", "o", -0.12), ("own", "s", 0.12)):
        means, stds = ([mean(values[model][f"{key} {corpus}"]) for model in models] for key in ("phi", "std"))
        x = [place + shift for place in places]
        spread.errorbar(x, means, stds, fmt=marker, capsize=3, label=f"{corpus}-style records")
    spread.set_xticks(places, models)
    spread.axhline(0, color="gray", linewidth=0.5)
    spread.set_title("phi: mean, and standard deviation as bars")
    spread.margins(y=0.15)
    spread.legend(loc="upper center", ncols=2)
    for axes in (foreign, spread):
        axes.tick_params(axis="x", rotation=30)
    figure.suptitle(label)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", required=True)
    args = parser.parse_args()
    paths = [args.folder / f"seed-{seed}" / "results.json" for seed in args.seeds]
    values = collect([json.loads(path.read_text(encoding="utf-8")) for path in paths])
    if len(args.seeds) == 1:
        label = f"illustration: one seed ({args.seeds[0]}), so differences may be chance"
    else:
        label = f"mean ± standard deviation over seeds {', '.join(args.seeds)}"
    text = f"{label}\n\n{table(values)}\n\n{LEGEND}\n"
    (args.folder / "report.txt").write_text(text, encoding="utf-8")
    (args.folder / "report.json").write_text(
        json.dumps({"label": label, "seeds": args.seeds, "values": values}, indent=2) + "\n", encoding="utf-8"
    )
    plot(values, label, args.folder / "report.png")
    print(f"\n{text}\nAlso in {args.folder}: report.txt, report.json, report.png")


if __name__ == "__main__":
    main()
