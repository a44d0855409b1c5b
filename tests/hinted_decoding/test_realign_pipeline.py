"""What the stages decide, with an engine that says what it is told: acceptance, hints, fallbacks, ids, errors."""

import json
from collections import deque
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from megatron_idft.corpus.records import Record
from megatron_idft.corpus.verification.leaks import LeakFilter
from megatron_idft.corpus.verification.verifier import Verifier
from megatron_idft.data.chat.conversations import encode_conversation
from megatron_idft.data.packed.dataset import PackedDataset
from megatron_idft.hinted_decoding.input.provided import ProvidedText, prompt_sha256
from megatron_idft.hinted_decoding.mixing import EntropyMixing
from megatron_idft.hinted_decoding.output.outcomes import (
    OUTCOME_SCHEMA,
    count_methods,
    count_tries,
    describe_methods,
    describe_reason,
    describe_tries,
)
from megatron_idft.hinted_decoding.preview import describe_unreferenced
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.report.summary import summarize
from megatron_idft.hinted_decoding.settings import RealignSettings
from megatron_idft.hinted_decoding.stages.conversation import encode
from megatron_idft.hinted_decoding.stages.pipeline import Realigner
from megatron_idft.hinted_decoding.stages.tasks import RealignInput, RecordTask
from tests.data.prepared_files import tokenized, write
from tests.hinted_decoding.scripted import LLAMA3, MISTRAL, QWEN3_MARKED, ScriptedEngine, make_tokenizer, score_ids

ANALYSIS = HintTemplate("a", 'marker: # CoT\nafter-marker: "\\n"\n---\n{{ question }} {{ solution }} # CoT')
HINT = HintTemplate("h", "---\n{{ question }} {{ solution }} {{ answer }}")
ASKED = "<|im_start|>user\n3 + 4? It is \\boxed{7} # CoT<|im_end|>\n<|im_start|>assistant\n"  # by ANALYSIS
UNUSABLE = HintTemplate("u", "---\n{{ question }} {{ solution.nothing.there }}")
RIGHT, WRONG, LEAK = "The answer is 7.", "The answer is 8.", "By the reference answer, the answer is 7."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def record(answer="7", messages=None, identity="r", **extra) -> Record:
    if messages is None:
        messages = [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "It is \\boxed{7}"}]
    return Record(messages, identity, "data.jsonl", 3, answer, "sums", extra)


def settings(**changes) -> RealignSettings:
    defaults = {
        "seed": 5,
        "max_positions": 400,
        "max_tokens": 50,
        "templates": (ANALYSIS,),
        "retries": 0,
        "more_room": 0.0,
    }
    return RealignSettings(**(defaults | {"mixing": EntropyMixing(600)} | changes))


def run(tokenizer, script, *records, given=None, **changes):
    """(rows, engine) of these records; every row fits the schema, and the report reads it."""
    engine = ScriptedEngine(tokenizer, script)
    realigner = Realigner(
        engine, tokenizer, settings(**changes), Verifier(), LeakFilter(), {"model": "m", "versions": {"torch": "0"}}
    )
    rows = realigner.realign([RealignInput(10 + i, r, **(given or {})) for i, r in enumerate(records)])
    rows = pa.Table.from_pylist(rows, OUTCOME_SCHEMA).to_pylist()
    summarize(rows, {}, "t")
    return rows, engine


def stages(row) -> list[tuple[str, str | None, bool]]:
    return [(c["stage"], c["rejected_because"], c["accepted"]) for turn in row["turns"] for c in turn["candidates"]]


def test_the_first_right_rollout_is_taken_and_nothing_more_is_asked(tokenizer):
    script = {"r/0/rollout/0": WRONG, "r/0/rollout/1": RIGHT, "r/0/rollout/2": "So the answer is 7."}
    [row], engine = run(tokenizer, script, record(kept=1), rollout_samples=3)
    assert (row["status"], row["reason"], row["index"], row["line"]) == ("kept", None, 10, 3)
    assert stages(row) == [("rollout", "wrong", False), ("rollout", None, True), ("rollout", None, False)]
    [turn] = row["turns"]
    assert [c["verdict"] for c in turn["candidates"]] == ["wrong", "right", "right"]
    assert turn["stage"] == "rollout" and turn["hints"] == [] and len(engine.calls) == 1
    written = json.loads(row["record"])
    assert written["messages"][-1]["content"] == RIGHT and written["id"] == "r" and written["kept"] == 1
    assert (written["answer"], written["source"]) == ("7", "sums")
    # The ids are those that training would make of the new text, but for the newline that follows the last turn.
    ids, mask = encode_conversation(tokenizer, written["messages"])
    assert written["token_ids"] == row["token_ids"] == ids[:-1].tolist()
    assert written["loss_mask"] == row["loss_mask"] == mask[:-1].tolist()
    assert written["tokenizer_fingerprint"] == tokenizer.fingerprint()
    made = written["realigned"]
    assert made["model"] == "m" and made["prompt"] == ANALYSIS.sha256
    assert made["turns"][0] | {"stage": "rollout", "verdict": "right", "seed": 5, "slope": None} == made["turns"][0]


def test_statistics_of_original_and_candidate(tokenizer):
    messages = [*record().messages[:1], {"role": "assistant", "content": "It is \\boxed{7}: the lazy dog jumps 3 + 4."}]
    [row], engine = run(tokenizer, {"r/0/rollout/0": RIGHT}, record(messages=messages))
    [turn] = row["turns"]
    prompt = engine.requests["r/0/rollout/0"].prompt
    original, mask = encode_conversation(tokenizer, messages)
    log_prob, entropy = (x[mask[1:] == 1].astype(np.float64) for x in score_ids(original))
    phi = log_prob + entropy
    expected = {
        "num_tokens": len(phi),
        "log_prob_sum": log_prob.sum(),
        "entropy_sum": entropy.sum(),
        "phi_sum": phi.sum(),
        "phi_squared_sum": (phi**2).sum(),
        "phi_below_1": (phi < -1).sum(),
        "phi_below_3": (phi < -3).sum(),
        "phi_below_5": (phi < -5).sum(),
    }
    assert 0 < expected["phi_below_5"] < expected["phi_below_3"] < expected["phi_below_1"] < len(phi)
    for name, value in expected.items():
        assert turn[f"original_{name}"] == pytest.approx(value, abs=1e-5), name
    assert turn["num_prompt_tokens"] == len(prompt) == int(np.flatnonzero(mask)[0])
    [candidate] = turn["candidates"]
    n = candidate["num_tokens"]
    assert turn["phi"] == pytest.approx(0.25 - 0.1 * np.arange(n), abs=1e-6)
    assert candidate["phi_sum"] == pytest.approx(0.25 * n - 0.05 * n * (n - 1), abs=1e-5)
    assert candidate["phi_below_1"] == int((0.25 - 0.1 * np.arange(n) < -1).sum())


