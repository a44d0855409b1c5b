"""Faults, for real: two torchrun agents whose processes are killed, whose checkpoints are damaged, whose disk fills.

Whatever happens, the values of every step and the last checkpoint must be those of a run that nothing has happened to.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.agents import Agent, Nodes, wait_for
from tests.launch import ROOT, forked, forking_python, torchrun
from tests.run_outputs import differences, load_checkpoint, load_scalars
from tests.tiny_corpora import write_additions

ITERATIONS = 12
MODEL = f"""
    --num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 48 --max-position-embeddings 48
    --micro-batch-size 2 --global-batch-size 4 --position-embedding-type rope --lr 1e-3 --lr-decay-style constant
    --hidden-dropout 0.1 --attention-dropout 0.1 --log-interval 1 --chat-template chatml --cpu
    --train-iters {ITERATIONS} --save-interval 2 --sft-loss faulty_objective:faulty --distributed-timeout-minutes 2
"""
# Without it torch 2.15's agents share one store for all rounds, and a new agent waits there in vain.
SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
TAKEN = "> SIGTERM: the step at hand is finished, then a checkpoint saved."
COMPARED = ("lm loss", "sft loss", "grad-norm", "trained tokens", "learning-rate")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Additions, a tokenizer, and a checkpoint `base` of two iterations to begin with."""
    folder = tmp_path_factory.mktemp("corpus")
    write_additions(folder)
    (folder / "base-orders").mkdir()
    run(folder, folder / "base-orders", f"--save {folder / 'base'} --train-iters 2")
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Path:
    """The run that all others are compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(corpus, folder, fine_tune(corpus, folder / "saved"))
    return folder


def fine_tune(corpus: Path, save: Path) -> str:
    """As a person would write it, and torchrun repeats it: with --load and --finetune of the weights to begin with."""
    return f"--load {corpus / 'base'} --finetune --save {save}"


def command(corpus: Path, orders: Path, flags: str) -> list[str]:
    data = f"--sft-data {corpus / 'train.jsonl'} --tokenizer-model {corpus / 'tokenizer.model'}"
    words = f"{MODEL} {data} --sft-cache {corpus / 'cache'} --tensorboard-dir {orders / 'tensorboard'} {flags}"
    return ["-m", "megatron_idft", "train", *words.split()]


def run(corpus: Path, orders: Path, flags: str, nproc: int = 2) -> str:
    """Run to the end in forked ranks; AssertionError with the output if one fails."""
    words = command(corpus, orders, flags)
    return forked(["-m", "tests.faults.with_orders", str(orders), *words[2:]], nproc=nproc)


def environment(orders: Path) -> dict[str, str]:
    return {
        "FAULTS": str(orders),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "faults")]),
        SHARED_STORE: "1",
    }


def order(folder: Path, name: str, text: str = "") -> Path:
    (folder / name).write_text(text)
    return folder / name


def assert_same(undisturbed: Path, folder: Path, save: Path, first: int = 1) -> None:
    expected, got = load_scalars(undisturbed / "tensorboard"), load_scalars(folder / "tensorboard")
    for key in COMPARED:
        assert sorted(got[key]) == list(range(first, ITERATIONS + 1)), key
        assert got[key] == {step: expected[key][step] for step in got[key]}, key
    want, have = load_checkpoint(undisturbed / "saved", ITERATIONS), load_checkpoint(save, ITERATIONS)
    assert differences(want, have) == []
    assert differences(load_checkpoint(undisturbed / "saved", ITERATIONS - 2), want), "the comparison must see a change"


def test_a_run_that_meets_every_fault_is_the_undisturbed_run_to_the_bit(corpus, undisturbed, tmp_path):
    save, lonely = tmp_path / "saved", tmp_path / "lonely.log"
    logs = [tmp_path / f"node{node}.log" for node in range(2)]
    words = command(corpus, tmp_path, fine_tune(corpus, save))
    restartable = ["--max-restarts", "3"]
    with Nodes() as nodes:
        print("nodes in separate network namespaces" if nodes.separate else "nodes on the loopback device")
        # A node that never comes: its agent ends while the others train.
        waiting = nodes.start(0, nodes.rendezvous(), words, lonely, environment(tmp_path), 10, forking_python())

        lost = order(tmp_path, "stop-4-1")
        order(tmp_path, "nan-6-0", "once")
        killed = order(tmp_path, "stop-8-1")
        terminated = order(tmp_path, "stop-9-0")
        rendezvous = nodes.rendezvous()

        def start(node: int, python: str) -> Agent:
            flags = [*restartable, *words]
            return nodes.start(node, rendezvous, flags, logs[node], environment(tmp_path), python=python)

        # What dies with its agent must be the agent's own child: that agent and its rank are started, not forked.
        agents = [start(0, forking_python()), start(1, sys.executable)]

        # A whole node is lost: its agent is killed, and its worker with it. Another agent takes its place. The NaN step
        # that follows ends its run by itself.
        wait_for((tmp_path / "stopped-4-1").exists, "iteration 4", agents)
        assert waiting.wait(30) == 1
        assert "RendezvousTimeoutError" in waiting.text
        worker = int((tmp_path / "stopped-4-1").read_text())
        assert worker in agents[1].workers()
        lost.unlink()
        agents[1].send(signal.SIGKILL)
        agents[1].process.wait()
        wait_for(lambda: not Path(f"/proc/{worker}").exists(), "the end of the killed agent's worker", agents[:1], 10)
        agents[1] = start(1, forking_python())

        # A worker is killed.
        wait_for((tmp_path / "stopped-8-1").exists, "iteration 8", agents)
        killed.unlink()
        os.kill(int((tmp_path / "stopped-8-1").read_text()), signal.SIGKILL)

        # The cluster wants the nodes back: SIGTERM to both agents, which pass it on.
        wait_for((tmp_path / "stopped-9-0").exists, "iteration 9", agents)
        for agent in agents:
            agent.send(signal.SIGTERM)
        wait_for(lambda: any(TAKEN in log.read_text() for log in logs), "the signal at rank 0", agents)
        terminated.unlink()
        for agent in agents:
            agent.wait(60)
        first = logs[0].read_text()
        assert "rank 0 has lost another rank: " in first and "its agent's, say why" in first
        assert "Training goes on from iteration 2 in" in first and "torchrun restarts it (0 of 3" in first
        assert first.count(f"--load {corpus / 'base'}, --finetune: for the first start only") == 3
        assert "iteration 6 is not finite: rank 0 on " in first and "found NaN in local grad norm" in first
        assert [int(n) for n in re.findall("holds this training at iteration (\\d+)", first)] == [2, 4, 6]
        assert f"SIGTERM: saved at iteration 9 in {save}. Start the same command again to go on" in first

    # Started again, the last checkpoint turns out to be truncated, and one bit of the one before has flipped.
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "9"
    os.truncate(save / "iter_0000009" / "__1_0.distcp", 1000)
    flip_a_bit(save / "iter_0000008" / "__0_0.distcp")
    again = run(corpus, tmp_path, fine_tune(corpus, save))
    assert re.search(r"iter_0000009/__1_0.distcp: 1000 bytes, \d+ were saved \(kept as .*iter_0000009.damaged\)", again)
    assert re.search(r"iter_0000008/__0_0.distcp: its content has changed .* \(kept as .*iter_0000008.damaged\)", again)
    assert "training goes on from iteration 6, the newest good checkpoint" in again
    assert (save / "iter_0000009.damaged").is_dir() and (save / "iter_0000008.damaged").is_dir()
    assert_same(undisturbed, tmp_path, save)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_disk_that_fills_while_saving_ends_the_run_and_costs_no_checkpoint(corpus, undisturbed, tmp_path):
    save = tmp_path / "disk" / "saved"
    save.parent.mkdir()
    size = sum(path.stat().st_size for path in (undisturbed / "saved" / "iter_0000002").iterdir())
    room = int(1.6 * size)
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(save.parent)], stderr=subprocess.DEVNULL
    ).returncode
    print("a full tmpfs" if mounted else "RLIMIT_FSIZE: mounting is not permitted")
    try:
        if not mounted:
            order(tmp_path, "file-limit-from-3", str(size // 2))
        with pytest.raises(AssertionError) as failed:
            run(corpus, tmp_path, fine_tune(corpus, save))
        text = str(failed.value)
        assert f"error: a checkpoint could not be saved in {save}: " in text
        assert ("the disk is full" in text) == mounted
        assert "Training goes on from iteration 2" in text and "Free space or raise the quota" in text
        assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
        assert (save / "iter_0000004").is_dir(), "it was begun"
        # The tracker itself may be what the full disk has cut off.
        (save / "latest_checkpointed_iteration.txt").write_text("")
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={20 * room}", str(save.parent)], check=True)
        else:
            (tmp_path / "file-limit-from-3").unlink()
        output = run(corpus, tmp_path, fine_tune(corpus, save))
        assert "latest_checkpointed_iteration.txt names no iteration but says ''" in output
        assert "holds this training at iteration 2" in output
        assert_same(undisturbed, tmp_path, save)
    finally:
        if mounted:
            subprocess.run(["umount", str(save.parent)], check=True)


def test_a_step_that_is_never_finite_ends_when_the_restarts_are_used_up(corpus, tmp_path):
    order(tmp_path, "nan-4-1", "always")
    words = command(corpus, tmp_path, f"--save {tmp_path / 'saved'} --rerun-mode disabled")
    with pytest.raises(AssertionError) as failed:
        variables = environment(tmp_path) | {SHARED_STORE: "0"}
        torchrun(["--max-restarts", "1", *words], nproc=2, env=variables, python=forking_python())
    text = str(failed.value)
    last = text[text.index("Root Cause") :]
    assert "iteration 4 is not finite: rank 1 on " in last and "found NaN in local grad norm" in last
    assert "The same iteration was so 1 time before: this is no passing fault." in last
    assert f"Training goes on from iteration 2 in {tmp_path / 'saved'} when you start the same command again" in last


def test_a_step_that_is_not_finite_twice_is_saved_before_it_by_megatron(corpus, tmp_path):
    """The rerun machine's own way: the step repeated at once, a checkpoint to repeat it elsewhere, exit code 16."""
    order(tmp_path, "nan-3-0", "always")
    flags = f"--save {tmp_path / 'saved'}"
    with pytest.raises(AssertionError, match=r"exit codes .*16") as failed:
        run(corpus, tmp_path, flags)
    assert "iteration 3 is not finite: rank 0 on " in str(failed.value)
    assert "It will now compute it on another GPU only" in str(failed.value)
    # Here there is no other GPU, and the first step after a start is one that Megatron itself does not look at.
    with pytest.raises(AssertionError) as failed:
        run(corpus, tmp_path, f"{flags} --rerun-mode disabled --no-check-for-nan-in-loss-and-grad")
    assert "iteration 3 is not finite: the gradient norm is nan" in str(failed.value)
    assert "The same iteration was so 1 time before" in str(failed.value)
    (tmp_path / "nan-3-0").unlink()
    output = run(corpus, tmp_path, f"{flags} --rerun-mode disabled --async-save --async-strategy mcore")
    assert "holds this training at iteration 2" in output
    assert (tmp_path / "saved" / "iter_0000012" / "checksums.json").is_file()


def test_what_cannot_be_continued_is_refused_with_the_remedy(corpus, tmp_path):
    save = tmp_path / "saved"
    shutil.copytree(corpus / "base", save)
    with pytest.raises(AssertionError, match="holds checkpoints of another training, begun with random weights"):
        run(corpus, tmp_path, fine_tune(corpus, save))
    flip_a_bit(save / "iter_0000002" / ".metadata")
    shutil.copytree(save, tmp_path / "base")
    with pytest.raises(AssertionError, match=r"no checkpoint in .* is good: iter_0000002/.metadata: its content"):
        run(corpus, tmp_path, f"--load {save} --save {save}")
    with pytest.raises(AssertionError, match=r"iter_0000002: missing \(iter_0000002.damaged was set aside\)"):
        run(corpus, tmp_path, f"--load {save} --save {save}")
    with pytest.raises(AssertionError, match=r"of iteration 2 is damaged: .*Copy it again from where it came from"):
        run(corpus, tmp_path, f"--load {tmp_path / 'base'} --finetune --save {tmp_path / 'new'}")
