"""`realign prompts`: its prompts are those that the pipeline feeds, and its answers come back as responses."""

import json
import re
from pathlib import Path

import pytest

from megatron_idft.cli import main
from megatron_idft.corpus.records import read_records
from megatron_idft.hinted_decoding.input.provided import Origin, ProvidedText, ProvidedTexts, prompt_sha256
from megatron_idft.hinted_decoding.prompt_rows import RecordPrompts
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.stages.tasks import RealignInput
from tests.hinted_decoding.scripted import LLAMA3, make_tokenizer
from tests.hinted_decoding.test_realign_pipeline import (
    ANALYSIS,
    HINT,
    MULTI_TURN,
    RIGHT,
    WRONG,
    record,
    run,
    settings,
    tokenizer,
)

__all__ = ["tokenizer"]
WHOLE = HintTemplate("w", "marker: # CoT\n---\n{{ conversation | length }} {{ solution }} # CoT")


def rows(tokenizer, one, *templates, given=None, **changes) -> list[dict]:
    job = settings(templates=templates, **changes)
    return list(RecordPrompts(RealignInput(0, one, **(given or {})), tokenizer, job, templates).rows())


def prompts(found: list[dict]) -> dict[tuple, list[int]]:
    return {(row["turn"], row["stage"]): row["token_ids"] for row in found if "no_prompt" not in row}


def missing(found: list[dict]) -> list[tuple]:
    return [(row["turn"], row["stage"], row["no_prompt"]) for row in found if "no_prompt" in row]


def test_the_prompts_are_those_that_the_pipeline_feeds(tokenizer):
    script = {"r/0/rollout/0": WRONG, "r/0/analysis": "x\n# CoT\n", "r/0/hinted": RIGHT}
    _, engine = run(tokenizer, script, record(), templates=(ANALYSIS,))
    fed = {name: request.prompt.tolist() for name, request in engine.requests.items()}
    found = rows(tokenizer, record(), ANALYSIS, max_tokens=50, analysis_max_tokens=7)
    assert prompts(found) == {(0, "own"): fed["r/0/rollout/0"], (0, "analysis"): fed["r/0/analysis"]}
    assert missing(found) == [(0, "hinted", "the prompt goes on with the analysis, to its marker")]
    for row in found[:2]:
        assert tokenizer.decode(row["token_ids"]) == row["text"] and row["id"] == "r"
        stopping = engine.settings_of("r/0/rollout/0").stopping
        assert set(row["stop_token_ids"]) == set(stopping.stop_ids)
    assert [row["max_tokens"] for row in found[:2]] == [50, 7]

    # With an analysis, and without a need of one.
    given = {"analyses": {0: ProvidedText("x\n# CoT\n")}}
    hinted = engine.requests["r/0/hinted"].hinted_prompt.tolist()
    assert prompts(rows(tokenizer, record(), ANALYSIS, given=given))[0, "hinted"] == hinted
    _, engine = run(tokenizer, {"r/0/rollout/0": WRONG, "r/0/hinted": RIGHT}, record(), templates=(HINT,))
    found = prompts(rows(tokenizer, record(), HINT))
    assert found[0, "hinted"] == engine.requests["r/0/hinted"].hinted_prompt.tolist() and len(found) == 2


def test_of_later_turns_what_depends_on_no_accepted_response_is_known(tokenizer):
    given = record("8", MULTI_TURN)
    script = {"r/0/rollout/0": RIGHT, "r/1/rollout/0": RIGHT, "r/1/analysis": "x\n# CoT\n"}
    script |= {"r/1/hinted": "The answer is 8."}
    _, engine = run(tokenizer, script, given, templates=(ANALYSIS,))
    assert "r/0/analysis" not in engine.requests
    found = rows(tokenizer, given, ANALYSIS)
    assert prompts(found)[1, "analysis"] == engine.requests["r/1/analysis"].prompt.tolist()
    before = "the prompt holds the response that is accepted before it"
    assert set(prompts(found)) == {(0, "own"), (0, "analysis"), (1, "analysis")}
    assert (1, "own", before) in missing(found)
    assert (1, "analysis", before) in missing(rows(tokenizer, given, WHOLE))


