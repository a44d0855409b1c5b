"""What the programs do on a GPU without Transformer Engine or apex: parsed on a pretended node."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_idft.errors import BrokenLibraryError, MissingLibraryError
from megatron_idft.inference import captured_collectives
from megatron_idft.integration.platform.gpu_libraries import GPULibraries, find_gpu_libraries
from megatron_idft.integration.platform.local_flags import add_local_flags
from tests.launch import ROOT
from tests.tiny_tokenizers import train_tokenizer

HERE = Path(__file__).parent
PAGE = ROOT / "docs" / "gpu_flags.md"
MODEL = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --bf16"""
TRAINING = f"{MODEL} --micro-batch-size 1 --global-batch-size 8 --lr 1e-5 --train-iters 10 --sft-loss idft"
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
LOCAL = [
    "--transformer-impl", "local", "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion",
    "--no-rope-fusion", "--no-persist-layer-norm",
]  # fmt: skip


class Row(NamedTuple):
    """A row of the tables in docs/gpu_flags.md."""

    flags: str
    verdict: str
    remark: str

    def request(self, train: str, folder: Path) -> dict[str, object]:
        words = self.flags.format(folder=folder).split()
        env = EXPANDABLE | dict(word.split("=") for word in words if not word.startswith("-") and "=" in word)
        flags = [word for word in words if word.split("=")[0] not in env]
        capability = 10 if "B200" in self.remark else 9
        return {
            "verb": "train",
            "words": [*train.split(), *flags],
            "env": env,
            "engine": True,
            "capability": capability,
        }


