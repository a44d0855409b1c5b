"""Pages and tables that programs of docs/ write are what their sources say."""

import json
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


def test_the_table_of_objectives_is_what_its_script_gives():
    there = (DOCS / "loss.md").read_text(encoding="utf-8")
    assert there == runpy.run_path(str(DOCS / "objectives.py"))["page"](there), "python docs/objectives.py"
    assert "\n| `idft` |" in there and "## The loss kernels" in there


def test_the_tables_of_the_output_head_are_what_their_results_give():
    there = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert there == runpy.run_path(str(DOCS / "head.py"))["page"](there), "python docs/head.py"
    assert "| between trainings | materialised |" in there


def test_the_page_of_kernels_is_what_its_results_give():
    program = runpy.run_path(str(DOCS.parent / "tools" / "benchmarks" / "triton_versions.py"), run_name="page")
    result = json.loads(program["RESULT"].read_text())
    assert (DOCS / "triton.md").read_text(encoding="utf-8") == program["page"](result)
    minors = {int(version.split(".")[1]) for version in result["versions"]}
    assert minors >= set(range(4, 10)), "from setup.py's floor to the newest"
    for version, entry in result["versions"].items():
        names = {(one["capability"], one["kernel"]) for one in entry["kernels"]}
        assert len(names) == 3 * 6, f"{version}: three generations, six kernels"
        bad = [one for one in entry["kernels"] if one.get("error") or one["spilled_bytes"]]
        spilling = {(version, one.get("capability"), one["kernel"]) for one in bad}
        assert spilling <= {(newest, 80, "_attend_kernel") for newest in ("3.8.0", "3.9.0")}, "in fp32"


def test_the_pages_name_flags_that_there_are():
    there = set(re.findall(r"--[a-z][\w-]+", (DOCS / "flags.md").read_text(encoding="utf-8")))
    for page in [DOCS.parent / "README.md", *DOCS.glob("*.md")]:
        ours = set(
            re.findall(r"--(?:sft|idft|power|hf|save-hf|mix|rollout|no-sft)\b[\w-]*", page.read_text(encoding="utf-8"))
        )
        assert ours - there <= {"--sft"}, page.name