def test_what_is_wrong_alone_is_hinted_behind_the_last_marker(tokenizer):
    analysis = "Seven, see # CoT.\n# CoT\n3 + 4 is 7, so \\boxed{7}."
    script = {"r/0/rollout/0": WRONG, "r/0/analysis": analysis, "r/0/hinted": "Hence \\boxed{7}."}
    [row], engine = run(tokenizer, script, record())
    assert stages(row) == [("rollout", "wrong", False), ("hinted", None, True)]
    hinted = engine.requests["r/0/hinted"]
    plain = "<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n"
    asked = "<|im_start|>user\n3 + 4? It is \\boxed{7} # CoT<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(hinted.prompt) == plain and hinted.seed == 5
    assert tokenizer.decode(hinted.hinted_prompt) == asked + "Seven, see # CoT.\n# CoT\n"
    assert tokenizer.decode(engine.requests["r/0/analysis"].prompt) == asked
    assert engine.requests["r/0/analysis"].hinted_prompt is None
    decoding, analysing = engine.settings_of("r/0/hinted"), engine.settings_of("r/0/analysis")
    assert decoding.mixing.slope == 3.0 and decoding.stopping.splitter == "\\boxed{" and analysing.mixing is None
    assert not decoding.stopping.stop_on_first_token and analysing.stopping.stop_on_first_token
    assert analysing.sampling.temperature == 0 and decoding.sampling.cut_before_temperature
    assert decoding.stopping.piece(int(hinted.prompt[0])) == "<|im_start|>"
    [turn] = row["turns"]
    candidate = turn["candidates"][1]
    assert (candidate["slope"], candidate["hint_share_mean"], candidate["hint_share_min"]) == (3.0, 0.75, 0.75)
    [hint] = turn["hints"]
    assert hint["num_prompt_tokens"] == len(hinted.hinted_prompt) and hint["analysis_tokens"] > 10
    assert (hint["marker"], hint["analysis_text"], hint["failure"]) == ("model", analysis, None)
    assert sum(np.isfinite(turn["hinted_entropy"])) == candidate["split_at"] > 0
    assert turn["tokens"] == [tokenizer.decode([i]) for i in turn["token_ids"]]


def test_without_analysis_the_template_alone_is_the_hint(tokenizer):
    [row], engine = run(tokenizer, {"r/0/hinted": RIGHT}, record(), templates=(HINT,), rollout_samples=0)
    asked = "<|im_start|>user\n3 + 4? It is \\boxed{7} 7<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(engine.requests["r/0/hinted"].hinted_prompt) == asked
    assert row["status"] == "kept" and row["turns"][0]["hints"][0]["analysis_tokens"] is None


@pytest.mark.parametrize(
    ("hinted", "why"),
    [
        (LEAK, "leak"),
        (WRONG, "wrong"),
        ((RIGHT, "length"), "unfinished"),
        ((RIGHT, "repetition"), "unfinished"),
        (" ", "unfinished"),
        (f"{RIGHT}</s> {RIGHT}", "unfinished"),  # it went on behind an end that was not looked at
    ],
)
@pytest.mark.parametrize("fallback", ["drop", "original"])
def test_rejections_and_fallbacks(tokenizer, hinted, why, fallback):
    script = {"r/0/rollout/0": WRONG, "r/0/analysis": "x\n# CoT", "r/0/hinted": hinted}
    given = record(token="kept")
    [row], _ = run(tokenizer, script, given, fallback=fallback)
    assert stages(row) == [("rollout", "wrong", False), ("hinted", why, False)]
    assert row["turns"][0]["candidates"][1]["leak"] == ("reference answer" if why == "leak" else None)
    assert row["turns"][0]["reason"] == why and row["token_ids"] is None
    failures = [{"stage": "rollout", "reason": "wrong"}, {"stage": "hinted", "reason": why}]
    assert row["turns"][0]["failures"] == failures
    if fallback == "drop":
        assert (row["status"], row["reason"], row["record"], row["turns"][0]["stage"]) == ("dropped", why, None, None)
        return
    assert (row["status"], row["reason"], row["turns"][0]["stage"]) == ("kept", None, "original")
    written = json.loads(row["record"])
    assert written.pop("realigned")["turns"] == [{"stage": "original"}]
    assert written == {"messages": given.messages, "id": "r", "answer": "7", "source": "sums", "token": "kept"}


LONG = "Three and four more make seven, and this is all that there is to say. " + RIGHT
MORE = "Three and four more: " + RIGHT


