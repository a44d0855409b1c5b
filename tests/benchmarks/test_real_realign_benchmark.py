"""The table of what realign keeps with the real model: made from folders as its ways leave them."""

import argparse
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_idft.hinted_decoding.output.outcomes import OUTCOME_SCHEMA
from tests.hinted_decoding.outcome_rows import candidate, record, scores, turn
from tests.launch import ROOT

QUESTION = "How many are 3 and 4?"


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "benchmarks"))
    import real_realign

    yield real_realign
    for name in ("real_realign", "real_model", "problems"):
        sys.modules.pop(name, None)


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def own(number, sample, text, phi, reason="eos"):
    return {
        "request": f"r{number}/own/{sample}", "record": f"r{number}", "sample": sample, "text": text, "phi": phi,
        "tokens": 10, "finish_reason": reason,
    }  # fmt: skip


def outcome(rng, number, text, status="kept"):
    drawn = scores(rng, 8, hinted=True)
    tried = candidate(drawn, "hinted", text=text, accepted=status == "kept")
    written = turn(
        drawn, [tried], "hinted", drawn if status == "kept" else None, failures=[], hints=[{"analysis_tokens": 5}]
    )
    return record(number, status, [written])


def test_the_table_counts_what_is_kept_right_and_near(program, tmp_path, capsys):
    import numpy as np

    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "#### 7"}]
    lines(tmp_path / "problems.jsonl", [{"id": f"r{i}", "answer": "7", "messages": messages} for i in range(5)])
    session = {"commit": "c", "seconds": 1.5, "command": ["-m", f"{tmp_path}/defaults"]}
    samples = [own(0, 0, "The answer is 7.", 1.0), own(1, 0, "The answer is 8.", -5.0), own(1, 1, "It is 7.", 3.0)]
    samples.append(own(2, 0, "The answer is 7.", -9.0, "length"))
    lines(tmp_path / "own" / "samples.jsonl", samples)
    rng = np.random.default_rng(1)
    texts = [
        "The answer is 7.",
        "3 + 4 = 7. The answer is 7.",
        "The answer is 8.",
        "By the answer key, the answer is 7.",
    ]
    rows = [outcome(rng, i, text) for i, text in enumerate(texts)]
    rows.append(outcome(rng, 4, "The answer is 7.", "dropped"))
    for arm in ("own", "defaults"):
        lines(tmp_path / arm / "sessions.jsonl", [session])
        (tmp_path / arm / "finished").touch()
    (tmp_path / "defaults" / "parts").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, OUTCOME_SCHEMA), tmp_path / "defaults" / "parts" / "chunk-000000.parquet")
    options = argparse.Namespace(out=tmp_path, seed=1, max_new_tokens=9, samples=2, hf_model="/m")
    program.summarize(options, tmp_path / "problems.jsonl")
    result = json.loads((tmp_path / "real_realign.json").read_text())
    right = result["arms"]["own, right samples"]
    assert (right["samples"], right["finished"], right["right"], right["records_with_a_right_sample"]) == (4, 3, 2, 2)
    assert right["phi"]["value"] == pytest.approx(0.2) and right["phi_of_all"]["value"] == pytest.approx(-0.25)
    plain = result["arms"]["plain sampling"]
    assert plain["kept_and_right"] == 1 and plain["share"]["value"] == 0.2 and plain["decoded_tokens"] == 30
    found = result["arms"]["defaults"]
    assert found["kept_and_right"] == 3 and found["kept_and_not_right"] == 1 and found["share"]["value"] == 0.6
    kept = [row["turns"][0]["candidates"][0] for row in rows[:2] + rows[3:4]]
    assert found["phi"]["value"] == pytest.approx(sum(c["phi_sum"] for c in kept) / 24)
    assert found["leaks"] == ["answer key"] and found["decoded_tokens"] == 5 * 13 and found["by_stage"] == {"hinted": 3}
    assert found["sessions"] == [session | {"command": ["-m", "OUT/defaults"]}] and found["bare"] == 0
    goals = {goal["name"].split(",")[0]: goal["hit"] for goal in result["goals"]}
    assert goals["share of the records kept and right"] and not goals["leak phrases in the kept"]
    printed = capsys.readouterr().out
    assert (
        "MISS  leak phrases" in printed
        and "of which 2 are too few to tell" in printed
        and "own, right samples" in printed
        and "60.0%" in printed
    )


def test_every_way_gets_the_same_records_and_lengths(program, tmp_path):
    (tmp_path / "defaults").mkdir()
    (tmp_path / "defaults" / "prompts.json").write_text(json.dumps({"order": ["explain", "analysis"]}))
    options = argparse.Namespace(out=tmp_path, seed=3, max_new_tokens=9, hf_model="m", chunk_records=5)
    samples = [own(1, 0, "one", 0), own(1, 1, "two", 0), own(2, 0, "three", 0, "length")]
    lines(tmp_path / "own" / "samples.jsonl", samples)
    program.write_rollouts(tmp_path)
    given = (tmp_path / "own-responses.jsonl").read_text().splitlines()
    assert list(map(json.loads, given)) == [{"id": "r1", "response": "one"}, {"id": "r2", "response": ""}]
    commands = {arm: program.realign_command(arm, options, tmp_path / "d") for arm in program.ARMS[2:]}
    same = {tuple(word for word in words[4:] if str(tmp_path / arm) != word)[:17] for arm, words in commands.items()}
    assert len(same) == 1
    assert commands["defaults"][-2:] == commands["paper"][-2:] == ["--rollouts", str(tmp_path / "own-responses.jsonl")]
    assert "--paper" in commands["paper"] and commands["distillation"][-2:] == ["--hint-prompt", "explain"]
    assert "--hint-prompt" not in commands["defaults"]
