"""docs/flags.md is what the parsers say."""

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_flags_is_what_its_script_gives():
    page = runpy.run_path(str(DOCS / "flags.py"))["page"]()
    there = (DOCS / "flags.md").read_text(encoding="utf-8")
    assert there == page, "a flag has changed: python docs/flags.py"
    assert there.count("\n| `--") > 120
