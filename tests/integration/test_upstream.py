"""Nothing of Megatron is changed that the table does not list, and all that it lists is changed."""

import ast
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_idft.errors import InstallationError
from megatron_idft.integration.platform import upstream
from tests.launch import ROOT, forked

PROBE = ROOT / "tests" / "integration" / "changes_probe.py"
# Made later in a run, or by other programs than the one that is probed.
LATER = {
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",
    "megatron.training.global_vars:_GLOBAL_SIGNAL_HANDLER",
}

# Not in every Megatron that is served.
INFERENCE_LINEAR = "megatron.core.transformer.multi_token_prediction:is_inference_column_parallel_linear"


def test_a_started_training_has_changed_what_the_table_lists_and_nothing_else(tmp_path):
    forked([PROBE, tmp_path / "changes.json"])
    told = json.loads((tmp_path / "changes.json").read_text())
    # Megatron's training callbacks, where it has them, take the place of changes.
    instead = {change.target for change in upstream.CHANGES if change.event in told["events"]}
    absent = set(told["absent"])
    assert absent <= {upstream.CALLBACKS, INFERENCE_LINEAR}
    listed = {change.target for change in upstream.CHANGES} - instead - absent
    assert set(told["in force"]) == listed - LATER
    # A class or function is seen under every name by which a module of upstream holds it.
    names = {target.rpartition(":")[2] for target in listed}
    assert {target for target in told["found"] if target.rpartition(":")[2] not in names} == set()
    assert {target.rpartition(":")[2] for target in told["found"]} == {
        target.rpartition(":")[2] for target in listed - LATER
    }
    # Given back when the loss is detached; the repairs stay.
    where = {change.target: change.where for change in upstream.CHANGES}
    stay = {"everywhere", "train, score, realign", "without Transformer Engine", "CPU mode"}
    assert {where[target] for target in told["left"]} == stay


def of_upstream(module: Path) -> list[str]:
    """Assignments to attributes of what a module has imported from Megatron."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            names |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Assign | ast.AnnAssign) and "import_module('megatron" in ast.unparse(
            node.value or node
        ):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            names.add(ast.unparse(target))
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and ast.unparse(target).split(".")[0] in names:
                found.append(f"{module.name}:{node.lineno}: {ast.unparse(target)}")
        called = ast.unparse(node) if isinstance(node, ast.Call) else ""
        if called.startswith("setattr(") and called[8:].split(".")[0].split(",")[0] in names:
            found.append(f"{module.name}:{node.lineno}: {called}")
    return found


def test_nothing_is_assigned_to_a_name_of_megatron_elsewhere():
    found = [text for path in sorted((ROOT / "megatron_idft").rglob("*.py")) for text in of_upstream(path)]
    assert found == []


STEP = "megatron.training.training:train_step"
MOVED = [
    (STEP, "", "there is no megatron.training.training.train_step"),
    (STEP, "def train_step(iteration): ...", "takes no forward_step_func, forward_backward_func"),
    ("megatron.training.checkpointing:check_checkpoint_args", None, "there is no megatron.training.checkpointing"),
]


@pytest.mark.parametrize(("target", "source", "text"), MOVED)
def test_a_name_of_megatron_that_has_moved_is_named_before_anything_starts(tmp_path, monkeypatch, target, source, text):
    module = target.partition(":")[0]
    if source is None:  # the module itself is gone
        monkeypatch.setitem(sys.modules, module, None)
    else:
        there = ModuleType(module)
        exec(source, vars(there))
        monkeypatch.setitem(sys.modules, module, there)
    with pytest.raises(InstallationError, match=re.escape(text)) as refused:
        upstream.wrap(target, lambda original, call: None)
    assert "pip install" in str(refused.value)


def test_a_change_that_is_not_listed_is_refused():
    with pytest.raises(KeyError, match="json:dumps is not listed"):
        upstream.replace("json:dumps", None)
