"""Mixed and unserved installations of Megatron are refused before they fail elsewhere."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from tests.launch import ROOT, forking_python

CHECK = """
import sys
from megatron_idft.integration.platform import compatibility
sys.path[:0] = {first!r}
{before}
print(compatibility.check_megatron_origin().describe())
"""


def check(*first: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    code = CHECK.format(first=[str(path) for path in first], before=before)
    return subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )


def make_package(root: Path, name: str, version: tuple[int, int, int] | None = None) -> Path:
    folder = root / "megatron" / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    if version:
        major, minor, patch = version
        text = f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = 'rc0'\n"
        (folder / "package_info.py").write_text(text)
    return root


def test_the_installed_megatron_is_described():
    result = check()
    assert result.returncode == 0, result.stderr
    assert importlib.metadata.version("megatron-core") in result.stdout and "site-packages" in result.stdout


def test_core_and_training_of_two_installations_are_refused(tmp_path):
    result = check(make_package(tmp_path, "core", (0, 19, 0)))
    assert "InstallationError" in result.stderr and "mixed" in result.stderr and "PYTHONPATH" in result.stderr
    assert str(tmp_path / "megatron/core") in result.stderr and "site-packages/megatron/training" in result.stderr


def test_an_imported_module_of_another_installation_is_refused(tmp_path):
    extra = make_package(tmp_path, "post_training")
    assert check(extra).returncode == 0, "not imported: no harm yet"
    result = check(extra, before="import megatron.post_training")
    assert "megatron.post_training was imported from" in result.stderr and str(tmp_path) in result.stderr
    # Other projects share the namespace rightly.
    assert check(make_package(tmp_path, "energon"), before="import megatron.energon").returncode == 0


def test_a_version_that_is_not_served_is_refused(tmp_path):
    make_package(tmp_path, "core", (0, 21, 0))
    result = check(make_package(tmp_path, "training"))
    assert "Megatron 0.21.0rc0" in result.stderr and "pip install" in result.stderr
    assert "served for 0.19.x and 0.20.x only" in result.stderr


def test_no_megatron_is_said_plainly():
    result = check(before="sys.path[:] = [p for p in sys.path if 'site-packages' not in p]")
    assert "megatron.core is not installed: pip install" in result.stderr


REPAIR = """
import sys
from megatron.core.datasets import utils
from megatron_idft.integration.platform.compatibility import repair_compile_helpers

upstream = utils.compile_helpers
repair_compile_helpers()
print("compiled:", utils.compile_helpers())

utils.compile_helpers = upstream
sys.modules["megatron.core.datasets.helpers_cpp"] = None
try:
    repair_compile_helpers()
except RuntimeError as error:
    print("wheel without them:", error)

utils.__file__ = sys.argv[1]  # beside a Makefile
repair_compile_helpers()
print("checkout:", utils.compile_helpers is upstream)
"""


def test_compiled_helpers_are_not_compiled_again(tmp_path):
    (tmp_path / "Makefile").touch()
    command = [forking_python(), "-c", REPAIR, tmp_path / "utils.py"]
    result = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    compiled, wheel, checkout = result.stdout.splitlines()
    assert compiled == "compiled: None" and checkout == "checkout: True"
    assert "cannot be compiled" in wheel and "Reinstall Megatron" in wheel
