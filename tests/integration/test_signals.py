"""SIGTERM, Ctrl-C and SIGHUP to a training: to one rank, to the groups, to torchrun; in a step, an evaluation, a save.

Ranks have the DataLoader workers that a user has. An objective waits at a step for the test to send its signals.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.launch import ROOT, TAIL, forked, forked_codes, forking_python
from tests.tiny_corpora import write_additions

MODEL = """
    --num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 48 --max-position-embeddings 48
    --micro-batch-size 2 --global-batch-size 4 --position-embedding-type rope --lr 1e-3 --lr-decay-style constant
    --chat-template chatml --cpu --sft-loss faulty_objective:faulty --train-iters 8
"""
SECONDS = 25  # to save and end. torchrun kills after 30; a machine that does nothing else needs two


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_additions(folder)
    return folder


def words(corpus: Path, flags: str) -> list[str]:
    data = f"--sft-data {corpus / 'train.jsonl'} --tokenizer-model {corpus / 'tokenizer.model'}"
    return f"train {MODEL} {data} --sft-cache {corpus / 'cache'} {flags}".split()


class Orders:
    """Where ranks wait, and for what: see faults/faulty_objective.py."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ended = threading.Event()  # the training has

    def wait_at(self, place: str) -> None:
        (self.folder / f"stop-{place}").touch()

    def reached(self, place: str) -> int:
        """The process that waits there."""
        mark = self.folder / f"stopped-{place}"
        deadline = time.monotonic() + 150
        while not mark.exists():
            assert time.monotonic() < deadline and not self.ended.is_set(), f"{place} was not reached"
            time.sleep(0.02)
        return int(mark.read_text())

    def go_on(self) -> None:
        for order in self.folder.glob("stop-*"):
            order.unlink()


def stopped(
    corpus: Path, orders: Orders, flags: str, places: Sequence[str], send: Callable[[list[int]], None], nproc: int = 1
) -> tuple[list[int], str]:
    """Train in forked ranks, and `send` when all places are reached, with the processes there: (exit codes, output)."""
    sent: list[float] = []

    def conduct() -> None:
        ranks = [orders.reached(place) for place in places]
        sent.append(time.monotonic())
        send(ranks)
        time.sleep(0.3)
        orders.go_on()

    for place in places:
        orders.wait_at(place)
    thread = threading.Thread(target=conduct)
    thread.start()
    command = ["-m", "tests.faults.with_orders", str(orders.folder), *words(corpus, flags)]
    try:
        codes, text = forked_codes(command, nproc=nproc)
    finally:
        orders.ended.set()
        thread.join()
    assert any(codes) and sent and time.monotonic() - sent[0] < SECONDS, text[-TAIL:]
    assert "Traceback" not in text, text[-TAIL:]
    return codes, text


def send_to_groups(number: signal.Signals) -> Callable[[list[int]], None]:
    """As torchrun and Slurm do: the ranks' DataLoader workers get it as well."""

    def send(ranks: list[int]) -> None:
        for rank in ranks:
            os.killpg(rank, number)

    return send


def last_saved(save: Path) -> str:
    return (save / "latest_checkpointed_iteration.txt").read_text()


@pytest.mark.parametrize(
    ("number", "code", "workers"),
    [(signal.SIGTERM, 143, ""), (signal.SIGINT, 130, ""), (signal.SIGHUP, 143, "--num-workers 8")],
)
def test_a_signal_to_the_group_ends_in_a_checkpoint(corpus, tmp_path, number, code, workers):
    save = tmp_path / "saved"
    flags = f"--save {save} {workers}"
    seen: list[list[int]] = []

    def send(ranks: list[int]) -> None:
        [rank] = ranks
        seen.append(children(rank))
        os.killpg(rank, number)

    codes, text = stopped(corpus, Orders(tmp_path), flags, ["2-0"], send)
    assert codes == [code] and last_saved(save) == "2", text[-TAIL:]
    assert (
        text.rstrip()
        .splitlines()[-1]
        .endswith(f"saved at iteration 2 in {save}. Start the same command again to go on")
    )
    assert len(seen[0]) >= (8 if workers else 2), "DataLoader workers were there"
    assert not any(Path(f"/proc/{worker}").exists() for worker in seen[0])


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in listed.stdout.split()]


