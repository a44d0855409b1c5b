"""The rounds example: when it stops, and two rounds of it with a tiny model."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.launch import ROOT, forking_python

FOLDER = ROOT / "examples" / "rounds"
SIZES = {"ROUNDS": "1", "STEPS": "4", "SEQ_LENGTH": "96", "ERRORS": "9", "MAX_NEW_TOKENS": "48"}


@pytest.fixture(scope="module")
def decide():
    spec = importlib.util.spec_from_file_location("rounds_decide", FOLDER / "decide.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rounds(*numbers: tuple[float, float]) -> list[dict]:
    """Verified share with a standard error of 0.03, mean phi with one of 0.04, of each round."""
    return [
        {
            "round": number,
            "verified share": {"value": share, "se": 0.03},
            "mean phi": {"value": phi, "se": 0.04},
        }
        for number, (share, phi) in enumerate(numbers)
    ]


@pytest.mark.parametrize(
    ("numbers", "errors", "why"),
    [
        ([(0.6, 0.0)], 2, []),
        ([(0.6, 0.0), (0.7, 0.1)], 2, []),
        ([(0.6, 0.0), (0.52, -0.11)], 2, []),  # 2 x hypot(0.03, 0.03) = 0.085, and 0.113
        ([(0.6, 0.0), (0.51, 0.1)], 2, ["verified share is 0.090 below round 0's"]),
        ([(0.6, 0.0), (0.7, -0.12)], 2, ["mean phi is 0.120 below round 0's"]),
        ([(0.6, 0.0), (0.7, -0.12)], 3, []),
        # Each a little lower than the one before: the best of the earlier ones counts.
        ([(0.60, 0.0), (0.55, 0.2), (0.50, 0.0)], 2, ["verified share is 0.100 below round 0's", "below round 1's"]),
    ],
)
def test_a_fall_is_more_than_its_standard_errors(decide, numbers, errors, why):
    found = decide.fallen(rounds(*numbers), errors)
    assert len(found) == len(why) and all(part in text for part, text in zip(why, found, strict=True))


def write(folder: Path, number: int, share: float | None, phi: float) -> None:
    stage = {"turns_right_share": None if share is None else {"value": share, "se": 0.01}}
    reports = {
        "held-out": {"corpus": {"stages": {"rollout": stage}}},
        "scores": {"corpora": [{"summary": {"phi_mean": {"value": phi, "se": 0.01}}}]},
        "realigned": {"corpus": {"records": {"kept": 3, "total": 4}}},
    }
    for name, report in reports.items():
        (folder / f"round-{number}" / name).mkdir(parents=True)
        (folder / f"round-{number}" / name / "report.json").write_text(json.dumps(report))


def test_the_table_names_the_file_of_each_number_and_the_code_says_whether_to_go_on(
    decide, tmp_path, capsys, monkeypatch
):
    def run(number: int) -> int:
        words = ["decide.py", str(tmp_path), str(number), "--model", f"model-{number}"]
        monkeypatch.setattr("sys.argv", words)
        try:
            decide.main()
        except SystemExit as ended:
            return ended.code
        return 0

    write(tmp_path, 0, 0.5, 0.0)
    write(tmp_path, 1, 0.6, 0.0)
    assert run(0) == 0 and run(1) == 0
    said = capsys.readouterr().out
    assert "3 of 4  +0.600 ± 0.010  +0.000 ± 0.010" in said and "model: model-1" in said
    assert f"verified share: {tmp_path}/round-1/held-out/report.json" in said
    write(tmp_path, 2, 0.6, -1.0)
    assert run(2) == 3 and "keep the model of round 1" in capsys.readouterr().out
    written = json.loads((tmp_path / "rounds.json").read_text())
    assert len(written["rounds"]) == 3 and "mean phi is 1.000 below" in written["stopped_because"][0]
    write(tmp_path, 3, None, 0.0)
    assert "too few held-out records for a verified share" in run(3)
    (tmp_path / "round-3" / "held-out" / "report.json").write_text("{}")
    assert "no corpus.stages.rollout.turns_right_share" in run(3)


def test_a_round_with_real_programs_goes_on_where_it_was(realign_example, tmp_path):
    made, _ = realign_example
    lines = (made / "data" / "corpus.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:20]) + "\n")
    (tmp_path / "held-out.jsonl").write_text("\n".join(lines[20:]) + "\n")
    given = {"MODEL": made / "model", "TRAIN": tmp_path / "train.jsonl", "HELD_OUT": tmp_path / "held-out.jsonl"}
    given |= {"HINT": ROOT / "examples" / "realign" / "hint.txt", "PYTHON": forking_python()}
    environment = {**os.environ, **SIZES, **{name: str(value) for name, value in given.items()}}

    def run() -> str:
        command = ["bash", FOLDER / "run.sh", "--out", tmp_path / "out"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said, out = run(), tmp_path / "out"
    table = json.loads((out / "rounds.json").read_text())
    assert [one["round"] for one in table["rounds"]] == [0, 1] and table["errors"] == 9
    for one in table["rounds"]:
        report = json.loads((out / one["verified share"]["file"]).read_text())
        assert report["corpus"]["records"]["total"] == 12
        right = report["corpus"]["stages"]["rollout"]["turns_right"]
        assert one["verified share"]["value"] == pytest.approx(right / 12)
    kept = json.loads((out / "round-1" / "realigned" / "report.json").read_text())["corpus"]["records"]["kept"]
    assert f"{kept} of 20" in said and len((out / "round-1" / "realigned.jsonl").read_text().splitlines()) == kept
    assert (out / "round-1" / "tuned" / "hf" / "iter_0000004" / "config.json").exists()
    assert "model: round-1/tuned/hf/iter_0000004" in said

    # Stopped before the last evaluation was finished: only that is done again.
    (out / "round-1" / "scores" / "report.json").unlink()
    trained = (out / "round-1" / "tuned" / "done").stat().st_mtime_ns
    assert run().splitlines()[-6:-1] == said.splitlines()[-6:-1]
    assert (out / "round-1" / "tuned" / "done").stat().st_mtime_ns == trained
