"""The real model's own words: greedy decoding as transformers does it, and a realignment of real records."""

import json
import subprocess
import warnings

import pytest
import torch

from megatron_idft.corpus.ledger.ledger import status_of
from megatron_idft.hinted_decoding.output.outcomes import count_methods, describe_methods
from megatron_idft.hinted_decoding.output.results import read_outcomes
from tests.launch import ROOT, forked, forking_python
from tests.tiny_corpora import write_records

TOKENS = 40
NEAR_TIE = 1e-3  # nats between the two likeliest tokens, which fp32 may order either way


def prompt(tokenizer, record) -> list[int]:
    question = record["messages"][:1]
    return tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]


def test_greedy_decoding_is_that_of_transformers(huggingface, cache, model, tokenizer, records, tmp_path):
    """At TP 3, all prompts in one batch, with a cache; transformers decodes one after the other."""
    prompts = [prompt(tokenizer, record) for record in records[:4]]
    requests = [{"id": str(i), "prompt": ids} for i, ids in enumerate(prompts)]
    stopping = {"stop_ids": [tokenizer.eos_token_id], "max_tokens": TOKENS}
    case = {"requests": requests, "sampling": {"temperature": 0}, "stopping": stopping}
    (tmp_path / "cases.json").write_text(json.dumps({"greedy": case}))
    script = ROOT / "tests" / "inference" / "engine_probe.py"
    flags = f"--hf-model {huggingface} --hf-cache {cache} --seq-length 160 --tensor-model-parallel-size 3"
    forked([script, tmp_path / "cases.json", tmp_path / "out.json", *flags.split()], nproc=3)
    _, found = json.loads((tmp_path / "out.json").read_text())
    for ids, got in zip(prompts, found["greedy"], strict=True):
        with torch.no_grad():
            whole = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS)[0].tolist()
        wanted = whole[len(ids) :]
        print(repr(tokenizer.decode(wanted)))
        if got["tokens"] != wanted:
            tell_near_tie(model, ids, got["tokens"], wanted)


def tell_near_tie(model, ids, got, wanted) -> None:
    """Where they part, both tokens must be equally likely but for rounding."""
    at = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b)
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *wanted[:at]]])).logits[0, -1]
    margin = (logits[wanted[at]] - logits[got[at]]).item()
    told = f"token {at} of {TOKENS} is {got[at]}, not {wanted[at]}, with {margin:.1e} nats between them"
    assert abs(margin) < NEAR_TIE, told
    warnings.warn(f"a near tie: {told}", stacklevel=2)


def realign(*words) -> str:
    command = [forking_python(), "-m", "megatron_idft", "realign", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout


def phi_sum(model, tokenizer, record) -> float:
    """Of the response and its end of turn, in float64 from fp32 logits."""
    ids = torch.tensor(tokenizer.apply_chat_template(record["messages"], return_dict=True)["input_ids"][:-1])
    start = len(prompt(tokenizer, record))
    with torch.no_grad():
        log_probs = model(ids[None]).logits[0, start - 1 : -1].double().log_softmax(-1)
    return (log_probs.gather(-1, ids[start:, None]).sum() - (log_probs.exp() * log_probs).sum()).item()


def test_a_realignment_is_complete_and_its_programs_agree(verb, model, tokenizer, records, tmp_path):
    """All stages run; the texts are cut after a few tokens, so that hardly one can be right, and the originals stay."""
    data, output, merged = tmp_path / "data.jsonl", tmp_path / "out", tmp_path / "merged.jsonl"
    write_records(data, records[:2])
    flags = "--hint-prompt analysis --analysis-max-tokens 24 --max-new-tokens 8"
    flags += " --seq-length 600 --kv-memory-gb 0.5 --fallback original"
    forked(verb("realign", "--sft-data", data, "--output", output, *flags.split()))

    state, rows = status_of(output), list(read_outcomes(output))
    assert (state.finished, state.num_chunks) == (1, 1)
    assert [(row["id"], row["status"]) for row in rows] == [(record["id"], "kept") for record in records[:2]]
    answers = []
    for row, record in zip(rows, records, strict=False):
        turn = row["turns"][0]
        rollout, *hinted = turn["candidates"]
        assert rollout["stage"] == "rollout" and rollout["hint_share_mean"] is None
        assert [candidate["stage"] for candidate in hinted] == ["hinted", "retry", "retry"][: len(hinted)]
        assert len(hinted) == 3 or turn["candidates"][-1]["accepted"], turn["failures"]
        assert all(0 < candidate["hint_share_mean"] <= 1 for candidate in hinted)
        # This model writes no marker of its own; that which was appended leaves no line break to the response.
        assert not any(candidate["text"][:1].isspace() for candidate in hinted)
        for candidate in turn["candidates"]:
            cut = candidate["finish_reason"] == "length"
            longest = 16 if candidate["more_room"] else 8
            assert candidate["num_tokens"] == longest if cut else candidate["num_tokens"] < longest
            assert not cut or (candidate["more_room"] and candidate["rejected_because"] == "unfinished")
        assert turn["num_prompt_tokens"] == len(prompt(tokenizer, record))
        assert turn["original_text"] == record["messages"][1]["content"]
        assert turn["original_phi_sum"] == pytest.approx(phi_sum(model, tokenizer, record), abs=1e-3)
        accepted = [candidate["text"] for candidate in turn["candidates"] if candidate["accepted"]]
        answers.append((accepted or [turn["original_text"]])[0])

    counts = json.loads(realign("merge", output, "--output", merged).splitlines()[-1])
    methods = count_methods(turn for row in rows for turn in row["turns"])
    assert counts == {"kept": 2, "dropped": 0, "error": 0, "kept_turns": methods} and methods.total() == 2
    told = realign("status", output)
    assert "records: 2 kept" in told and describe_methods(methods) in told
    written = [json.loads(line)["messages"] for line in merged.read_text().splitlines()]
    assert [messages[0] for messages in written] == [record["messages"][0] for record in records[:2]]
    assert [messages[1]["content"] for messages in written] == answers