def test_a_bare_answer_is_rejected_where_the_original_says_more(tokenizer):
    """A hinted one only, and only below the share that is asked for."""
    messages = [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": LONG}]
    script = {"r/0/rollout/0": WRONG, "r/0/analysis": "x\n# CoT", "r/0/hinted": "7", "r/0/retry/1": MORE}
    [row], _ = run(tokenizer, script, record(messages=messages), retries=2)
    assert stages(row) == [("rollout", "wrong", False), ("hinted", "bare", False), ("retry", None, True)]
    assert row["turns"][0]["candidates"][1]["verdict"] == "right"
    [row], _ = run(tokenizer, script, record(messages=messages), bare_below=0.0)
    assert stages(row)[-1] == ("hinted", None, True)
    [row], _ = run(tokenizer, script, record(messages=messages), retries=1, bare_below=0.99)
    assert stages(row)[1:] == [("hinted", "bare", False), ("retry", "bare", False)] and row["status"] == "dropped"
    assert row["turns"][0]["reason"] == "bare"
    [row], _ = run(tokenizer, script | {"r/0/rollout/0": "7"}, record(messages=messages))
    assert stages(row) == [("rollout", None, True)]


def test_what_cannot_be_compared_may_be_bare_too(tokenizer):
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because of this, and of that."}]
    script = {"r/0/rollout/0": ("on", "length"), "r/0/analysis": "x\n# CoT", "r/0/hinted": "It"}
    [row], _ = run(tokenizer, script, record(answer=None, messages=messages), unverified="keep")
    assert stages(row)[-1] == ("hinted", "bare", False) and row["status"] == "dropped"


def test_a_phrase_of_the_question_is_no_leak(tokenizer):
    messages = [
        {"role": "user", "content": "3 + 4? Compare with the reference answer."},
        {"role": "assistant", "content": "7"},
    ]
    [row], _ = run(tokenizer, {"r/0/hinted": LEAK}, record(messages=messages), templates=(HINT,), rollout_samples=0)
    assert row["status"] == "kept"


def test_a_turn_without_a_marker_is_not_hinted(tokenizer):
    script = {"r/0/rollout/0": WRONG, "r/0/analysis": "It is seven."}
    [row], _ = run(tokenizer, script, record(), fallback="original", analysis_marker="require")
    assert row["status"] == "kept" and row["turns"][0]["reason"] == "no marker in the analysis"
    [row], _ = run(tokenizer, script, record(), analysis_marker="require")
    assert (row["status"], row["reason"]) == ("dropped", "no marker in the analysis")
    assert describe_reason(row) == "own response: wrong; hinted: no marker in the analysis"


def test_an_analysis_without_a_marker_is_closed_by_one_of_ours(tokenizer):
    letters = [i for letter in "It is" for i in tokenizer.encode_batch([letter], [[]])[0].ids.tolist()]
    stop = tokenizer.special_ids["<|im_end|>"]
    for analysis in ([*letters, stop], [*letters, tokenizer.eos_id], ("It is", "length"), ("It is", "repetition")):
        script = {"r/0/rollout/0": WRONG, "r/0/analysis": analysis, "r/0/hinted": RIGHT}
        [row], engine = run(tokenizer, script, record())
        assert row["status"] == "kept"
        hinted = engine.requests["r/0/hinted"].hinted_prompt
        assert tokenizer.decode(hinted) == ASKED + "It is\n# CoT\n"
        if isinstance(analysis, list):
            assert hinted.tolist()[len(engine.requests["r/0/analysis"].prompt) :][: len(letters)] == letters
        [hint] = row["turns"][0]["hints"]
        assert (hint["marker"], hint["analysis_text"], hint["failure"]) == ("appended", "It is", None)
    given = {"analyses": {0: ProvidedText("7, or")}}
    [row], engine = run(tokenizer, {"r/0/hinted": RIGHT}, record(), rollout_samples=0, given=given)
    assert row["turns"][0]["hints"][0]["marker"] == "appended" and row["status"] == "kept"
    assert tokenizer.decode(engine.requests["r/0/hinted"].hinted_prompt) == ASKED + "7, or\n# CoT\n"


def test_each_stage_that_fails_or_cannot_run_is_followed_by_the_next(tokenizer):
    """Of two hints, each by itself, and both: what is told of them, and where the retries take theirs from."""
    script = {"r/0/rollout/0": WRONG, "r/0/analysis": "no", "r/0/hinted": LEAK, "r/0/second_hint": WRONG}
    script |= {"r/0/retry/1": WRONG, "r/0/retry/2": (RIGHT, "length")}
    [row], engine = run(tokenizer, script, record(), templates=(ANALYSIS, HINT), retries=2)
    assert stages(row) == [
        ("rollout", "wrong", False), ("hinted", "leak", False), ("second_hint", "wrong", False),
        ("retry", "wrong", False), ("retry", "unfinished", False),
    ]  # fmt: skip
    assert (row["status"], row["reason"]) == ("dropped", "unfinished")
    assert describe_reason(row).startswith("own response: wrong; hinted: leak; second hint: wrong; retry: wrong, unf")
    first, second, again = (engine.requests[f"r/0/{name}"] for name in ("hinted", "second_hint", "retry/1"))
    assert tokenizer.decode(first.hinted_prompt).endswith("no\n# CoT\n") and first.seed == second.seed == 5
    assert "# CoT" not in tokenizer.decode(second.hinted_prompt)
    assert again.hinted_prompt.tolist() == first.hinted_prompt.tolist() and again.seed == 6
    shown = summarize([row], {}, "t")
    hints = shown["corpus"]["hints"]
    assert hints["hinted"] == {"turns": 1, "given": 1, "analyses": 1, "marker_of_model": 0, "marker_appended": 1}
    assert hints["second_hint"] == {"turns": 1, "given": 1, "analyses": 0, "marker_of_model": 0, "marker_appended": 0}
    [failed] = shown["failed_turns"]
    assert failed["hints"][0]["analysis"]["head"] == "no" and failed["candidates"][1]["text"]["head"] == LEAK

    script = {"r/0/rollout/0": WRONG, "r/0/second_hint": WRONG, "r/0/retry/1": RIGHT}
    for templates, marker in (((UNUSABLE, HINT), "append"), ((ANALYSIS, HINT), "require")):
        analysed = {"r/0/analysis": "no"} if marker == "require" else {}
        policy = {"templates": templates, "analysis_marker": marker, "retries": 1}
        [row], engine = run(tokenizer, script | analysed, record(), **policy)
        assert [stage for stage, _, _ in stages(row)] == ["rollout", "second_hint", "retry"]
        assert row["status"] == "kept" and row["turns"][0]["stage"] == "retry"
        used = [engine.requests[f"r/0/{name}"].hinted_prompt.tolist() for name in ("second_hint", "retry/1")]
        assert used[0] == used[1], "the first hint that there is"
        assert row["turns"][0]["hints"][0]["failure"].startswith(("no hinted prompt: u", "no marker"))

    [row], engine = run(tokenizer, {"r/0/rollout/0": WRONG}, record(), templates=(UNUSABLE, UNUSABLE), retries=2)
    assert len(engine.calls) == 1 and describe_reason(row).count("no hinted prompt") == 2
    [row], _ = run(tokenizer, {"r/0/rollout/0": WRONG}, record(), templates=(UNUSABLE,), fallback="original")
    assert (row["status"], row["turns"][0]["stage"]) == ("kept", "original")


def test_a_second_analysis_is_one_of_its_own(tokenizer):
    other = HintTemplate("b", 'marker: # CoT\nafter-marker: "\\n"\n---\n{{ question }} {{ answer }} # CoT')
    script = {"r/0/analysis": "one", "r/0/hinted": WRONG, "r/0/second_hint/analysis": "two", "r/0/second_hint": RIGHT}
    [row], engine = run(tokenizer, script, record(), rollout_samples=0, templates=(ANALYSIS, other))
    assert row["turns"][0]["stage"] == "second_hint"
    assert [hint["prompt"] for hint in row["turns"][0]["hints"]] == [ANALYSIS.sha256, other.sha256]
    assert tokenizer.decode(engine.requests["r/0/second_hint"].hinted_prompt).endswith("two\n# CoT\n")


def test_what_the_length_limit_cut_is_decoded_once_more_with_more_room(tokenizer):
    script = {"r/0/rollout/0": (RIGHT, "length"), "r/0/rollout/1": WRONG, ("r/0/rollout/0", 100): RIGHT}
    [row], engine = run(tokenizer, script, record(), rollout_samples=2, more_room=2.0)
    assert [(c["text"], c["more_room"], c["accepted"]) for c in row["turns"][0]["candidates"]] == [
        (WRONG, False, False),
        (RIGHT, True, True),
    ]
    assert [[r.id for r in requests] for requests, _ in engine.calls][1:] == [["r/0/rollout/0"]]
    first, second = (replace(call[0][0], settings=None) for call in engine.calls)
    assert first == second, "the same draws"
    numbers = summarize([row], {}, "t")["corpus"]["stages"]["rollout"]
    assert (numbers["candidates"], numbers["more_room"], numbers["more_room_finished"]) == (2, 1, 1)
    assert describe_tries(count_tries(row["turns"])) == ["responses decoded with more room: 1, of which 1 then ended"]

    # Where another one is right, it is not asked for, nor where it is switched off or what ended it was no length.
    for rollouts, room, calls in (((RIGHT, "length"), 0.0, 1), ((RIGHT, "context"), 2.0, 1), (RIGHT, 2.0, 1)):
        script = {"r/0/rollout/0": (RIGHT, "length"), "r/0/rollout/1": rollouts}
        if rollouts == (RIGHT, "context"):
            script["r/0/rollout/0"] = rollouts
        _, engine = run(tokenizer, script, record(), rollout_samples=2, more_room=room, templates=(UNUSABLE,))
        assert len(engine.calls) == calls

    # A second cut is the last word, and each hinted stage has its own.
    cut = (RIGHT, "length")
    script = {"r/0/hinted": cut, "r/0/retry/1": cut, ("r/0/retry/1", 100): RIGHT}
    policy = {"templates": (HINT,), "rollout_samples": 0, "more_room": 2.0, "retries": 1}
    [row], engine = run(tokenizer, script, record(), **policy)
    assert stages(row) == [("hinted", "unfinished", False), ("retry", None, True)]
    assert [c["more_room"] for c in row["turns"][0]["candidates"]] == [True, True]
    assert [call[1].mixing.slope for call in engine.calls] == [3.0, 3.0, 1.5, 1.5]
    assert row["turns"][0]["candidates"][1]["slope"] == 1.5


def test_rejected_texts_may_be_left_out(tokenizer):
    script = {"r/0/rollout/0": WRONG, "r/0/analysis": "It is seven.", "r/0/hinted": RIGHT}
    engine = ScriptedEngine(tokenizer, script)
    realigner = Realigner(engine, tokenizer, settings(), Verifier(), LeakFilter(), {}, rejected_texts=False)
    rows = realigner.realign([RealignInput(0, record())])
    [row] = pa.Table.from_pylist(rows, OUTCOME_SCHEMA).to_pylist()
    [turn] = row["turns"]
    assert [candidate["text"] for candidate in turn["candidates"]] == [None, RIGHT]
    assert turn["hints"][0]["analysis_text"] is None and turn["hints"][0]["marker"] == "appended"
    summarize([row], {}, "t")


@pytest.mark.parametrize("rewritten", [True, False])
def test_training_weighs_an_original_as_it_is_told_to(tokenizer, tmp_path, rewritten):
    """Through the corpus that the trainer makes of the record, to the mask that multiplies its loss."""
    script = {"r/0/rollout/0": WRONG, "r/0/hinted": WRONG, "r/1/rollout/0": "So \\boxed{8}" if rewritten else RIGHT}
    script |= {"r/1/hinted": RIGHT}  # the answer of the first turn
    policy = {"templates": (HINT,), "fallback": "original", "original_weight": 0.3}
    [row], _ = run(tokenizer, script, record("8", MULTI_TURN), **policy)
    written = json.loads(row["record"])
    assert [turn["stage"] for turn in row["turns"]] == ["original", "rollout" if rewritten else "original"]
    assert written["realigned"]["turns"][0] == {"stage": "original", "weight": 0.3}
    assert [m.get("loss") for m in written["messages"] if m["role"] == "assistant"] == [0.3, None if rewritten else 0.3]
    assert ("token_ids" in written) == rewritten
    if rewritten:
        assert set(written["loss_mask"]) == {0, 0.3, 1} and type(written["loss_mask"][0]) is int
    cache = tokenized(tokenizer, tmp_path / "cache", write(tmp_path / "a.jsonl", [written]), seq_length=200)
    sample = PackedDataset({"a": cache}, 200, 0)[0]
    weights, labels = sample["loss_mask"].numpy(), sample["labels"].numpy()
    assert tokenizer.decode(labels[weights == np.float32(0.3)]).startswith("\\boxed{7}<|im_end|>")
    assert tokenizer.decode(labels[weights == 1]) == ("So \\boxed{8}<|im_end|>" if rewritten else "")
    assert set(weights.tolist()) == {0, float(np.float32(0.3))} | ({1.0} if rewritten else set())


REGENERATE = {"regenerate": True, "unverified": "keep", "templates": (), "rollout_samples": 2}
OPEN = [{"role": "user", "content": "3 + 4?"}]


def regenerate(tokenizer, script, *inputs, **changes):
    engine = ScriptedEngine(tokenizer, script)
    realigner = Realigner(engine, tokenizer, settings(**REGENERATE | changes), Verifier(), LeakFilter(), {})
    rows = pa.Table.from_pylist(realigner.realign(inputs), OUTCOME_SCHEMA).to_pylist()
    summarize(rows, {}, "t")
    return rows, engine


def test_regeneration_writes_each_sample_after_its_own_earlier_turns(tokenizer):
    """Whatever is right or wrong, in as many records as there are samples; nothing is scored, hinted or compared."""
    script = {f"r/{turn}/rollout/{sample}": f"say {turn} {sample}" for turn in (0, 1) for sample in (0, 1)}
    given = record("8", MULTI_TURN, kept=1)
    rows, engine = regenerate(tokenizer, script, *(RealignInput(i, given, sample=i, samples=2) for i in (0, 1)))
    assert [(row["id"], row["index"], row["status"]) for row in rows] == [("r#0", 0, "kept"), ("r#1", 1, "kept")]
    assert [[request.id for request in requests] for requests, _ in engine.calls] == [
        [f"r/{turn}/rollout/{sample}" for sample in (0, 1)] for turn in (0, 1)
    ]
    assert not engine.scored and {request.hinted_prompt for request in engine.requests.values()} == {None}
    for sample, row in enumerate(rows):
        written = json.loads(row["record"])
        said = [message["content"] for message in written["messages"] if message["role"] == "assistant"]
        assert said == [f"say 0 {sample}", f"say 1 {sample}"] and written["kept"] == 1
        assert (written["id"], written["realigned"]["record"], written["realigned"]["sample"]) == (
            row["id"],
            "r",
            sample,
        )
        assert [turn["stage"] for turn in written["realigned"]["turns"]] == ["rollout", "rollout"]
        prompt = tokenizer.decode(engine.requests[f"r/1/rollout/{sample}"].prompt)
        assert f"say 0 {sample}<|im_end|>" in prompt and "boxed" not in prompt
        ids, mask = encode_conversation(tokenizer, written["messages"])
        assert written["token_ids"] == ids[:-1].tolist() and written["loss_mask"] == mask[:-1].tolist()
        assert row["turns"][0]["original_num_tokens"] == 0 and row["turns"][0]["failures"] == []
    # A single sample is that of several, under the record's own id.
    [row], again = regenerate(tokenizer, script, RealignInput(0, given, sample=0), rollout_samples=1)
    assert row["id"] == "r" and row["token_ids"] == rows[0]["token_ids"]
    assert json.loads(row["record"])["realigned"].keys().isdisjoint({"record", "sample", "prompt"})
    first, same = (one.requests["r/0/rollout/0"] for one in (engine, again))
    assert first.seed == same.seed and first.prompt.tolist() == same.prompt.tolist()


def test_regeneration_answers_a_last_message_that_has_no_answer(tokenizer):
    given = record(None, [*MULTI_TURN[:3], {"role": "user", "content": "And 1 more?"}])
    script = {"r/0/rollout/0": "one", "r/1/rollout/0": "two", "s/0/rollout/0": "three"}
    rows, _ = regenerate(
        tokenizer, script, RealignInput(0, given, sample=0), RealignInput(1, record(None, OPEN, "s"), sample=0)
    )
    written = [json.loads(row["record"])["messages"] for row in rows]
    assert [[m["content"] for m in messages if m["role"] == "assistant"] for messages in written] == [
        ["one", "two"],
        ["three"],
    ]
    assert [message["role"] for message in written[0]] == ["system", "user", "assistant", "user", "assistant"]
    assert rows[1]["turns"][0]["original_text"] == ""
    [row], _ = run(tokenizer, {}, record(None, OPEN))
    assert row["status"] == "error" and "nothing to realign" in row["reason"]


@pytest.mark.parametrize(
    ("said", "why"), [("  ", "unfinished"), ((RIGHT, "length"), "unfinished"), ((RIGHT, "context"), "unfinished")]
)
def test_regeneration_leaves_out_what_is_empty_or_cut(tokenizer, said, why):
    [row], _ = regenerate(tokenizer, {"r/0/rollout/0": said}, RealignInput(0, record(), sample=0))
    assert (row["status"], row["reason"], row["record"]) == ("dropped", why, None)
    script = {"r/0/rollout/0": (RIGHT, "length"), ("r/0/rollout/0", 100): WRONG}
    [row], _ = regenerate(tokenizer, script, RealignInput(0, record(), sample=0), more_room=2.0)
    assert row["status"] == "kept" and json.loads(row["record"])["messages"][-1]["content"] == WRONG


def test_regeneration_may_keep_only_what_is_right(tokenizer):
    inputs = [RealignInput(i, record(), sample=i, samples=2) for i in (0, 1)]
    inputs.append(RealignInput(2, record(None, UNVERIFIABLE, "u"), sample=0, samples=2))
    script = {"r/0/rollout/0": WRONG, "r/0/rollout/1": RIGHT}
    rows, _ = regenerate(tokenizer, script, *inputs, only_right=True, unverified="drop")
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("dropped", "wrong"),
        ("kept", None),
        ("dropped", "no reference answer to verify with"),
    ]


