"""The tables of one run, out of its reports: `python table.py FOLDER`."""

import json
import sys
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def estimate(value: dict[str, float | None]) -> str:
    error = value["se"]
    return f"{value['value']:+.3f}" + (f" ± {error:.3f}" if error is not None else "")


def share(right: int, records: int) -> str:
    value = right / records
    return f"{100 * value:.1f} ± {100 * (value * (1 - value) / records) ** 0.5:.1f} %"


def phi_row(name: str, numbers: dict[str, Any]) -> list[str]:
    shares = f"{numbers['phi_below_1']['value']:.1%}"
    spread = f"{numbers['phi_std']['value']:.2f}"
    mean_log_prob = f"{numbers['log_prob_mean']['value']:.2f}"
    return [name, str(numbers["records"]), estimate(numbers["phi_mean"]), spread, shares, mean_log_prob]


def phi_table(folder: Path) -> list[list[str]]:
    """Before and after, as `score` measures both, and own answers as `score --calibrate` samples them."""
    compared = read(folder / "compared" / "report.json")
    before, after = (corpus["summary"] for corpus in compared["corpora"])
    own = [null for null in compared["nulls"] if null["temperature"] == 1]
    rows = [phi_row("own samples, T = 1", null["summary"]) for null in own]
    rows += [phi_row("corpus as it is", before), phi_row("realigned", after)]
    phi = read(folder / "realigned" / "report.json")["corpus"]["phi"]
    for stage in ("rollout", "hinted", "second_hint", "retry"):
        if phi[f"new_{stage}"]["records"]:
            rows.append(phi_row(f"of these: {stage}", phi[f"new_{stage}"]))
    return [["text", "records", "mean phi", "spread", "below −1", "mean log p"], *rows]


def mixing_table(folder: Path) -> list[list[str]]:
    rows = []
    for name, title in (("hinted", "1"), ("entropy", "by entropy, slope 3"), ("plain", "0")):
        part = read(folder / f"mixed-{name}" / "report.json")["corpus"]
        stage = part["stages"]["hinted"]
        right = share(stage["right"], stage["candidates"])
        mean_share = f"{part['mixing']['means']['hint_share']['value']:.3f}"
        rows.append([title, mean_share, right, estimate(part["phi"]["new"]["phi_mean"])])
    return [["hint share", "its mean", "right", "mean phi of these"], *rows]


def answer_table(folder: Path) -> list[list[str]]:
    answers = read(folder / "answers.json")
    tests = list(next(iter(answers.values())))
    base = answers["base"]
    rows = []
    for model, found in answers.items():
        cells = [share(found[test]["right"], found[test]["records"]) for test in tests]
        kept = found["larger greedy"]["right"] / max(base["larger greedy"]["right"], 1)
        rows.append([model, *cells, f"{kept:.0%}"])
    return [["model", *tests, "kept of larger"], *rows]


def show(rows: list[list[str]]) -> str:
    """As a table in Markdown, its columns aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: list[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)][1:]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *numbers]) + " |"

    return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])


def main(folder: Path) -> None:
    tables = [phi_table(folder), answer_table(folder)]
    if (folder / "mixed-entropy").exists():
        tables.insert(1, mixing_table(folder))
    for rows in tables:
        print(f"\n{show(rows)}")
    print()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
