"""Write the results in the study's README and in docs/loss.md from results/cpu.json: `python readme.py [--check]`.

The page and the picture beside it are made from the same file: `python readme.py --take FOLDER` copies report.json of a
finished study there and draws both.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from page import claims_table, page, where_table
from picture import draw

HERE = Path(__file__).resolve().parents[1]
RESULTS = HERE / "results"
BLOCK = re.compile(r"(<!-- made by examples/study/report/readme.py -->\n).*?(<!-- end -->)", re.DOTALL)
IN_DOCS = ["P1", "P3", "P4", "P6", "P9", "P15", "P17", "P19", "P21", "P22", "P24", "P25", "P26", "P27", "P29", "P30"]
IN_DOCS += ["L1", "L2", "L4"]
IN_DOCS_WHERE = ["original, before", *(f"original, after {arm}" for arm in ("sft", "idft", "idft_floor"))]
IN_DOCS_WHERE += ["realigned, before"]


def results(path: Path) -> str:
    """What stands between the two comments."""
    report = json.loads(path.read_text(encoding="utf-8"))
    return (
        f"Size {report['size']}, {report['problems']['target']} test problems; everything else is on"
        f" [the page](results/study.md).\n\n{claims_table(report['claims'] + report['seen_later'])}\n\n"
        "![the target's accuracy against what was kept, and against the distance](results/study.svg)"
    )


def in_docs(path: Path) -> str:
    """The claims that a user of the loss asks for first, where they were judged, and where the gradient goes."""
    report = json.loads(path.read_text(encoding="utf-8"))
    claims = report["claims"] + report["seen_later"]
    known = [claim for claim in claims if claim["id"] in IN_DOCS and claim["seeds"] > 1]
    where = where_table({text: report["where"][text] for text in IN_DOCS_WHERE}, ("ce", "dft", "idft"))
    return (
        f"{claims_table(known)}\n\n"
        f"Mean weight / share of the gradient of each kind of token under each loss, by the base model and by trained\n"
        f"ones:\n\n{where}"
    )


PAGES: dict[Path, Callable[[Path], str]] = {HERE / "README.md": results, HERE.parents[1] / "docs" / "loss.md": in_docs}


def written(page: Path, path: Path) -> str:
    """The page with the results of `path`."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{PAGES[page](path)}\n\n{found[2]}", page.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the pages have these results")
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="a study's folder, whose report is taken first")
    args = parser.parse_args()
    path = RESULTS / "cpu.json"
    if args.take:
        RESULTS.mkdir(exist_ok=True)
        shutil.copyfile(args.take / "report.json", path)
        report = json.loads(path.read_text(encoding="utf-8"))
        (RESULTS / "study.md").write_text(page(report), encoding="utf-8")
        draw(report, RESULTS / "study.svg")
    changed = False
    for one in PAGES:
        text = written(one, path)
        changed |= text != one.read_text(encoding="utf-8")
        if not args.check:
            one.write_text(text, encoding="utf-8")
    return int(args.check and changed)


if __name__ == "__main__":
    sys.exit(main())