def test_retries_change_seed_and_slope_until_one_is_right(tokenizer):
    script = {"r/0/hinted": WRONG, "r/0/retry/1": LEAK, "r/0/retry/2": RIGHT}
    policy = {"templates": (HINT,), "rollout_samples": 0, "retries": 4, "retry_slope_factor": 0.5}
    [row], engine = run(tokenizer, script, record(), **policy)
    assert stages(row) == [("hinted", "wrong", False), ("retry", "leak", False), ("retry", None, True)]
    tried = row["turns"][0]["candidates"]
    assert [(c["seed"], c["slope"]) for c in tried] == [(5, 3.0), (6, 1.5), (7, 0.75)]
    assert [call[1].mixing.slope for call in engine.calls] == [3.0, 1.5, 0.75]
    assert json.loads(row["record"])["realigned"]["turns"][0]["stage"] == "retry"


@pytest.mark.parametrize("after", ["drop", "original"])
def test_when_all_retries_fail(tokenizer, after):
    script = {"r/0/hinted": WRONG, "r/0/retry/1": WRONG}
    policy = {"templates": (HINT,), "rollout_samples": 0, "retries": 1, "fallback": after}
    [row], _ = run(tokenizer, script, record(), **policy)
    assert (row["status"], len(row["turns"][0]["candidates"])) == ({"drop": "dropped", "original": "kept"}[after], 2)