BESIDE = "--tensor-model-parallel-size 2 --use-distributed-optimizer"
ROWS = [Row(*found) for found in re.findall(r"^\| `(.*?)` \| (\w+) \| (.*?) ?\|$", PAGE.read_text(), re.MULTILINE)]


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Answers of the pretended node, by name."""
    folder = tmp_path_factory.mktemp("node")
    tokenizer = train_tokenizer(folder)
    (folder / "data.jsonl").write_text('{"prompt": "1 + 1?", "response": "2."}\n')
    (folder / "latest_checkpointed_iteration.txt").write_text("1")  # opened later than this goes
    data = f"--tokenizer-model {tokenizer} --chat-template chatml"
    offline = f"{MODEL} {data} --load {folder} --data {folder / 'data.jsonl'} --output {folder / 'out'}"
    train = f"{TRAINING} {data} --sft-data {folder / 'data.jsonl'}"
    script = f"{HERE / 'stock_pretrain.py'} {TRAINING} --vocab-size 128 --tokenizer-type NullTokenizer"
    two = "--tensor-model-parallel-size 2"
    engine = "--transformer-impl transformer_engine"
    cases = {
        "train": ("train", train, {}),
        "hybrid": ("train", train.replace("--num-layers 2", "--hybrid-layer-pattern *-*-"), {}),
        "decided": ("train", f"{train} {' '.join(LOCAL[2:])} --transformer-impl=local", {}),
        "engine": ("train", f"{train} {engine}", {}),
        "graphs": ("train", f"{train} --cuda-graph-impl local", EXPANDABLE),
        "registered": ("train", f"{train} --cuda-graph-impl local", {**EXPANDABLE, "NCCL_GRAPH_REGISTER": "1"}),
        "run": ("run", script, {}),
        "score": ("score", f"{offline} {two}", {}),
        "calibrate": ("score", f"{offline} {two} --calibrate 2", {}),
        "realign": ("realign", f"{offline} {two}", EXPANDABLE),
        "realign registered": ("realign", f"{offline} {two}", {**EXPANDABLE, "NCCL_GRAPH_REGISTER": "1"}),
        "plan": ("plan", f"--gpus 8 {train}", {}),
        "plan engine": ("plan", f"--gpus 8 {train} {engine}", {}),
        "doctor": ("doctor", "", {}),
    }
    requests = [{"verb": verb, "words": words.split(), "env": env} for verb, words, env in cases.values()]
    requests += [row.request(train.replace("--lr", f"{BESIDE} --lr"), folder) for row in ROWS]
    (folder / "cases.json").write_text(json.dumps(requests))
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(HERE / "gpu_node.py"), str(folder / "cases.json"), str(folder / "answers.json")],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    names = [*cases, *(row.flags for row in ROWS)]
    return dict(zip(names, json.loads((folder / "answers.json").read_text()), strict=True))


@pytest.mark.parametrize("name", ["train", "hybrid", "run", "score", "calibrate", "realign"])
def test_every_program_adds_what_local_layers_need_and_says_so(node, name):
    found = node[name]
    assert found["code"] == "reached", found["err"][-2000:]
    assert found["args"] == {
        "transformer_impl": "local",
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "no_persist_layer_norm": True,
    }
    why = "without Transformer Engine and apex's kernel for weight gradients; added: "
    [line] = [line for line in found["out"].splitlines() if why in line]
    assert line.endswith(why + " ".join(LOCAL))


@pytest.mark.parametrize("row", ROWS, ids=[row.flags for row in ROWS])
def test_flags_are_taken_as_the_page_says(node, row):
    found = node[row.flags]
    said = re.findall("`(.*?)`", row.remark)
    if row.verdict == "refused":
        assert found["code"] == 2 or "Error: " in str(found["code"]), found["out"][-500:]
        assert said[0] in f"{found['code']}{found['err']}", (found["code"], found["err"][-2000:])
        return
    assert found["code"] == "reached", (found["code"], found["err"][-2000:])
    assert re.findall(r": added: ([^\s,]+)", found["out"]) == (said if row.verdict == "adjusted" else [])
    assert "; added: " not in found["out"], "nothing is missing on this node"


def test_the_page_is_about_every_family():
    assert len(ROWS) > 45 and {row.verdict for row in ROWS} == {"accepted", "adjusted", "refused"}
    for flag in (
        *("--sequence-parallel", "--overlap-grad-reduce", "--overlap-param-gather", "--recompute-granularity"),
        *("--attention-backend", "--fp8-format", "--fp4-format", "--use-precision-aware-optimizer"),
        *("--optimizer-cpu-offload", "--optimizer muon", "--use-megatron-fsdp", "--async-save", "--tp-comm-overlap"),
        *(f"--cuda-graph-impl {name}" for name in ("local", "transformer_engine", "full_iteration")),
    ):
        assert any(flag in row.flags for row in ROWS), flag


def test_plan_counts_what_training_here_would_use_unless_told_otherwise(node):
    assert node["plan"]["code"] == 0 and node["plan engine"]["code"] == 0
    assert "added: --transformer-impl local" in node["plan"]["out"]
    assert "added: --transformer-impl" not in node["plan engine"]["out"]
    assert node["plan"]["args"]["transformer_impl"] == "local"
    assert node["plan engine"]["args"]["transformer_impl"] == "transformer_engine"


def test_what_the_user_decided_stays(node):
    assert node["decided"]["code"] == "reached" and "added:" not in node["decided"]["out"]
    assert node["engine"]["code"] == 2
    assert "--transformer-impl transformer_engine needs Transformer Engine, which is not here" in node["engine"]["err"]
    assert "pass --transformer-impl local" in node["engine"]["err"]


def test_doctor_tells_what_the_programs_will_do(node):
    lines = node["doctor"]["out"].splitlines()
    assert f"uses: layers: local; the programs add {' '.join(LOCAL)}" in lines
    assert any(line.startswith("transformer-engine: missing: local layers are used") for line in lines)
    assert any(line.startswith("apex: missing") for line in lines)
    assert "uses: optimizer: torch.optim" in lines
    assert "uses: decoding: attention by SDPA without cuDNN" in lines


def test_collectives_in_graphs_are_left_unregistered_or_refused(node):
    for name in ("calibrate", "realign", "graphs"):
        assert node[name]["env"]["NCCL_GRAPH_REGISTER"] == "0", name
        assert "added: NCCL_GRAPH_REGISTER=0" in node[name]["out"], name
    for name in ("train", "score"):  # no graph is captured
        assert "NCCL_GRAPH_REGISTER" not in node[name]["env"]
    for name in ("registered", "realign registered"):
        assert node[name]["code"] == 2
        assert "NCCL_GRAPH_REGISTER is 1 and PYTORCH_CUDA_ALLOC_CONF has expandable_segments" in node[name]["err"]
        assert "Export NCCL_GRAPH_REGISTER=0" in node[name]["err"]


def test_an_engine_of_a_library_user_asks_for_the_variable_too(monkeypatch):
    monkeypatch.delenv("NCCL_GRAPH_REGISTER", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    captured_collectives.require_unregistered_graphs()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    with pytest.raises(captured_collectives.GraphRegistrationError, match="is not set and PYTORCH_ALLOC_CONF"):
        captured_collectives.require_unregistered_graphs()
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    captured_collectives.require_unregistered_graphs()


@pytest.mark.parametrize(
    ("words", "libraries", "added"),
    [
        ("", GPULibraries(True, "", True, True), ""),
        ("", GPULibraries(True), "--no-gradient-accumulation-fusion"),  # the output layer is Megatron's own
        ("--transformer-impl local", GPULibraries(True, "", True, True), "--no-persist-layer-norm"),
        ("--no-rope-fusion", GPULibraries(False, "", True, True), "--transformer-impl local --no-persist-layer-norm"),
        ("--transformer-impl=local", GPULibraries(False), " ".join(LOCAL[2:])),
    ],
)
def test_added_is_what_the_libraries_lack(words, libraries, added, capsys):
    assert add_local_flags(words.split(), "train", libraries) == [*words.split(), *added.split()]
    assert capsys.readouterr().out.endswith(f"; added: {added}\n" if added else "")


@pytest.mark.parametrize(
    "words",
    ["--fp8-format hybrid", "--tp-comm-overlap", "--cuda-graph-impl transformer_engine", "--multi-latent-attention"],
)
def test_flags_that_need_transformer_engine_are_refused_without_it(words):
    with pytest.raises(MissingLibraryError, match=f"train: {words} needs Transformer Engine.*: no such symbol"):
        add_local_flags(words.split(), "train", GPULibraries(False, "no such symbol"))
    add_local_flags(words.split(), "train", GPULibraries(True, "", True, True))


def test_transformer_engine_is_there_only_if_it_imports(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_idft.integration.platform.gpu_libraries.installed", lambda name: "2.20.2")
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    modules = {
        "transformer_engine": package / "__init__.py",
        "transformer_engine.pytorch": package / "pytorch" / "__init__.py",
        "transformer_engine.pytorch.fp8": package / "pytorch" / "fp8.py",
    }

    def found(**sources):
        with monkeypatch.context() as patch:  # whatever this process has imported, or hidden
            for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
                patch.delitem(sys.modules, name)
            importlib.invalidate_caches()
            for file in modules.values():
                file.write_text(sources.get(file.stem if file.stem == "fp8" else file.parent.name, ""))
            try:
                return find_gpu_libraries()
            finally:
                for name in modules:
                    sys.modules.pop(name, None)

    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # its files are told apart by the second
    assert found().transformer_engine
    absent = found(transformer_engine="raise ImportError('no such symbol\\nand more')")
    assert not absent.transformer_engine and absent.why_not == "no such symbol"
    # Megatron would import what it finds a package for, and does not catch other errors at all.
    with pytest.raises(BrokenLibraryError, match=r"cannot be imported \(No module named 'einops'\).*pip uninstall"):
        found(fp8="raise ModuleNotFoundError(\"No module named 'einops'\")")
    with pytest.raises(BrokenLibraryError, match=r"cannot be imported \(libcublas"):
        found(transformer_engine="raise OSError('libcublas.so.13: not found')")