def test_what_has_no_prompt_says_why(tokenizer):
    long = [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "hello " * 300 + "\\boxed{7}"}]
    found = missing(rows(tokenizer, record(messages=long), HINT, max_positions=200))
    assert found == [(0, "hinted", "hinted prompt longer than --seq-length")]
    [(turn, stage, why)] = missing(rows(tokenizer, record(messages=long[:1]), HINT))
    assert (turn, stage) == (0, "own") and "no assistant turn" in why
    untold = [long[0], {"role": "assistant", "content": "Well."}]
    assert "no reference answer" in missing(rows(tokenizer, record(None, untold), HINT))[0][2]
    assert set(prompts(rows(tokenizer, record(None, untold), HINT, unverified="keep"))) == {(0, "own"), (0, "hinted")}
    assert set(prompts(rows(tokenizer, record(), HINT, rollout_samples=0))) == {(0, "hinted")}
    given = {"analyses": {0: ProvidedText("x", None, "0" * 64)}}
    assert "answers another prompt" in missing(rows(tokenizer, record(), ANALYSIS, given=given))[0][2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    make_tokenizer(folder)
    lines = [{"id": 7, "prompt": "3 + 4?", "response": "\\boxed{7}"}, {"id": "b", "messages": MULTI_TURN}]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def realign_prompts(folder: Path, output: Path, more: str = "") -> int:
    [model] = {path.parent for path in folder.rglob("tokenizer.json")}
    words = f"--tokenizer-model {model} --sft-data {folder / 'data.jsonl'} --seq-length 900 --output {output} {more}"
    return main(["realign", "prompts", *words.split()])


def test_a_file_of_prompts_and_its_answers(folder, tmp_path, capsys):
    words = "--hint-prompt analysis --rollout-samples 3 --seed 9"
    assert realign_prompts(folder, tmp_path / "a" / "p.jsonl", words) == 0
    said = capsys.readouterr().out
    assert "> 2 prompts of own responses" in said and "> 2 prompts of analyses" in said
    assert "> no prompt for 2: the prompt holds the response" in said
    header, *found = [json.loads(line) for line in (tmp_path / "a" / "p.jsonl").read_text().splitlines()]
    chat = make_tokenizer(tmp_path)
    assert header["realign_prompts"] == 1 and header["tokenizer_fingerprint"] == chat.fingerprint()
    assert (header["seed"], header["sampling"]["own"]["samples"]) == (9, 3)
    [template] = header["templates"]
    analysis = [row for row in found if row["stage"] == "analysis" and "no_prompt" not in row]
    assert {row["template_sha256"] for row in analysis} == {template["sha256"]} and template["marker"] == "# CoT"
    assert [row["id"] for row in found if row["stage"] == "own" and "no_prompt" not in row] == ["7", "b"]
    assert all(row["prompt_sha256"] == prompt_sha256(row["token_ids"]) for row in analysis)

    # What an engine answers, as the pipeline takes it.
    ids = chat.encode_batch([RIGHT + "<|im_end|>"], [[]])[0].ids.tolist()
    own = next(row for row in found if row["stage"] == "own")
    line = {"id": own["id"], "turn": 0, "responses": [RIGHT], "token_ids": [ids], "prompt_sha256": own["prompt_sha256"]}
    line |= {"tokenizer_fingerprint": header["tokenizer_fingerprint"]}
    (tmp_path / "r.jsonl").write_text(json.dumps(line) + "\n")
    origin = Origin(chat.fingerprint(), chat.vocab_size, [], {})
    given = ProvidedTexts(tmp_path / "r.jsonl", "rollouts", ["7", "b"], origin)
    first = next(iter(read_records([str(folder / "data.jsonl")])))
    [row], engine = run(chat, {}, first, given={"rollouts": given.get("7")})
    assert row["status"] == "kept" and not engine.calls and not given.unnamed


def test_without_a_named_prompt_the_own_responses_are_asked_for(folder, tmp_path, capsys):
    assert realign_prompts(folder, tmp_path / "p.jsonl", "--fallback retry --mix-slope 2 --limit 1") == 0
    assert "--hint-prompt auto a trial of `realign` chooses it" in capsys.readouterr().out
    header, row = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert header["templates"] == [] and row["stage"] == "own"


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ("--seq-length 0", "--seq-length 0: pass a whole number from 1"),
        ("--hint-prompt nowhere", "neither a packaged one"),
        ("--analyses {there} --hint-prompt analysis", r"line 1: expected"),
        ("--output {there}", "exists: name a new file"),
        ("--output x.parquet", "name one that ends in .jsonl"),
        ("--no-analysis --hint-prompt analysis", "with --no-analysis there is no marker"),
        ("--bf16", "--bf16 is not a flag"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(folder, tmp_path, capsys, more, what):
    there = tmp_path / "there.jsonl"
    there.write_text('{"id": "7"}\n')
    assert realign_prompts(folder, tmp_path / "p.jsonl", more.format(there=there)) == 2
    assert re.search(what, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["there.jsonl"]


def test_prompts_of_another_template_have_another_fingerprint(tmp_path):
    assert make_tokenizer(tmp_path / "a").fingerprint() != make_tokenizer(tmp_path / "b", LLAMA3).fingerprint()
