"""What installing and importing the package does to others: nothing."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires

import megatron_idft
from tests.launch import ROOT, forking_python


def run(code: str, python: str = sys.executable) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_importing_loads_neither_torch_nor_megatron():
    loaded = json.loads(run("import json, sys, megatron_idft; print(json.dumps(sorted(sys.modules)))"))
    assert not [name for name in loaded if name.split(".")[0] in ("torch", "megatron", "transformers")]


def test_using_every_public_name_patches_nothing():
    """Every function and method of the modules that the trainer's integration wraps later is the one it was."""
    code = """
import json
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.training import arguments, checkpointing, training
import torch

def members():
    owners = (LanguageModule, arguments, checkpointing, training, torch, torch.cuda, torch.Tensor)
    return {(str(owner), name): id(value) for owner in owners for name, value in vars(owner).items() if callable(value)}

before = members()
import megatron_idft
names = [getattr(megatron_idft, name) for name in megatron_idft.__all__]
import megatron_idft.integration.loss.trainer, megatron_idft.integration.training.program
after = members()
print(json.dumps([str(key) for key in before if after.get(key) != before[key]]))
"""
    assert json.loads(run(code, forking_python())) == []


def test_public_names_resolve_and_unknown_ones_do_not():
    assert all(getattr(megatron_idft, name) is not None for name in megatron_idft.__all__)
    assert sorted(megatron_idft.__all__) == dir(megatron_idft)
    assert not hasattr(megatron_idft, "nothing_of_this_name")


def test_the_base_install_requires_light_libraries_only():
    base = [line for line in requires("megatron-idft") or [] if "extra ==" not in line]
    names = {re.split(r"[ <>=!;\[]", line)[0] for line in base}
    assert names == {"jinja2", "numpy", "packaging", "pyarrow", "sentencepiece", "tqdm"}


def test_installing_into_a_container_changes_nothing_that_it_has(tmp_path):
    """pip's own plan, in an environment that has torch and Megatron: this package, and no other version of anything."""
    plan = tmp_path / "plan.json"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*command, "--report", str(plan), str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    planned = [item["metadata"]["name"] for item in json.loads(plan.read_text())["install"]]
    assert planned in ([], ["megatron-idft"])
