"""One version, and files of a release that agree with the code."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

import megatron_idft

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_has_one_version():
    found = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split()[-1] == megatron_idft.__version__
    assert megatron_idft.__version__ not in (ROOT / "setup.py").read_text()
    headings = re.findall(r"(?m)^## (.+)$", (ROOT / "CHANGELOG.md").read_text())
    assert headings[:2] == ["Unreleased", megatron_idft.__version__]
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_hooks_before_a_commit_are_the_checks_of_the_test_command():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    checks = re.findall(r"(?m)^\.venv/bin/(?:ruff|mypy).*$", (ROOT / "tests" / "run.sh").read_text())
    assert [hook["entry"] for hook in repository["hooks"]] == checks and len(checks) == 3
