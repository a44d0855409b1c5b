"""Packages that declare not to work together, as pip leaves them beside each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_idft.integration.platform.combinations import conflicts
from tests.launch import ROOT


def place(folder: Path, name: str, version: str, *requirements: str) -> None:
    """What an installer leaves of a package: its metadata."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requirements)]) + "\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_pin_that_is_not_met(site):
    place(site, "transformers", "5.24.0")
    place(site, "megatron-bridge", "0.6.2", "transformers<=5.12.1", "nowhere>=3", 'transformers>=9; extra == "all"')
    (conflict,) = conflicts(("megatron-bridge",))
    assert conflict == ("megatron-bridge 0.6.2", "transformers<=5.12.1", "5.24.0")


@pytest.mark.parametrize("version", ["2.9.0", "2.9.0+cu130", "2.10.0a0+gitabc.nv25.10"])
def test_builds_of_containers_meet_lower_bounds(site, version):
    place(site, "torch", version)
    place(site, "flash-attn", "2.8.3", "torch>=2.9")
    assert not list(conflicts(("flash-attn",)))


def test_doctor_names_the_combination_and_the_remedy(site):
    place(site, "transformers", "5.24.0")
    place(site, "megatron-bridge", "0.6.2", "transformers<=5.12.1")
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "megatron_idft", "doctor"]
    told = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=300)
    assert "megatron-bridge 0.6.2 asks for transformers<=5.12.1, here is 5.24.0" in told.stdout
    assert 'pip install "transformers<=5.12.1"' in told.stdout
    assert told.returncode == 0, "a declared pin is no proof that training cannot start"