def test_one_rank_of_two_gets_it_and_both_save(corpus, tmp_path):
    """TP 2, with no worker; the rank without data gets the signal, several times as Slurm and torchrun send it."""
    save = tmp_path / "saved"
    flags = f"--save {save} --tensor-model-parallel-size 2 --num-workers 0"  # 0 is also a number that users choose

    def send(ranks: list[int]) -> None:
        for _ in range(3):
            os.kill(ranks[1], signal.SIGTERM)
            time.sleep(0.1)

    codes, text = stopped(corpus, Orders(tmp_path), flags, ["3-0", "3-1"], send, nproc=2)
    assert codes == [143, 143] and last_saved(save) == "3", text[-TAIL:]


def test_a_second_ctrl_c_ends_at_once_and_says_what_is_lost(corpus, tmp_path):
    save = tmp_path / "saved"

    def send(ranks: list[int]) -> None:
        os.kill(ranks[0], signal.SIGINT)
        time.sleep(3)  # within two seconds of the first, and that may be taken late, it would be an echo
        os.kill(ranks[0], signal.SIGINT)  # while the step waits, and without being let go on

    codes, text = stopped(corpus, Orders(tmp_path), f"--save {save} --save-interval 2", ["4-0"], send)
    assert codes == [1] and last_saved(save) == "2"
    assert "Once more ends at once, without saving." in text
    last = text.rstrip().splitlines()[-1]
    assert "Ctrl-C (SIGINT) again, in iteration 4: ended at once. Training goes on from iteration 2 in" in last


def test_before_the_first_step_nothing_is_lost_but_143_needs_a_checkpoint(corpus, tmp_path):
    """An evaluation is the first thing that a training does."""
    save = tmp_path / "saved"
    flags = f"--save {save} --sft-valid-data {corpus / 'train.jsonl'}"

    def send(ranks: list[int]) -> None:
        os.killpg(ranks[0], signal.SIGTERM)
        time.sleep(0.5)

    codes, text = stopped(corpus, Orders(tmp_path), flags, ["evaluation-1-0"], send)
    last = text.rstrip().splitlines()[-1]
    assert codes == [1] and not (save / "latest_checkpointed_iteration.txt").exists()
    assert "SIGTERM before the first step: nothing is lost. There is no checkpoint in" in last


