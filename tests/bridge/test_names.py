"""Names of Megatron-Bridge that its page, `convert` and probe.py use, against its source, which is read, not imported.

What moves there is told by its name and in a second; probe.py would fail somewhere in its minutes.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.bridge.test_megatron_bridge import PYTHON, pytestmark
from tests.launch import ROOT

__all__ = ["pytestmark"]
AUTO_BRIDGE = "megatron.bridge.AutoBridge"
PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
RETURNED = {f"{AUTO_BRIDGE}.from_hf_pretrained": AUTO_BRIDGE, f"{AUTO_BRIDGE}.to_megatron_provider": PROVIDER}
# File -> its variables that hold what is Megatron-Bridge's, beside those that it imports.
USES = {
    "README.md": {"provider": PROVIDER},
    "docs/megatron_bridge.md": {
        "AutoBridge": AUTO_BRIDGE,
        "provider": PROVIDER,
        "finetune": "megatron.bridge.training.finetune.finetune",
        "forward_step": "megatron.bridge.training.gpt_step.forward_step",
    },
    "megatron_idft/checkpoint/bridge.py": {"bridge": AUTO_BRIDGE, "model": AUTO_BRIDGE},
    "tests/bridge/probe.py": {
        "provider": PROVIDER,
        "context": "megatron.bridge.training.callbacks.CallbackContext",
        "adapters": "megatron.bridge.peft.utils",
    },
}
# What a CPU cannot do: function -> a line in it. probe.py goes around each; what is gone from here need not be.
NEEDS_A_GPU = {
    "megatron.bridge.training.initialize.initialize_megatron": "assert torch.cuda.is_available()",
    "megatron.bridge.training.setup.setup": "device='cuda'",
    f"{PROVIDER}.provide_distributed_model": "init_process_group('nccl')",
    f"{PROVIDER}.initialize_model_parallel": "init_process_group('nccl')",
    "megatron.bridge.models.gpt_provider.default_layer_spec": "transformer_engine_layer_spec(config)",
}


# -------------------------------------------------------------------------------------------------------------- source


@cache
def roots() -> list[Path]:
    """Folders of packages `megatron.…`: Megatron-Bridge's, and Megatron-LM's, from whose classes it derives."""
    asked = "import importlib.util as u; print(u.find_spec('megatron.bridge').submodule_search_locations[0])"
    folder = subprocess.run([PYTHON, "-c", asked], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    return [Path(folder).parent, *map(Path, importlib.import_module("megatron").__path__)]


def file_of(module: str) -> Path | None:
    relative = Path(*module.split(".")[1:])
    files = (root / each for root in roots() for each in (relative.with_suffix(".py"), relative / "__init__.py"))
    return next(filter(Path.exists, files), None)


@cache
def defined(module: str) -> dict[str, ast.AST]:
    """A module's names, with the definition, assignment or import of each."""
    file = file_of(module)
    assert file, f"there is no {module}"
    found: dict[str, ast.AST] = {}
    pending: list[ast.AST] = [*ast.parse(file.read_text()).body]
    for node in pending:
        if isinstance(node, ast.If | ast.Try):
            pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            package = module if file.name == "__init__.py" else module.rpartition(".")[0]
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            node.module = ".".join([*base, *filter(None, [node.module])])
        found |= {name: node for name in bound(node) if name not in found}
    return found


