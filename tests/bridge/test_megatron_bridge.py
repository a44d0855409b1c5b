"""docs/megatron_bridge.md on the real Megatron-Bridge, as far as a CPU goes: its recipe, loop and LoRA, `convert`."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests import tiny_models
from tests.bridge.probe import LENGTH, VOCABULARY
from tests.launch import ROOT, TAIL, free_port

PYTHON = Path(os.environ.get("BRIDGE_PYTHON") or ROOT / ".cache" / "megatron-bridge" / "bin" / "python")
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(),
    reason=f"there is no Megatron-Bridge in {PYTHON}: bash tests/bridge/environment.sh makes it",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What every case of probe.py has found, a file each."""
    folder = tmp_path_factory.mktemp("bridge")
    tiny_models.save("qwen3", folder / "model")
    drawn = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(LENGTH) > 10).float().expand(2, LENGTH).contiguous()
    batch = {"tokens": drawn[:, :-1], "labels": drawn[:, 1:].contiguous(), "loss_mask": mask}
    torch.save(batch, folder / "batch.pt")
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("probe.py"), folder],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FIRST_PORT": str(free_port())},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-TAIL:]
    return folder


def found(folder: Path, case: str) -> dict:
    return json.loads((folder / f"{case}.json").read_text())


@pytest.mark.parametrize("model", ["whole", "lora"])
def test_the_hook_trains_the_objective_of_a_model_that_the_bridge_built(folder, model):
    got = found(folder, "gradients")[model]
    assert got["gradients"] < 1e-4, "against autograd in float64"
    if model == "lora":
        assert got["names"] and all("adapter" in name for name in got["names"]), "nothing else is trained"


def test_its_values_are_the_cross_entropy_of_transformers(folder):
    from transformers import AutoModelForCausalLM

    batch = torch.load(folder / "batch.pt")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder / "model")(batch["tokens"]).logits
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    got = torch.tensor(found(folder, "gradients")["whole"]["values"])
    torch.testing.assert_close(got, wanted * batch["loss_mask"], rtol=1e-4, atol=1e-4)


def test_finetune_by_its_own_loop_and_forward_step(folder):
    none, ce, idft = (found(folder, case) for case in ("none", "ce", "idft"))
    assert none["hooks"] == 0 and ce["hooks"] == idft["hooks"] == 1
    assert ce["calls"] == idft["calls"] == 6, "two micro-batches in each of three steps"
    assert ce["lm loss"] == pytest.approx(none["lm loss"], rel=1e-5) and ce["norm"] == pytest.approx(none["norm"])
    assert idft["lm loss"][0] == pytest.approx(ce["lm loss"][0], rel=1e-6), "values stay cross-entropy"
    assert abs(idft["lm loss"][1] / ce["lm loss"][1] - 1) > 1e-3
    # As the page says: its forward_step gives the model no loss_mask, so there are no metrics.
    assert idft["unmasked"] == 2


def test_finetune_with_lora_trains_the_adapters_alone(folder):
    lora, idft = found(folder, "lora"), found(folder, "idft")
    assert lora["hooks"] == 1 and lora["calls"] == 6
    assert lora["parameters"] - lora["trained"] == idft["parameters"]
    assert lora["lm loss"][0] == pytest.approx(idft["lm loss"][0], rel=1e-6), "adapters begin at zero"
    assert lora["lm loss"][1] != pytest.approx(idft["lm loss"][1], rel=1e-4)


def test_what_convert_calls_for_other_families_gives_the_same_weights_back(folder):
    assert found(folder, "conversion")["same"]