def test_each_stage_has_its_reasons(tokenizer):
    script = {"r/0/rollout/0": WRONG, "r/0/rollout/1": (RIGHT, "length"), "r/0/rollout/2": WRONG}
    script |= {"r/0/hinted": LEAK, "r/0/retry/1": WRONG, "r/0/retry/2": (RIGHT, "repetition")}
    [row], _ = run(
        tokenizer,
        script,
        record(),
        templates=(HINT,),
        rollout_samples=3,
        retries=2,
    )
    assert describe_reason(row) == "own response: wrong, unfinished; hinted: leak; retry: wrong, unfinished"
    assert row["reason"] == "unfinished"
    [kept], _ = run(tokenizer, script | {"r/0/hinted": RIGHT}, record(), templates=(HINT,), rollout_samples=3)
    assert kept["status"] == "kept" and kept["turns"][0]["failures"] == []
    failures = summarize([row, kept], {}, "t")["corpus"]["failures"]
    assert failures["rollout"] == [{"name": "wrong, unfinished", "count": 1}]
    assert failures["hinted"] == [{"name": "leak", "count": 1}]


UNVERIFIABLE = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(("policy", "status", "stage"), [("drop", "dropped", None), ("original", "kept", "original")])
def test_what_cannot_be_verified_is_not_decoded_unless_kept(tokenizer, policy, status, stage):
    [row], engine = run(tokenizer, {}, record(None, UNVERIFIABLE), unverified=policy, retries=2)
    assert (row["status"], row["turns"][0]["stage"]) == (status, stage) and not engine.calls
    assert row["turns"][0]["reason"] == "no reference answer to verify with"
    assert row["turns"][0]["original_num_tokens"] > 0


def test_kept_unverified_is_the_first_that_ended_without_a_leak(tokenizer):
    [row], _ = run(tokenizer, {"r/0/rollout/0": "Hello world"}, record(None, UNVERIFIABLE), unverified="keep")
    assert stages(row) == [("rollout", None, True)] and row["turns"][0]["candidates"][0]["verdict"] is None
    script = {"r/0/rollout/0": ("Hello", "length"), "r/0/hinted": LEAK, "r/0/retry/1": "Hello"}
    [row], _ = run(tokenizer, script, record(None, UNVERIFIABLE), templates=(HINT,), retries=2, unverified="keep")
    assert [why for _, why, _ in stages(row)] == ["unfinished", "leak", None] and row["status"] == "kept"


def test_an_unknown_verdict_follows_the_policy(tokenizer):
    unknown = record({"a list": "no text"})  # what only a plug-in could compare
    script = {"r/0/rollout/0": RIGHT, "r/0/hinted": RIGHT}
    [row], _ = run(tokenizer, script, unknown, templates=(HINT,), unverified="keep")
    # Both could be right; neither is known to be. The first is taken, but only when nothing better has come.
    assert stages(row) == [("rollout", None, True), ("hinted", None, False)]
    assert row["turns"][0]["candidates"][0]["verdict"] == "unknown" and row["turns"][0]["stage"] == "rollout"
    [row], _ = run(
        tokenizer, {"r/0/rollout/0": "The sum? \\boxed{half of it}", "r/0/hinted": RIGHT}, record(), templates=(HINT,)
    )
    assert [accepted for _, _, accepted in stages(row)] == [False, True]
    assert [c["verdict"] for c in row["turns"][0]["candidates"]] == ["unknown", "right"]
    for policy, status in (("drop", "dropped"), ("original", "kept")):
        [row], _ = run(tokenizer, script, unknown, templates=(HINT,), unverified=policy)
        assert stages(row) == [("rollout", "unverified", False), ("hinted", "unverified", False)]
        assert row["status"] == status
        assert row["turns"][0]["reason"] == "unverified (the reference answer is a dict)"


def test_right_goes_before_unknown_and_the_answer_column_before_the_text(tokenizer):
    script = {"r/0/rollout/0": RIGHT, "r/0/rollout/1": WRONG}
    [row], _ = run(tokenizer, script, record("8"), rollout_samples=2)
    assert [accepted for _, _, accepted in stages(row)] == [False, True]
    [row], _ = run(tokenizer, script, record(None), rollout_samples=2)  # the box of the original says 7
    assert [accepted for _, _, accepted in stages(row)] == [True, False]


