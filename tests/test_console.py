"""What libraries print goes to a log, what we print to the console; nothing is lost, and nothing comes twice."""

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_idft import console
from megatron_idft.cli import main
from tests.launch import ROOT

# One line by each way to the descriptors, and one of ours after each.
NOISE = """
import ctypes, logging, os, subprocess, sys, warnings
from pathlib import Path
from megatron_idft import console
from megatron_idft.console import say

warnings.simplefilter('always')

def noise():
    print("by print")
    say("ours 1")
    sys.stderr.write("by stderr" + chr(10))
    console.complain("ours 2")
    os.write(1, b"by descriptor 1" + bytes([10]))
    os.write(2, b"by descriptor 2" + bytes([10]))
    ctypes.CDLL(None).puts(b"by C")
    ctypes.CDLL(None).fflush(None)
    subprocess.run(["echo", "by a child"])
    logging.warning("by a logger")
    warnings.warn("by a warning")
    console.error_stream().write("ours 3" + chr(10))

def forked():
    if os.fork() == 0:
        print("by a fork", flush=True)
        os._exit(0)
    os.wait()
"""
WAYS = ["print", "stderr", "descriptor 1", "descriptor 2", "C", "a child", "a logger", "a warning"]


def run(code: str, *words: str, **more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    environment.pop("RANK", None)
    command = [sys.executable, "-c", NOISE + code, *words]
    return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=60)


def by(text: str) -> list[str]:
    return sorted(re.findall(rf"\bby ({'|'.join(WAYS)}|a fork)$", text, re.MULTILINE))


IN_FOLDER = """
import atexit
atexit.register(print, "while it ends")
print("before")
with console.quiet("score"):
    noise()
    console.keep_log(Path(sys.argv[1]))
    noise()
    forked()
print("after")
"""


