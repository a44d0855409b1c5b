"""The closing table of the example: `python table.py FOLDER`. Each number is read from the file that the row names."""

import json
import re
import sys
from pathlib import Path
from typing import Any

NUMBER = r"(-?[\d.]+(?:E[+-]\d+)?)"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def course(pattern: str, log: str) -> str:
    """The first and the last of a training's values, with their steps; `pattern` matches step and value."""
    values = re.findall(pattern, log)
    return ", ".join(f"{float(value):.4f} at step {step}" for step, value in dict.fromkeys((values[0], values[-1])))


def rows(folder: Path) -> list[tuple[str, str, Path]]:
    """(quantity, value, file)."""
    scores, realigned = folder / "scores" / "report.json", folder / "realigned" / "report.json"
    log = folder / "tuned.log"
    report = read(scores)
    table = []
    for name, corpus in (("worked solutions", report["corpora"][0]), ("own samples", report["nulls"][0])):
        phi = corpus["summary"]["phi_mean"]
        table.append((f"phi, {name}", f"{phi['value']:+.3f} ± {phi['se']:.3f} per token", scores))
    records = read(realigned)["corpus"]["records"]
    table.append(("realigned", f"{records['kept']} of {records['total']} records kept", realigned))
    text = log.read_text(encoding="utf-8", errors="replace")
    table.append(
        ("validation lm loss", course(rf"validation loss at iteration (\d+).*?lm loss value: {NUMBER}", text), log)
    )
    table.append(("idft objective", course(rf"sft iteration +(\d+)/ +\d+ \| sft loss: {NUMBER}", text), log))
    return table


def main() -> None:
    folder = Path(sys.argv[1])
    lines = rows(folder)
    width, middle = max(len(row[0]) for row in lines), max(len(row[1]) for row in lines)
    for name, value, path in lines:
        print(f"{name:{width}}   {value:{middle}}   {path}")
    print()
    for title, path in (
        ("report on the corpus", "scores/report.html"),
        ("report on the realigned records", "realigned/report.html"),
        ("the tuned model", "tuned/hf"),
    ):
        print(f"{title}: {(folder / path).resolve()}")
    stages = [line.split("\t") for line in (folder / "stages.tsv").read_text(encoding="utf-8").splitlines()]
    print("seconds: " + ", ".join(f"{name} {seconds}" for name, seconds in stages))


if __name__ == "__main__":
    main()