def bound(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def look_up(name: str) -> tuple[str, ast.AST]:
    """What `megatron.….NAME` is, a member of a class too, and the module that defines it; re-exports are followed."""
    owner, _, attribute = name.rpartition(".")
    if not file_of(owner):
        assert attribute in members(owner), f"{owner} has no {attribute}"
        return owner, members(owner)[attribute]
    node = defined(owner).get(attribute)
    assert node, f"{owner} has no {attribute}"
    if isinstance(node, ast.ImportFrom) and str(node.module).startswith("megatron."):
        (original,) = (alias.name for alias in node.names if (alias.asname or alias.name) == attribute)
        return look_up(f"{node.module}.{original}")
    return owner, node


def members(name: str) -> dict[str, ast.AST]:
    """Those of a class and of its bases, as far as they are Megatron's."""
    module, node = look_up(name)
    assert isinstance(node, ast.ClassDef), f"{name} is no class"
    found: dict[str, ast.AST] = {}
    for base in (base.value if isinstance(base, ast.Subscript) else base for base in node.bases):
        known = isinstance(base, ast.Name) and base.id in defined(module)
        if known and isinstance(look_up(f"{module}.{base.id}")[1], ast.ClassDef):
            found |= members(f"{module}.{base.id}")
    return found | {each: child for child in node.body for each in bound(child)}


def assert_taken(name: str, call: ast.Call) -> None:
    """A function takes what it is given, or a dataclass."""
    node, taken, others = look_up(name)[1], [], False
    if isinstance(node, ast.ClassDef):
        found = members(name)
        taken = [field for field, child in found.items() if isinstance(child, ast.AnnAssign)]
        node = found.get("__init__")
    if isinstance(node, ast.FunctionDef):
        taken = [each.arg for each in (*node.args.args, *node.args.kwonlyargs) if each.arg not in ("self", "cls")]
        others = node.args.kwarg is not None
    for keyword in call.keywords:
        assert others or keyword.arg in (None, *taken), f"{name} has no parameter {keyword.arg}"
    assert len([each for each in call.args if not isinstance(each, ast.Starred)]) <= len(taken), f"{name} takes {taken}"


# --------------------------------------------------------------------------------------------------------------- names


def programs(path: str) -> list[ast.Module]:
    """A file, or the Python on a page."""
    text = (ROOT / path).read_text()
    return list(map(ast.parse, re.findall(r"```python\n(.*?)```", text, re.S) if path.endswith(".md") else [text]))


@pytest.mark.parametrize("path", USES)
def test_names_and_parameters_in_use_are_there(path):
    met = set()
    for program in programs(path):
        holds = dict(USES[path])
        for node in ast.walk(program):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("megatron.bridge"):
                holds |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

        def meaning(node: ast.AST, holds: dict[str, str] = holds) -> str | None:
            if isinstance(node, ast.Name):
                return holds.get(node.id)
            if isinstance(node, ast.Call):
                return RETURNED.get(meaning(node.func) or "")
            if isinstance(node, ast.Attribute) and (owner := meaning(node.value)):
                return f"{owner}.{node.attr}"
            return None

        for node in ast.walk(program):
            if isinstance(node, ast.Name | ast.Attribute) and (name := meaning(node)) and not file_of(name):
                met.add(name)
                look_up(name)
            if isinstance(node, ast.Call) and (name := meaning(node.func)):
                assert_taken(name, node)
            for base in filter(None, map(meaning, node.bases if isinstance(node, ast.ClassDef) else [])):
                for method in (
                    child.name for child in ast.iter_child_nodes(node) if isinstance(child, ast.FunctionDef)
                ):
                    look_up(f"{base}.{method}")
    assert met >= {name for name in USES[path].values() if not file_of(name)}, "and each is in use"


def test_config_of_its_builders_has_the_hooks_that_the_page_names():
    assert "`model_config.pre_wrap_hooks.append(" in (ROOT / "docs" / "megatron_bridge.md").read_text()
    look_up("megatron.bridge.models.gpt.gpt_builder.GPTModelConfig.pre_wrap_hooks")


def test_its_forward_step_gives_the_model_no_loss_mask():
    node = look_up("megatron.bridge.training.gpt_step._forward_step_common")[1]
    given = next(
        each.value
        for each in ast.walk(node)
        if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "forward_args"
    )
    assert isinstance(given, ast.Dict) and [key.value for key in given.keys if isinstance(key, ast.Constant)] == [
        "input_ids",
        "position_ids",
        "attention_mask",
        "labels",
    ]


@pytest.mark.parametrize("function", NEEDS_A_GPU)
def test_calls_of_the_recipe_that_need_a_gpu_still_do(function):
    assert NEEDS_A_GPU[function] in ast.unparse(look_up(function)[1])
