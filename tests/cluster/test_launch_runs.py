"""launch/train.sh and examples/smoke really run, on a CPU: two "nodes" over loopback, stopped and started again, with
one W&B run; and the wheel's copies of the scripts, as `megatron-idft init` makes them, up to PASS.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.launch import ROOT, TAIL, forking_python, free_port

SMOKE = ROOT / "examples" / "smoke"
sys.path += [str(SMOKE), str(ROOT / "examples"), str(ROOT / "examples" / "numinamath")]

import check  # noqa: E402
import make_model  # noqa: E402
import make_records  # noqa: E402
import records  # noqa: E402

ITERS = 24


def environment(**variables: str) -> dict[str, str]:
    foreign = ("SLURM_", "PET_", "MASTER_", "WANDB_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"PYTHON": forking_python(), "DEVICE": "cpu", "TP": "1", "GPUS_PER_NODE": "1"} | variables


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Records, and a Hugging Face model of half a million parameters with a tokenizer trained on them."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_records.py", str(folder)])
        make_records.main()
        patch.setattr(sys, "argv", ["make_model.py", str(folder / "tiny"), str(folder / "train.jsonl")])
        make_model.main()
    return folder


def start_node(rank: int, log: Path, settings: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(log, "ab") as file:
        return subprocess.Popen(
            ["bash", ROOT / "launch" / "train.sh"],
            env=environment(NNODES="2", MASTER_ADDR="127.0.0.1", NODE_RANK=str(rank), **settings),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(nodes: list[subprocess.Popen[bytes]], logs: list[Path]) -> list[int]:
    try:
        return [node.wait(timeout=150) for node in nodes]
    except subprocess.TimeoutExpired:
        told = "\n".join(log.read_text()[-TAIL:] for log in logs)
        raise AssertionError(f"not done after 150 s\n{told}") from None
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()


def test_two_nodes_stopped_by_sigterm_go_on_where_they_were_in_one_wandb_run(made, tmp_path):
    """As a time limit does it: SIGTERM to train.sh on every node, then the same command once more."""
    save = tmp_path / "run"
    settings = {
        "HF_MODEL": str(made / "tiny"), "DATA": str(made / "train.jsonl"), "SAVE": str(save), "ITERS": str(ITERS),
        "SEQ_LENGTH": "96", "MICRO_BATCH": "2", "GLOBAL_BATCH": "4", "LR": "1e-3", "SAVE_HF": "no",
        "MASTER_PORT": str(free_port()), "WANDB_PROJECT": "tests", "WANDB_MODE": "offline", "WANDB_SILENT": "true",
    }  # fmt: skip
    logs = [tmp_path / "node0.log", tmp_path / "node1.log"]

    nodes = [start_node(rank, log, settings) for rank, log in enumerate(logs)]
    deadline = time.monotonic() + 120
    # Megatron writes its lines on the last rank, and a rendezvous numbers the nodes as it likes.
    while not any(re.search(r"iteration +2/", log.read_text()) for log in logs) and time.monotonic() < deadline:
        assert all(node.poll() is None for node in nodes), "\n".join(log.read_text()[-TAIL:] for log in logs)
        time.sleep(0.05)
    for node in nodes:
        node.terminate()
    assert finish(nodes, logs) == [143, 143], logs[1].read_text()[-TAIL:]
    [first] = check.curves(save)
    stopped = max(first["lm loss"])
    assert 2 <= stopped < ITERS
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(stopped)

    nodes = [start_node(rank, log, settings) for rank, log in enumerate(logs)]
    assert finish(nodes, logs) == [0, 0], logs[1].read_text()[-TAIL:]
    first, second = check.curves(save)
    assert sorted(first["lm loss"]) == list(range(1, stopped + 1))
    assert sorted(second["lm loss"]) == list(range(stopped + 1, ITERS + 1)), "from the checkpoint, not from the model"
    assert second["lm loss"][stopped + 1] < first["lm loss"][1]

    identity = (save / "wandb_run_id").read_text()
    runs = list((save / "wandb" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and {run.name.rsplit("-", 1)[1] for run in runs} == {identity}
    assert all((run / f"run-{identity}.wandb").stat().st_size > 0 for run in runs)
    assert not list(save.glob(".wandb_run_id.*"))


def test_the_wheels_copies_pass_the_smoke_test(made, tmp_path):
    """A user without a checkout: the wheel on sys.path, `init`, and the copied scripts."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("megatron_idft", "launch", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    site, copies = tmp_path / "site", tmp_path / "mine"
    build = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*build, "--no-build-isolation", "--target", site, source], check=True, capture_output=True)
    installed = {path.relative_to(site) for path in (site / "megatron_idft").rglob("*") if path.is_file()}
    written = {path.relative_to(source) for path in (source / "megatron_idft").rglob("*.*") if path.suffix != ".md"}
    assert written <= installed, "templates and style sheets are in the wheel as well"
    shutil.rmtree(source)

    def idft(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "megatron_idft", *words]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)

    variables = environment(PYTHONPATH=str(site), HF_MODEL=str(made / "tiny"), OUT=str(tmp_path / "out"))
    done = idft("init", copies)
    assert done.returncode == 0 and "files. Read" in done.stdout, done.stderr
    expected = {
        path.relative_to(ROOT)
        for folder in ("launch", "examples/smoke", "examples/numinamath")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name not in ("quickstart.sh", "python.sh")
    }
    assert {path.relative_to(copies) for path in copies.rglob("*") if path.is_file()} == expected
    assert idft("init", copies).returncode == 0, "the same files once more are no conflict"
    changed = copies / "launch" / "train.sh"
    changed.write_text("# mine\n")
    refused = idft("init", copies)
    assert refused.returncode == 2 and "launch/train.sh" in refused.stderr and "--force" in refused.stderr
    assert changed.read_text() == "# mine\n"
    assert idft("init", copies, "--force").returncode == 0
    assert changed.read_bytes() == (ROOT / "launch" / "train.sh").read_bytes()

    sizes = {"ITERS": "10", "LR": "3e-3", "SEQ_LENGTH": "96"}
    smoke = subprocess.run(
        ["bash", copies / "examples" / "smoke" / "run.sh"],
        cwd=tmp_path, env=variables | sizes, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert smoke.returncode == 0, smoke.stdout[-TAIL:] + smoke.stderr[-3000:]
    lines = smoke.stdout.splitlines()
    assert lines[-1] == "PASS" and sum(line.startswith("ok    ") for line in lines) > 12
    assert any("the starts took steps [(1, 5), (6, 10)]" in line for line in lines)


def test_rows_of_numinamath_become_records(tmp_path, monkeypatch):
    raw, out = tmp_path / "raw", tmp_path / "out"
    (raw / "data").mkdir(parents=True)
    rows = [
        {"source": "aime", "problem": f" What is {n}? ", "solution": rf"\boxed{{{n}}}", "extra": 1} for n in range(9)
    ]
    rows.append({"source": "aime", "problem": "No answer?", "solution": " ", "extra": 1})
    for part, chosen in enumerate((rows[:5], rows[5:])):
        pq.write_table(pa.Table.from_pylist(chosen), raw / "data" / f"train-0000{part}-of-00002.parquet")
    monkeypatch.setattr(sys, "argv", ["records.py", str(raw), str(out), "--records", "6", "--held-out", "3"])
    records.main()

    from megatron_idft.corpus.records import read_records

    train, valid = (list(read_records([out / f"{name}.jsonl"])) for name in ("train", "valid"))
    assert len(train) == 6
    assert len(valid) == 3
    found = sorted(record.messages[0]["content"] for record in [*train, *valid])
    assert found == [f"What is {n}?" for n in range(9)], "each once, none without a solution"
    for record in train:
        number = re.findall(r"\d", record.messages[0]["content"])[0]
        assert record.messages[1]["content"] == rf"\boxed{{{number}}}"
    monkeypatch.setattr(sys, "argv", ["records.py", str(raw), str(out), "--records", "8"])
    with pytest.raises(SystemExit, match="fewer than"):
        records.main()
