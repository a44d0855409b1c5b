"""The table of the rounds so far, and whether to go on: `python decide.py FOLDER ROUND`.

Exit code 0: go on. 3: the round's verified share or mean phi has fallen below the best of the earlier rounds by more
than --errors standard errors of the difference.
"""

import argparse
import json
import sys
from math import hypot
from pathlib import Path
from typing import Any

STOP = 3
# name -> (file, the place of the number in it)
NUMBERS = {
    "verified share": ("held-out/report.json", ("corpus", "stages", "rollout", "turns_right_share")),
    "mean phi": ("scores/report.json", ("corpora", 0, "summary", "phi_mean")),
}
KEPT = ("realigned/report.json", ("corpus", "records"))


def read(path: Path, place: tuple[Any, ...]) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for key in place:
            found = found[key]
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f"decide.py: {path}: no {'.'.join(map(str, place))} ({error!r}): delete that folder and start again")
    return found


def read_round(folder: Path, number: int) -> dict[str, Any]:
    """The numbers of a round, each with its standard error and the file that it was read from."""
    home = folder / f"round-{number}"
    found: dict[str, Any] = {"round": number}
    for name, (file, place) in NUMBERS.items():
        value = read(home / file, place)
        if value is None or value["se"] is None:
            sys.exit(f"decide.py: {home / file}: too few held-out records for a {name} with a standard error")
        found[name] = {"value": value["value"], "se": value["se"], "file": str(home / file)}
    if number:
        records = read(home / KEPT[0], KEPT[1])
        found["kept"] = {"value": records["kept"], "of": records["total"], "file": str(home / KEPT[0])}
    return found


def fallen(rounds: list[dict[str, Any]], errors: float) -> list[str]:
    """Which numbers of the last round have fallen, in words."""
    *earlier, last = rounds
    said = []
    for name in NUMBERS if earlier else ():
        best = max(earlier, key=lambda one: one[name]["value"])
        difference = last[name]["value"] - best[name]["value"]
        error = hypot(last[name]["se"], best[name]["se"])
        if difference < -errors * error:
            said.append(
                f"its {name} is {-difference:.3f} below round {best['round']}'s, with a standard error of {error:.3f}"
            )
    return said


def table(rounds: list[dict[str, Any]]) -> list[str]:
    rows = [["round", "kept", *NUMBERS]]
    for one in rounds:
        kept = f"{one['kept']['value']} of {one['kept']['of']}" if "kept" in one else ""
        numbers = [f"{one[name]['value']:+.3f} ± {one[name]['se']:.3f}" for name in NUMBERS]
        rows.append([str(one["round"]), kept, *numbers])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("round", type=int)
    parser.add_argument("--errors", type=float, default=2.0, help="standard errors that a fall is; default 2")
    parser.add_argument("--model", required=True, help="the Hugging Face folder that the round ended with")
    args = parser.parse_args()
    rounds = [read_round(args.folder, number) for number in range(args.round + 1)]
    why = fallen(rounds, args.errors)
    print("\n".join(f"        {line}" for line in table(rounds)))
    for name in ("kept", *NUMBERS):
        if name in rounds[-1]:
            print(f"        {name}: {rounds[-1][name]['file']}")
    written = {"errors": args.errors, "rounds": rounds, "stopped_because": why}
    (args.folder / "rounds.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    if why:
        print(
            f"        stopped after round {args.round}: {' and '.join(why)}; keep the model of round {args.round - 1}"
        )
        sys.exit(STOP)
    print(f"        model: {args.model}")


if __name__ == "__main__":
    main()