@pytest.mark.parametrize(
    ("number", "tracker", "code", "said"),
    [
        (
            signal.SIGTERM,
            "12",
            143,
            "SIGTERM before the first step: nothing is lost. Training goes on from iteration",
        ),
        (signal.SIGINT, "12", 130, "Ctrl-C (SIGINT) before the first step: nothing is lost. Training goes on"),
        (signal.SIGTERM, None, 1, "nothing is lost. There is no checkpoint in"),
        (signal.SIGTERM, "garbage", 1, "nothing is lost. There is no checkpoint in"),
    ],
)
def test_a_signal_before_the_flags_are_parsed_ends_as_one_before_the_first_step(
    corpus, tmp_path, number, tracker, code, said
):
    """While torch is imported: as soon as the process takes signals, and without waiting for anything."""
    if tracker is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    command = [sys.executable, "-m", "megatron_idft", *words(corpus, f"--save={tmp_path}")]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    training = subprocess.Popen(
        command, cwd=ROOT, env=alone | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        while not takes(training.pid, number):
            assert training.poll() is None
            time.sleep(0.002)
        training.send_signal(number)
        out, err = (text.decode() for text in training.communicate(timeout=SECONDS))
    finally:
        training.kill()
    assert training.returncode == code and not out, (out, err)
    [line] = err.splitlines()
    assert line.startswith("megatron-idft train: ") and said in line
    assert line.endswith("when you start the same command again")


def takes(pid: int, number: int) -> bool:
    """Whether the process has a handler for the last of the signals, SIGHUP, and for this one."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return all(caught >> (each - 1) & 1 for each in (signal.SIGHUP, number))


def test_a_signal_in_an_evaluation_or_a_save_ends_in_a_checkpoint_of_that_step(corpus, tmp_path):
    save = tmp_path / "saved"
    flags = f"--save {save} --sft-valid-data {corpus / 'train.jsonl'} --start-eval-at-iter 1 --eval-interval 2"
    group = send_to_groups(signal.SIGTERM)
    codes, text = stopped(corpus, Orders(tmp_path), flags, ["evaluation-3-0"], group)
    assert codes == [143] and last_saved(save) == "2" and "> the evaluation is left: a signal has come" in text
    assert "validation loss at iteration 2" not in text

    # On the way to the next step: no step is lost, and a queue may start it again.
    codes, text = stopped(corpus, Orders(tmp_path), flags, ["load-0"], group)
    assert codes == [143] and "before the first step: nothing is lost. Training goes on from iteration 2 in" in text

    codes, text = stopped(corpus, Orders(tmp_path), f"{flags} --save-interval 4", ["save-4-0"], group)
    assert codes == [143] and last_saved(save) == "4" and text.count("successfully saved checkpoint") == 1
    assert "holds this training at iteration 2: it continues there" in text

    # In the last save: training is finished, its export is not written. Started again it is, and nothing else.
    codes, text = stopped(corpus, Orders(tmp_path), flags, ["save-8-0"], group)
    assert codes == [143] and last_saved(save) == "8"
    text = forked(["-m", "tests.faults.with_orders", str(tmp_path), *words(corpus, flags)])
    assert f"> training is finished: {save} holds iteration 8 of 8." in text and " iteration        8/" not in text


def test_without_save_a_signal_says_that_nothing_is_kept(corpus, tmp_path):
    codes, text = stopped(corpus, Orders(tmp_path), "", ["2-0"], send_to_groups(signal.SIGINT))
    assert "no --save DIR: nothing of this training will be kept" in text
    assert codes == [1] and "Without --save nothing is kept: training begins anew" in text.rstrip().splitlines()[-1]


def test_every_process_of_a_step_is_told_as_slurm_does_it(corpus, tmp_path):
    """torchrun, its two ranks (TP 2) and their DataLoader workers; torchrun passes its own signal on besides."""
    save, orders = tmp_path / "saved", Orders(tmp_path)
    environment = {"FAULTS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "faults")])
    places = ["2-0", "2-1"]
    for place in places:
        orders.wait_at(place)
    command = [forking_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_idft", *words(corpus, f"--save {save} --tensor-model-parallel-size 2")]
    with open(tmp_path / "log", "wb") as log:
        torchrun = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        ranks = [orders.reached(place) for place in places]
        everyone = [torchrun.pid, *ranks, *(worker for rank in ranks for worker in children(rank))]
        assert len(everyone) >= 5, "two DataLoader workers"
        for pid in everyone:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)
        orders.go_on()
        assert torchrun.wait(SECONDS) == 1, "torchrun's own, whatever its ranks say"
    finally:
        if torchrun.poll() is None:  # its ranks die with it
            torchrun.kill()
            torchrun.wait()
    text = (tmp_path / "log").read_text()
    assert last_saved(save) == "2" and "saved at iteration 2 in" in text, text[-TAIL:]
    assert "killed by signal" not in text and "forcefully exiting" not in text, text[-TAIL:]
    assert not any(Path(f"/proc/{pid}").exists() for pid in everyone)