MULTI_TURN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "3 + 4?"},
    {"role": "assistant", "content": "\\boxed{7}"},
    {"role": "user", "content": "And 1 more?"},
    {"role": "assistant", "content": "\\boxed{8}", "name": "tutor"},
]


@pytest.mark.parametrize("template", ["CHATML", "LLAMA3", "MISTRAL"])
def test_later_turns_see_the_realigned_ones_as_the_very_tokens_that_were_drawn(tmp_path, template):
    sources = {"LLAMA3": LLAMA3, "MISTRAL": MISTRAL}
    tokenizer = make_tokenizer(tmp_path, *filter(None, [sources.get(template)]))
    end = {"LLAMA3": "<|eot_id|>", "MISTRAL": "</s>"}.get(template, "<|im_end|>")
    # Letter by letter: not the tokens that the text would be read as.
    letters = [i for letter in " I say \\boxed{7}!" for i in tokenizer.encode_batch([letter], [[]])[0].ids.tolist()]
    script = {"r/0/rollout/0": [*letters, tokenizer.special_ids[end]]}
    second = tokenizer.encode_batch([f"Now \\boxed{{8}}!{end}"], [[]])[0].ids.tolist()
    [row], engine = run(tokenizer, script | {"r/1/rollout/0": second}, record("8", MULTI_TURN))
    assert [turn["stage"] for turn in row["turns"]] == ["rollout", "rollout"], row["reason"]
    assert [turn["message"] for turn in row["turns"]] == [2, 4]
    first = engine.requests["r/0/rollout/0"].prompt.tolist()
    prompt = engine.requests["r/1/rollout/0"].prompt.tolist()
    assert prompt[: len(first) + len(letters)] == first + letters
    assert row["token_ids"] == prompt + second
    trained = [i for i, on in zip(row["token_ids"], row["loss_mask"], strict=True) if on]
    assert trained == [*letters, tokenizer.special_ids[end], *second]
    written = json.loads(row["record"])["messages"]
    assert written[4] == {"role": "assistant", "content": "Now \\boxed{8}!", "name": "tutor"}
    text = tokenizer.template.render(written)
    if template == "CHATML":
        assert tokenizer.decode(row["token_ids"]) == text.removesuffix("\n")
    # Scored behind the new history, as the original is.
    assert engine.scored[1][0][: len(prompt)] == prompt


def test_an_original_turn_is_history_for_the_next_and_a_dropped_one_ends_the_record(tokenizer):
    script = {"r/0/rollout/0": WRONG, "r/0/hinted": WRONG, "r/1/rollout/0": "\\boxed{8}"}
    given = record("8", MULTI_TURN)
    [row], engine = run(tokenizer, script, given, templates=(HINT,), fallback="original")
    assert [turn["stage"] for turn in row["turns"]] == ["original", "rollout"]
    assert "\\boxed{7}<|im_end|>" in tokenizer.decode(engine.requests["r/1/rollout/0"].prompt)
    ids, mask = encode_conversation(tokenizer, given.messages)
    assert (row["token_ids"], row["loss_mask"]) == (ids[:-1].tolist(), mask[:-1].tolist())
    [row], engine = run(tokenizer, script, given, templates=(HINT,))
    assert row["status"] == "dropped" and len(row["turns"]) == 1 and "r/1/rollout/0" not in engine.requests


def test_the_system_message_stays_in_both_prompts_and_history_goes_into_the_hint(tokenizer):
    template = HintTemplate(
        "h", "---\n{% for m in conversation %}{{ m.role }}={{ m.content }};{% endfor %}{{ question }} {{ solution }}"
    )
    script = {"r/0/hinted": "\\boxed{7} it is", "r/1/hinted": "\\boxed{8} it is"}
    _, engine = run(tokenizer, script, record("8", MULTI_TURN), templates=(template,), rollout_samples=0)
    hinted = tokenizer.decode(engine.requests["r/1/hinted"].hinted_prompt)
    system = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert hinted.startswith(
        f"{system}user=3 + 4?;assistant=\\boxed{{7}} it is;user=And 1 more?;And 1 more? \\boxed{{8}}"
    )
    assert tokenizer.decode(engine.requests["r/1/hinted"].prompt).startswith(f"{system}3 + 4?<|im_end|>")


def test_a_turn_that_ends_with_another_stop_token_is_written_with_the_templates(tokenizer):
    body = tokenizer.encode_batch([RIGHT], [[]])[0].ids.tolist()
    [row], _ = run(tokenizer, {"r/0/rollout/0": [*body, tokenizer.eos_id]}, record())
    assert row["turns"][0]["token_ids"] == [*body, tokenizer.eos_id]  # as drawn, with their statistics
    assert row["token_ids"][-len(body) - 1 :] == [*body, tokenizer.special_ids["<|im_end|>"]]
    assert json.loads(row["record"])["messages"][-1]["content"] == RIGHT


def test_a_template_that_edits_earlier_turns_makes_an_error_of_that_record_alone(tmp_path):
    tokenizer = make_tokenizer(tmp_path, QWEN3_MARKED)
    thought = "<think>\n3, 4\n</think>\n\n\\boxed{7}"
    script = {"a/0/rollout/0": thought, "b/0/rollout/0": "\\boxed{7}", "b/1/rollout/0": "\\boxed{8}"}
    both = record("8", MULTI_TURN, "a"), record("8", MULTI_TURN, "b")
    rows, _ = run(tokenizer, script, *both)
    assert [row["status"] for row in rows] == ["error", "kept"]
    assert "edits earlier turns" in rows[0]["reason"] and "--chat-template" in rows[0]["reason"]
    assert rows[0]["record"] is None and (rows[0]["file"], rows[0]["line"]) == ("data.jsonl", 3)


def test_errors_of_single_records_stop_no_other(tokenizer):
    long = [{"role": "user", "content": "hello " * 500}, {"role": "assistant", "content": "7"}]
    odd = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "reasoning_content": "z"}]
    nothing = [{"role": "user", "content": "x"}]
    records = [record(messages=m, identity=str(i)) for i, m in enumerate([long, odd, nothing])]
    rows, _ = run(tokenizer, {"r/0/rollout/0": RIGHT}, *records, record())
    assert [row["status"] for row in rows] == ["error"] * 3 + ["kept"]
    reasons = ["raise --seq-length", "reasoning_content stands nowhere", "no assistant turn"]
    for row, what in zip(rows, reasons, strict=False):
        assert what in row["reason"]


def test_a_hint_that_does_not_fit_is_no_error(tokenizer):
    messages = [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "hello " * 300 + "\\boxed{7}"}]
    [row], engine = run(tokenizer, {"r/0/rollout/0": WRONG}, record(messages=messages), max_positions=200)
    assert (row["status"], row["reason"]) == ("dropped", "hinted prompt longer than --seq-length")
    # The original counts as far as the context reaches.
    [[scored]] = engine.scored
    assert len(scored) == 201 and row["turns"][0]["original_num_tokens"] == 201 - row["turns"][0]["num_prompt_tokens"]


