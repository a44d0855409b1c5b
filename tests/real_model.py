"""The programs of examples/real_model as modules. Other examples have files of the same names."""

import importlib.util
from types import ModuleType

from tests.launch import ROOT

FOLDER = ROOT / "examples" / "real_model"


def _program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"real_model_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fetch, problems = _program("fetch"), _program("problems")
