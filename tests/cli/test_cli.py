"""The verbs from outside: help, exit codes, and what doctor finds."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_idft.cli.failures import report
from megatron_idft.errors import LostRankError, TrainingStoppedError
from tests.launch import ROOT, forking_python


def command(*words: str, path: Path = ROOT, python: str | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)]), "PYTHONWARNINGS": "ignore"}
    started = [python or forking_python(), "-m", "megatron_idft", *words]
    return subprocess.run(started, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["run", "--help"],
        ["doctor", "--help"],
        ["train", "-h"],
        ["convert", "-h"],
        ["realign", "-h"],
        ["plan", "-h"],
        ["--version"],
    ],
)
def test_help_is_help(words):
    done = command(*words)
    assert done.returncode == 0 and "megatron" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fine-tune"],
        ["run"],
        ["run", "--sft-loss", "idft"],
        ["train"],
        ["doctor", "x"],
        ["convert"],
        ["convert", "x"],
        ["realign"],
        ["plan"],
        ["realign", "merge", "nowhere", "--output", "x.jsonl"],
        ["realign", "prompts", "--sft-data", "nowhere.jsonl", "--seq-length", "9", "--output", "x.jsonl"],
    ],
)
def test_unusable_arguments_exit_with_2_and_say_what_is_expected(words):
    done = command(*words)
    assert done.returncode == 2 and re.search("usage|megatron-idft", done.stdout + done.stderr)


def test_train_help_documents_the_flags():
    done = command("train", "--help", python=sys.executable)
    assert done.returncode == 0, done.stderr[-2000:]
    for text in ("sft data:", "--sft-truncation", "sft loss:", "--idft-gamma-max", "arXiv 2602.12222"):
        assert text in done.stdout


def test_a_users_mistake_is_one_line_without_a_traceback():
    done = command("run", "nowhere.py")
    assert done.returncode == 2 and "there is no script" in done.stderr and "Traceback" not in done.stderr


def test_doctor_is_content_with_this_environment_and_names_what_will_be_used():
    done = command("doctor")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1] == "training can start" and all(line.startswith(("ok ", "      ")) for line in lines[:-1])
    for name in (
        "python",
        "torch",
        "megatron",
        "gloo",
        "triton",
        "uses: layers",
        "uses: loss",
        "uses: decoding",
        "loss",
    ):
        assert any(line[4:].strip().startswith(name) for line in lines), name


def test_doctor_fails_where_two_installations_are_mixed(tmp_path):
    (tmp_path / "megatron" / "training").mkdir(parents=True)
    (tmp_path / "megatron" / "training" / "__init__.py").write_text("")
    done = command("doctor", path=tmp_path)
    assert done.returncode == 1 and "training cannot start" in done.stdout
    failed = next(line for line in done.stdout.splitlines() if line.startswith("FAIL"))
    assert "two installations are mixed" in failed and str(tmp_path) in failed


def test_without_torch_a_verb_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; from megatron_idft.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in (
        ["train", "--sft-data", "a"],
        ["plan", "--gpus", "8"],
        ["score", "--sft-data", "a"],
        ["convert", "to-hf", "a", "b"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"`{words[0]}` needs torch" in done.stderr and "megatron-idft[train]" in done.stderr


HELPS = """train;run;prepare;score;score status;score report;score select;realign;realign prompts;realign status
    realign merge;realign report;plan;convert;doctor;init""".replace("\n", ";").split(";")
# What each of them imports, in all, with room for a release of Python: torch alone brings 2,000 modules.
MOST_MODULES = 400


def test_a_help_comes_without_torch():
    """And names the flag that every verb has."""
    code = """
import contextlib, io, os, sys
slow = ("torch", "megatron", "transformers", "matplotlib", "tqdm")
sys.modules |= dict.fromkeys(slow)
for words in sys.argv[1:]:
    if os.fork() == 0:
        from megatron_idft.cli import main
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            assert main([*words.split(), "--help"]) == 0
        found = [str(part in text.getvalue()) for part in ("usage: ", "--verbose")]
        os.write(1, f"{words}: {len(sys.modules)} {' '.join(found)}\\n".encode())
        os._exit(0)
    os.wait()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, *map(str.strip, HELPS)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert not done.stderr, done.stderr
    found = {line.partition(": ")[0]: line.partition(": ")[2].split() for line in done.stdout.splitlines()}
    assert list(found) == [word.strip() for word in HELPS]
    assert all(rest == ["True", "True"] for _, *rest in found.values()), found
    assert {verb: count for verb, (count, *_) in found.items() if int(count) > MOST_MODULES} == {}


@pytest.mark.parametrize(
    ("words", "seen"),
    [("run SCRIPT --verbose", "0"), ("run --verbose SCRIPT", "1"), ("run --cpu --verbose SCRIPT --verbose", "1")],
)
def test_verbose_before_the_script_is_ours_and_after_it_the_scripts(tmp_path, words, seen):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys; print('seen', os.environ.get('MEGATRON_IDFT_VERBOSE', '0'), '--verbose' in sys.argv)\n"
    )
    done = command(*words.replace("SCRIPT", str(script)).split())
    assert f"seen {seen} {words.endswith('--verbose')}" in done.stdout, done


def test_a_bug_says_that_it_is_one_and_where_the_traceback_is(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text("raise ZeroDivisionError('of mine')\n")
    done = command("run", str(script))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for text in ("ZeroDivisionError: of mine", "failing.py, line 1", "a bug"):
        assert text in done.stderr
    log = Path(re.search(r"The traceback is in (\S+)", done.stderr)[1])
    assert "Traceback (most recent call last)" in log.read_text() and str(script) in log.read_text().splitlines()[0]
    log.unlink()


def test_of_two_ranks_one_speaks_and_torchrun_shows_what_it_said():
    words = [forking_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "megatron_idft", "train", "--sft-los", "idft"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    said = "megatron-idft train: error: --sft-los is not a flag; did you mean --sft-loss?"
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 1 and lines.count(said) == 1
    assert lines[-2].strip() == f"traceback : {said}"  # torchrun's line of the first rank that failed


def test_of_a_cause_and_its_consequence_torchrun_shows_the_cause(tmp_path, monkeypatch):
    """It takes the earliest, in whole seconds, and of equals the lowest rank."""
    monkeypatch.setattr(time, "time", lambda: 1000.5)
    dates = []
    for rank, error in enumerate((LostRankError("rank 0 has lost another rank"), TrainingStoppedError("not finite"))):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
        assert report("train", error) == 1
        told = json.loads((tmp_path / f"{rank}.json").read_text())["message"]
        dates.append(told["extraInfo"]["timestamp"])
    assert dates == ["1001", "1000"]


def test_a_lost_rank_and_a_full_disk_are_no_bugs(monkeypatch, capfd):
    """As gloo says it where the other rank was killed, and as pyarrow says it: without a file's name."""
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:48016. GLHF!")
    full = OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")
    assert [report("score", lost), report("score", full)] == [1, 1]
    said = capfd.readouterr().err
    assert "rank 0 has lost another rank: " in said and "No space left on device: free some space" in said
    assert "bug" not in said


def test_help_whose_reader_has_ended_says_nothing():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [forking_python(), "-m", "megatron_idft", "score", "--help"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        started.stdout.close()
        assert started.stderr.read() == "" and started.wait(60) == 1
