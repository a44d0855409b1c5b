"""The closing table of the example: `python table.py FOLDER OBJECTIVE …`, each row from OBJECTIVE/tensorboard."""

import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LAST = 8  # steps whose trained tokens the columns of the reference are means over
TITLES = ("", "problems", "own answers", "log p/q, step 1", "log p/q", "below -3", "k3")
LEGEND = f"""problems, own answers   cross-entropy of held-out problems and of the model's answers, after the last step
log p/q, below -3, k3   reference/log ratio mean, its share below -3, and reference/k3, of the last {LAST} steps"""

Scalars = dict[str, dict[int, float]]  # key -> step -> value


def read(folder: Path) -> Scalars:
    """What a training wrote for TensorBoard; the same numbers as in its log, with all their digits."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {key: {event.step: event.value for event in events.Scalars(key)} for key in events.Tags()["scalars"]}


def at_the_end(scalars: Scalars, key: str) -> float:
    """The mean over the trained tokens of the last steps."""
    steps = sorted(scalars[key])[-LAST:]
    tokens = scalars["trained tokens"]
    return sum(scalars[key][step] * tokens[step] for step in steps) / sum(tokens[step] for step in steps)


def row(name: str, scalars: Scalars) -> list[str]:
    validation = [scalars[f"lm loss validation-{data}"] for data in ("problems", "answers")]
    ratio = scalars["reference/log ratio mean"]
    keys = ("reference/log ratio mean", "reference/log ratio below -3", "reference/k3")
    ends = [at_the_end(scalars, key) for key in keys]
    cells = [*(values[max(values)] for values in validation), ratio[min(ratio)], *ends]
    return [name, *(f"{value:.4f}" for value in cells)]


def main() -> None:
    folder, objectives = Path(sys.argv[1]), sys.argv[2:]
    runs = {name: read(folder / name / "tensorboard") for name in objectives}
    untrained = [runs[objectives[0]][f"lm loss validation-{data}"][0] for data in ("problems", "answers")]
    rows = [list(TITLES), ["the model", *(f"{value:.4f}" for value in untrained), "", "", "", ""]]
    rows += [row(name, scalars) for name, scalars in runs.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(text.rjust(width) for text, width in zip(cells, widths, strict=True)).rstrip())
    print(f"\n{LEGEND}")
    for name in objectives:
        print(f"{name}: {(folder / name).resolve()}.log, {(folder / name / 'tensorboard').resolve()}")


if __name__ == "__main__":
    main()
