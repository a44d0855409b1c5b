"""docs/flags.md and the table of docs/architecture.md are what the code says."""

import re
import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_flags_is_what_its_script_gives():
    page = runpy.run_path(str(DOCS / "flags.py"))["page"]()
    there = (DOCS / "flags.md").read_text(encoding="utf-8")
    assert there == page, "a flag has changed: python docs/flags.py"
    assert there.count("\n| `--") > 120


def test_the_table_of_changes_is_what_its_script_gives():
    there = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert there == runpy.run_path(str(DOCS / "changes.py"))["page"](there), "python docs/changes.py"


def test_the_pages_name_flags_that_there_are():
    there = set(re.findall(r"--[a-z][\w-]+", (DOCS / "flags.md").read_text(encoding="utf-8")))
    for page in [DOCS.parent / "README.md", *DOCS.glob("*.md")]:
        ours = set(
            re.findall(r"--(?:sft|idft|hf|save-hf|mix|rollout|no-sft)\b[\w-]*", page.read_text(encoding="utf-8"))
        )
        assert ours - there <= {"--sft"}, page.name