def test_a_log_takes_all_that_is_not_ours(tmp_path):
    done = run(IN_FOLDER, str(tmp_path / "out"), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "out" / "logs").iterdir()
    # A process without threads of its own: both streams are in the order of their lines.
    assert done.stdout.splitlines() == [
        "before", "ours 1", f"> log of Megatron and the libraries: {log}", "ours 1", "after",
    ]  # fmt: skip
    assert done.stderr.splitlines() == ["ours 2", "ours 3"] * 2
    command, *lines = log.read_text().splitlines()
    assert command.startswith("-c /") and lines[0] == "by print" and lines[-1] == "while it ends"
    assert by("\n".join(lines)) == sorted([*WAYS, *WAYS, "a fork"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the temporary log is gone"


def test_verbose_leaves_everything_on_the_console(tmp_path):
    done = run(IN_FOLDER, str(tmp_path / "out"), MEGATRON_IDFT_VERBOSE="1", TMPDIR=str(tmp_path))
    assert by(done.stdout + done.stderr) == sorted([*WAYS, *WAYS, "a fork"])
    assert done.stdout.count("ours 1") == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["/proc/nowhere", "file"])
def test_where_the_folder_cannot_be_written_the_log_stays_and_its_path_is_printed(tmp_path, folder):
    (tmp_path / "file").write_text("")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = run(IN_FOLDER, str(tmp_path / folder), TMPDIR=str(temporary))
    (log,) = temporary.iterdir()
    assert f"libraries: {log}" in done.stdout and "by a fork" in log.read_text()


def test_without_a_temporary_directory_nothing_is_hidden(tmp_path):
    code = "import tempfile; tempfile.tempdir = '/proc/nowhere'\nwith console.quiet('plan'): noise()"
    done = run(code)
    assert done.returncode == 0 and by(done.stdout + done.stderr) == sorted(WAYS)


@pytest.mark.parametrize(
    ("filled", "prints", "kept"), [("deleted", True, False), ("kept", True, True), ("kept", False, False)]
)
def test_a_temporary_log_after_success(tmp_path, filled, prints, kept):
    code = f"with console.quiet('plan', {filled!r}):\n    noise() if {prints} else say('ours 1')\n"
    done = run(code, TMPDIR=str(tmp_path))
    logs = list(tmp_path.iterdir())
    assert len(logs) == kept and done.stdout == "ours 1\n"
    assert done.stderr.splitlines()[2 * prints :] == [f"> what libraries printed is in {log}" for log in logs]


CRASH = "with console.quiet('score'):\n    console.keep_log(Path(sys.argv[1]))\n    ctypes.string_at(0)\n"


def test_of_a_crash_in_c_the_console_shows_where_it_was(tmp_path):
    done = run(CRASH, str(tmp_path))
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr and str(next(tmp_path.glob("logs/*"))) in done.stdout


def test_two_launches_of_the_same_second_have_a_log_each(tmp_path):
    code = "import time; time.strftime, os.getpid = lambda _: 'now', lambda: 1\n"
    code += "with console.quiet('score'):\n    console.keep_log(Path(sys.argv[1]))\n    print(sys.argv[2])\n"
    for name in ("first", "second"):
        run(code, str(tmp_path), name)
    logs = sorted(tmp_path.glob("logs/*"), key=lambda path: len(path.name))
    assert [path.read_text().splitlines()[-1] for path in logs] == ["first", "second"]


def test_each_rank_has_a_log_and_the_first_one_names_its_own(tmp_path):
    code = "with console.quiet('score'):\n    console.keep_log(Path(sys.argv[1]))\n    print(os.environ['RANK'])\n"
    said = [run(code, str(tmp_path), RANK=rank, WORLD_SIZE="2").stdout for rank in "01"]
    logs = {path.stem[-5:]: path for path in tmp_path.glob("logs/*")}
    assert {name: path.read_text().splitlines()[-1] for name, path in logs.items()} == {"rank0": "0", "rank1": "1"}
    assert said == [f"> log of Megatron and the libraries, one for each rank: {logs['rank0']}\n", ""]


@pytest.mark.parametrize("capture", ["capfd", "capsys"])
def test_a_stream_that_pytest_has_replaced_is_the_console(tmp_path, request, capture):
    captured = request.getfixturevalue(capture)
    with console.quiet("score"):
        console.keep_log(tmp_path)
        print("by print")
        console.say("ours 1")
        os.write(2, b"by descriptor 2\n")
        console.complain("ours 2")
    print("after")
    out, err = captured.readouterr()
    (log,) = tmp_path.glob("logs/*")
    assert out.splitlines() == [f"> log of Megatron and the libraries: {log}", "ours 1", "after"] and err == "ours 2\n"
    assert log.read_text().splitlines()[1:] == ["by print", "by descriptor 2"]


def test_streams_that_are_no_files_are_the_console_too():
    code = "import contextlib, io\nout, err = io.StringIO(), io.StringIO()\n"
    code += "with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), console.quiet('plan'): noise()\n"
    done = run(code + "print(out.getvalue(), err.getvalue(), sep='', end='')")
    assert done.stdout.splitlines() == ["ours 1", "ours 2", "ours 3"] and not done.stderr


def test_a_terminal_is_one_also_for_bars(tmp_path):
    code = "with console.quiet('score'):\n    say(str([console.error_stream().isatty(), sys.stderr.isatty()]))\n"
    words = ["script", "-qec", f'{sys.executable} -c "{(NOISE + code).replace(chr(34), chr(39))}"', "/dev/null"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["[True, False]"], done


def test_an_error_leaves_the_log_to_who_reports_it(tmp_path):
    with pytest.raises(ZeroDivisionError), console.quiet("plan"):
        print("by print")
        raise ZeroDivisionError
    assert console.kept_log() is None and console.where_log_is() == ""
    log = console.write_log("the traceback\n")
    assert log is not None and Path(log).read_text() == "by print\nthe traceback\n"
    assert console.where_log_is() == f"\nThe log is {log}"
    console.drop_log()
    assert log.exists(), "it was named"
    log.unlink()


@pytest.mark.parametrize(("began", "existed"), [(False, False), (False, True), (True, False)])
def test_after_a_refusal_nothing_is_left_where_nothing_was_begun(tmp_path, began, existed):
    output = tmp_path / "out"
    if existed:
        output.mkdir()
    with pytest.raises(ZeroDivisionError), console.quiet("score"):
        console.keep_log(output)
        if began:
            (output / "parts").mkdir()
        raise ZeroDivisionError
    console.retract_log()
    assert output.exists() == (began or existed) and (output / "logs").exists() == began
    assert bool(console.where_log_is()) == began


def test_an_error_of_a_verb_is_not_told_with_the_log_of_an_earlier_one(tmp_path, capsys):
    with console.quiet("score"):
        console.keep_log(tmp_path)
        (tmp_path / "parts").mkdir()
    assert main(["score", "select", str(tmp_path / "none"), "--data", "none.jsonl", "--output", "out.jsonl"]) == 2
    assert str(tmp_path / "logs") not in capsys.readouterr().err


def test_ours_prints_through_the_console_alone():
    """A `print` elsewhere would end in the log. The verbs print before their block and after it."""
    package = ROOT / "megatron_idft"
    allowed = {package / "console.py", package / "integration/platform/doctor.py", *(package / "cli").glob("*.py")}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted(set(package.rglob("*.py")) - allowed)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert not found