def test_rollouts_and_analyses_from_files(tokenizer):
    given = {"rollouts": {None: [ProvidedText(WRONG), ProvidedText("Clearly, the answer is 7.")]}}
    [row], engine = run(tokenizer, {}, record(), given=given)
    assert stages(row) == [("rollout", "wrong", False), ("rollout", None, True)] and not engine.calls
    [turn] = row["turns"]
    prompt = turn["num_prompt_tokens"]
    log_prob, entropy = score_ids(np.array(row["token_ids"]))
    assert turn["phi"] == pytest.approx((log_prob + entropy)[prompt - 1 :], abs=1e-6)
    assert turn["candidates"][1]["seed"] is None and len(turn["phi"]) == len(row["token_ids"]) - prompt
    ids, _ = encode_conversation(tokenizer, json.loads(row["record"])["messages"])
    assert row["token_ids"] == ids[:-1].tolist()

    given = {"rollouts": {0: [ProvidedText(WRONG)]}, "analyses": {0: ProvidedText("from a file\n# CoT\nand more")}}
    [row], engine = run(tokenizer, {"r/0/hinted": RIGHT}, record(), given=given)
    assert tokenizer.decode(engine.requests["r/0/hinted"].hinted_prompt).endswith("from a file\n# CoT\n")
    assert row["status"] == "kept" and row["turns"][0]["hints"][0]["analysis_tokens"] is None


def drawn(tokenizer, text: str, *after: int) -> tuple[int, ...]:
    """Ids that no tokenization gives, one for each character, as a model may draw them."""
    return (*(i for letter in text for i in encode(tokenizer, letter).tolist()), *after)


def test_ids_that_another_engine_drew_are_taken_as_they_are(tokenizer):
    end = encode(tokenizer, "<|im_end|>").tolist()[0]
    ids = drawn(tokenizer, RIGHT, end)
    assert len(ids) > len(encode(tokenizer, RIGHT)) + 1
    prompt = prompt_sha256(begin_turn(tokenizer).prompt.ids)
    given = {"rollouts": {0: [ProvidedText(RIGHT, ids, prompt)]}}
    [row], engine = run(tokenizer, {}, record(), given=given)
    assert row["status"] == "kept" and not engine.calls
    [turn] = row["turns"]
    assert turn["token_ids"] == list(ids) and row["token_ids"][turn["num_prompt_tokens"] :][: len(ids)] == list(ids)
    [candidate] = turn["candidates"]
    assert (candidate["text"], candidate["finish_reason"], candidate["seed"]) == (RIGHT, "eos", None)

    # The second hint is without an analysis, and is no other prompt for it.
    given = {"analyses": {0: ProvidedText("mine", None, prompt_sha256(encode(tokenizer, ASKED)))}}
    script = {"r/0/rollout/0": WRONG, "r/0/hinted": WRONG, "r/0/second_hint": RIGHT}
    [row], _ = run(tokenizer, script, record(), given=given, templates=(ANALYSIS, HINT))
    assert row["turns"][0]["stage"] == "second_hint" and row["turns"][0]["hints"][0]["marker"] == "appended"

    # An analysis, too; and a response that only its length ended.
    analysis = drawn(tokenizer, "mine\n# CoT\n", end)
    given = {
        "rollouts": {0: [ProvidedText(RIGHT, ids[:-1])]},
        "analyses": {0: ProvidedText("mine\n# CoT\n", analysis)},
    }
    [row], engine = run(tokenizer, {"r/0/hinted": RIGHT}, record(), given=given)
    assert stages(row) == [("rollout", "unfinished", False), ("hinted", None, True)]
    assert row["turns"][0]["candidates"][0]["finish_reason"] == "length"
    assert engine.requests["r/0/hinted"].hinted_prompt.tolist()[-len(analysis) + 1 :] == list(analysis[:-1])


def test_texts_for_another_prompt_or_with_other_ids_are_refused(tokenizer):
    for given, what in (
        ({"rollouts": {0: [ProvidedText(RIGHT, None, "0" * 64)]}}, "--rollouts answers another prompt"),
        ({"rollouts": {0: [ProvidedText(RIGHT, drawn(tokenizer, WRONG))]}}, "take out the token_ids of edited texts"),
    ):
        [row], _ = run(tokenizer, {}, record(), given=given)
        assert row["status"] == "error" and what in row["reason"]
    given = {"analyses": {0: ProvidedText("x\n# CoT", None, "0" * 64)}}
    [row], _ = run(tokenizer, {"r/0/rollout/0": WRONG}, record(), given=given)
    assert (row["status"], "--analyses answers another prompt" in row["reason"]) == ("dropped", True)


def begin_turn(tokenizer):
    return RecordTask(RealignInput(0, record()), tokenizer, 400).begin(0)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"rollouts": {None: [ProvidedText("a")]}}, 'add "turn"'),
        ({"rollouts": {2: [ProvidedText("a")]}}, "whose turns are 0 to 1"),
        ({"analyses": {-1: ProvidedText("a")}}, "whose turns are 0 to 1"),
    ],
)
def test_files_must_say_which_turn(tokenizer, given, what):
    [row], _ = run(tokenizer, {}, record("8", MULTI_TURN), given=given)
    assert row["status"] == "error" and what in row["reason"]


