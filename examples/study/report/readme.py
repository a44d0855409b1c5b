"""Write the results in the study's README from results/cpu.json: `python readme.py [--check]`.

The page and the picture beside it are made from the same file: `python readme.py --take FOLDER` copies report.json of a
finished study there and draws both.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from page import claims_table, page
from picture import draw

HERE = Path(__file__).resolve().parents[1]
README, RESULTS = HERE / "README.md", HERE / "results"
BLOCK = re.compile(r"(<!-- made by report/readme.py -->\n).*?(<!-- end -->)", re.DOTALL)


def results(path: Path) -> str:
    """What stands between the two comments."""
    if not path.exists():
        return "Not run yet."
    report = json.loads(path.read_text(encoding="utf-8"))
    seeds, problems = len(report["seeds"]), report["problems"]
    return (
        f"Size {report['size']}, {seeds} seeds, {problems['target']} test problems; everything else is on"
        f" [the page](results/study.md).\n\n{claims_table(report)}\n\n"
        "![the target's accuracy against what was kept, and against the distance](results/study.svg)"
    )


def written(readme: str, path: Path) -> str:
    """The README with the results of `path`."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{results(path)}\n\n{found[2]}", readme)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the README has these results")
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="a study's folder, whose report is taken first")
    args = parser.parse_args()
    path = RESULTS / "cpu.json"
    if args.take:
        RESULTS.mkdir(exist_ok=True)
        shutil.copyfile(args.take / "report.json", path)
        report = json.loads(path.read_text(encoding="utf-8"))
        (RESULTS / "study.md").write_text(page(report), encoding="utf-8")
        draw(report, RESULTS / "study.svg")
    before = README.read_text(encoding="utf-8")
    after = written(before, path)
    if args.check:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
