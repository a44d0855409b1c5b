"""`prepare` killed and stopped: the same command goes on, to the same bytes."""

import fcntl
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare
from megatron_idft.errors import PrepareError
from tests.data.prepared_files import corpus, files, write

ROOT = Path(__file__).parents[2]

PREPARE = """
import sys
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare
model, records, output, seq_length = sys.argv[1:]
settings = PrepareSettings((records,), int(seq_length), chunk_bytes=20_000)
done = prepare(settings, load_tokenizer(model, "chatml"), output, workers=2, progress=False)
print(done.resumed_chunks)
"""


def launch(model, records, output):
    command = [sys.executable, "-c", PREPARE, *map(str, (model, records, output)), "128"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def is_worker(process: psutil.Process) -> bool:
    """Another child is the one in which the chat template is tried."""
    try:
        return "megatron_idft.data.packed.encoding_process" in process.cmdline()
    except psutil.Error:
        return False


def test_killed_again_and_again_it_ends_with_the_same_bytes(sentencepiece_model, tmp_path):
    file, output = write(tmp_path / "a.jsonl", corpus(2500)), tmp_path / "killed"
    prepare(
        PrepareSettings((str(file),), 128, chunk_bytes=20_000),
        load_tokenizer(sentencepiece_model, "chatml"),
        tmp_path / "undisturbed",
        workers=2,
    )
    chunks, rng = tmp_path / "killed.chunks", random.Random(0)
    moments = [lambda n=n: len(list(chunks.glob("chunk-*.json"))) >= n for n in (1, 9)]
    moments.append(lambda: any(chunks.glob("assembling-*")))
    for moment in moments:
        process = launch(sentencepiece_model, file, output)
        deadline = time.monotonic() + 60
        while not moment():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    # A worker that is killed ends the run, which says so; the others end with it.
    (chunks / "chunk-000003.json").unlink(missing_ok=True)
    process = launch(sentencepiece_model, file, output)
    while not (workers := [child for child in psutil.Process(process.pid).children() if is_worker(child)]):
        time.sleep(0.001)
    workers[0].kill()
    _, errors = process.communicate(timeout=60)
    if process.returncode:  # else it was killed when its work was done
        assert "a worker process ended by itself (signal SIGKILL)" in errors
        process = launch(sentencepiece_model, file, output)
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and int(out) >= 9, errors
    assert files(output) == files(tmp_path / "undisturbed")
    assert not chunks.exists()


def test_killed_between_the_last_renames_it_ends_with_the_same_bytes(sentencepiece_model, tmp_path):
    tokenizer = load_tokenizer(sentencepiece_model, "chatml")
    settings = PrepareSettings((str(write(tmp_path / "a.jsonl", corpus(50))),), 128)
    prepare(settings, tokenizer, tmp_path / "packs", workers=1, keep_chunks=True, progress=False)
    before = files(tmp_path / "packs")
    for suffix in (".json", ".idx", ".starts.bin"):  # what had not been renamed
        (tmp_path / f"packs{suffix}").unlink()
    (tmp_path / "packs.weight.bin").write_bytes(b"of another life")
    with open(tmp_path / "packs.chunks" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PrepareError, match="another prepare is at work"):
            prepare(settings, tokenizer, tmp_path / "packs", workers=1, progress=False)
    again = prepare(settings, tokenizer, tmp_path / "packs", workers=1, progress=False)
    assert files(tmp_path / "packs") == before and again.chunks == 0 and again.resumed_chunks == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_it_and_no_process_stays(sentencepiece_model, tmp_path, number, code):
    file = write(tmp_path / "a.jsonl", corpus(6000))
    words = f"--data {file} --output {tmp_path}/packs --tokenizer-model {sentencepiece_model} --chat-template chatml"
    line = [sys.executable, "-m", "megatron_idft", "prepare", *words.split(), "--seq-length", "64"]
    line += ["--chunk-bytes", "20000", "--workers", "2", "--no-progress"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not any((tmp_path / "packs.chunks").glob("chunk-*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code and number.name in errors and "Traceback" not in errors, (out, errors)
    assert workers and not any(worker.is_running() for worker in workers)