def test_results_do_not_depend_on_what_is_decoded_together(tokenizer):
    script = {}
    records = [record(identity=f"r{i}") for i in range(4)]
    for i in range(4):
        script |= {f"r{i}/0/rollout/0": [WRONG, RIGHT][i % 2], f"r{i}/0/hinted": [RIGHT, WRONG][i // 2]}
    together, _ = run(tokenizer, script, *records, templates=(HINT,))
    alone = [run(tokenizer, script, one, templates=(HINT,))[0][0] | {"index": 10 + i} for i, one in enumerate(records)]
    assert _as_text(together) == _as_text(alone) and {row["status"] for row in together} == {"kept", "dropped"}


def test_no_record_waits_for_the_stages_of_another(tokenizer):
    script = {"a/0/rollout/0": WRONG, "a/0/analysis": "x\n# CoT", "a/0/hinted": RIGHT, "b/0/rollout/0": RIGHT}
    script |= {f"{name}/1/rollout/0": "So \\boxed{8}" for name in "ab"}
    rows, engine = run(tokenizer, script, record("8", MULTI_TURN, "a"), record("8", MULTI_TURN, "b"))
    assert [row["status"] for row in rows] == ["kept", "kept"]
    assert [{request.id for request in requests} for requests, _ in engine.calls] == [
        {"a/0/rollout/0", "b/0/rollout/0"},
        {"a/0/analysis"},
        {"b/1/rollout/0"},
        {"a/0/hinted"},
        {"a/1/rollout/0"},
    ]


class TwoRows(ScriptedEngine):
    """Room for two responses, of which the younger one ends first."""

    def serve(self, feed):
        running: list = []
        while True:
            while len(running) < 2 and (request := feed()) is not None:
                running.append(request)
            if not running:
                return
            request = running.pop()
            self.calls.append(([request], request.settings))
            yield self._completion(request, request.settings)


def test_the_next_chunk_begins_before_the_last_one_is_finished(tokenizer):
    script = {f"{name}/0/rollout/0": RIGHT for name in "abcdef"} | {"a/0/hinted": RIGHT, "a/0/rollout/0": WRONG}
    engine = TwoRows(tokenizer, script)
    realigner = Realigner(engine, tokenizer, settings(templates=(HINT,)), Verifier(), LeakFilter(), {})
    chunks = [(7, "ab"), (3, "cd"), (5, "ef")]
    asked, left = [], deque(chunks)

    def more():
        asked.append((len(engine.calls), realigner.progress.records))
        if not left:
            return None
        number, names = left.popleft()
        return number, [RealignInput(i, record(identity=name)) for i, name in enumerate(names)]

    found, at_hand = {}, []
    for number, rows in realigner.realign_chunks(more):
        found[number] = [row["id"] for row in rows]
        at_hand.append(realigner.progress.records)
        assert all(row["status"] == "kept" for row in rows)
    assert found == {number: list(names) for number, names in chunks}
    written = [call[0][0].id for call in engine.calls]
    assert written.index("c/0/rollout/0") < written.index("a/0/hinted"), "the rows of one chunk beside those of another"
    assert max(records for _, records in asked) >= 2 and realigner.progress.records == 0
    assert any(at_hand), "a chunk is finished while another is at hand"


def test_a_launch_with_room_for_many_chunks_leaves_them_to_others(tokenizer):
    """The next one is asked for once a record of the last one has ended."""
    engine = ScriptedEngine(tokenizer, {f"{name}/0/rollout/0": RIGHT for name in "ab"})
    realigner = Realigner(engine, tokenizer, settings(), Verifier(), LeakFilter(), {})
    left, ended = deque("ab"), []

    def more():
        ended.append(len(engine.calls))
        return (len(left), [RealignInput(0, record(identity=left.popleft()))]) if left else None

    assert [number for number, _ in realigner.realign_chunks(more)] == [2, 1]
    assert ended[:2] == [0, 1]


def test_ranks_that_do_not_lead_decide_the_same_from_what_is_shared(tokenizer):
    script = {"a/0/rollout/0": WRONG, "b/0/rollout/0": RIGHT, "a/0/analysis": "x\n# CoT", "a/0/hinted": RIGHT}
    records = [RealignInput(0, record(identity="a")), RealignInput(1, record(identity="b"))]
    shared: deque = deque()

    def sent(value):
        shared.append(value)
        return value

    found, calls = [], []
    for verifier, share, leads in ((Verifier(), sent, True), (None, lambda value: shared.popleft(), False)):
        engine = ScriptedEngine(tokenizer, script)
        realigner = Realigner(engine, tokenizer, settings(), verifier, LeakFilter(), {}, share=share, leads=leads)
        found.append(realigner.realign(records))
        calls.append([[request.id for request in requests] for requests, _ in engine.calls])
    assert not shared and calls[0] == calls[1] and len(calls[0]) == 3
    tables = [pa.Table.from_pylist(rows, OUTCOME_SCHEMA).to_pylist() for rows in found]
    assert _as_text(tables[0]) == _as_text(tables[1])


def _as_text(rows) -> str:  # NaN is not equal to itself
    return json.dumps(rows, sort_keys=True)


def test_a_model_that_gives_nan_is_named(tokenizer):
    engine = ScriptedEngine(tokenizer, {})
    engine.score = lambda sequences: [(np.full(len(s) - 1, np.nan), np.zeros(len(s) - 1)) for s in sequences]
    realigner = Realigner(engine, tokenizer, settings(), Verifier(), LeakFilter(), {})
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        realigner.realign([RealignInput(0, record())])


def test_by_default_what_is_unknown_is_dropped(tokenizer):
    [row], _ = run(
        tokenizer, {"r/0/rollout/0": "The sum? \\boxed{half of it}", "r/0/hinted": WRONG}, record(), templates=(HINT,)
    )
    assert row["status"] == "dropped" and not any(accepted for _, _, accepted in stages(row))


def test_how_kept_turns_were_verified_is_counted(tokenizer):
    rows = [
        run(tokenizer, {"r/0/rollout/0": RIGHT}, record())[0][0],
        run(tokenizer, {"r/0/rollout/0": "Hello"}, record(None, UNVERIFIABLE), unverified="keep")[0][0],
        run(tokenizer, {}, record(None, UNVERIFIABLE), unverified="original")[0][0],
    ]
    methods = count_methods(turn for row in rows for turn in row["turns"])
    assert methods == {"exact": 1, "UNVERIFIED": 1, "original": 1}
    assert describe_methods(methods) == "kept turns: 1 right (1 exact), 1 UNVERIFIED, 1 left as they were"
    assert json.loads(rows[0]["record"])["realigned"]["turns"][0]["verified_by"] == "exact"


def test_what_lacks_references_is_told_at_the_start(tokenizer):
    without, given = record(None, UNVERIFIABLE), record()
    assert describe_unreferenced([given], 1, "drop") is None
    text = describe_unreferenced([without, without], 9, "drop")
    assert text is not None and "everything would be dropped" in text and "--unverified keep" in text
    text = describe_unreferenced([without, given], 9, "drop")
    assert text is not None and "1 of 2 records looked at (of 9)" in text and "WARNING" not in text
    assert "right or wrong" in str(describe_unreferenced([without], 1, "keep"))


def test_progress_names_the_stages_and_only_rises(tokenizer):
    """Two records: one whose own response is right, and one that needs every stage."""
    script = {"a/0/rollout/0": RIGHT, "b/0/rollout/0": WRONG, "b/0/analysis": "# Analysis\nadd\n# CoT\n"}
    script |= {"b/0/hinted": WRONG, "b/0/retry/1": RIGHT}
    seen = []

    class Watched(ScriptedEngine):
        def serve(self, feed):
            for completion in super().serve(feed):
                seen.append((realigner.progress.describe(), realigner.progress.share))
                yield completion

        def score(self, sequences):
            seen.append((realigner.progress.describe(), realigner.progress.share))
            return super().score(sequences)

    chosen = settings(retries=1)
    realigner = Realigner(Watched(tokenizer, script), tokenizer, chosen, Verifier(), LeakFilter(), {})
    rows = realigner.realign([RealignInput(i, record(identity=name)) for i, name in enumerate("ab")])
    assert [row["status"] for row in rows] == ["kept", "kept"]
    assert [words for words, _ in seen] == [
        "scoring",
        "to write: own responses (2)",
        "to write: own responses (1)",
        "to write: analyses of the references (1)",
        "to write: hinted responses (1)",
        "to write: responses closer to the hint, try 1 (1)",
    ]
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and shares[1] == 0 < shares[2] < shares[-1] < 1
    assert shares[3] >= 0.5 + 0.5 / 4, "one record is settled, and the other has been through one stage of four"
    assert realigner.progress.share == 0, "no records are at hand"
