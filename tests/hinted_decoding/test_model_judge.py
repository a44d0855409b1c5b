"""The model's own judgement, where nothing else decides: what it is asked, what its answer does, how it is counted."""

import json

import numpy as np
import pyarrow as pa
import pytest

from megatron_idft.corpus.records import Record
from megatron_idft.corpus.verification.leaks import LeakFilter
from megatron_idft.corpus.verification.verifier import Verifier
from megatron_idft.hinted_decoding.mixing import EntropyMixing
from megatron_idft.hinted_decoding.output.outcomes import (
    OUTCOME_SCHEMA,
    count_methods,
    describe_methods,
    describe_reason,
)
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.report.summary import summarize
from megatron_idft.hinted_decoding.settings import RealignSettings
from megatron_idft.hinted_decoding.stages.pipeline import Realigner
from megatron_idft.hinted_decoding.stages.tasks import RealignInput
from tests.hinted_decoding.scripted import ScriptedEngine, make_tokenizer

HINT = HintTemplate("h", "---\n{{ question }} {{ solution }}")
NAME, TEXT = "r/0/rollout/0", "A dog that is lazy."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class JudgingEngine(ScriptedEngine):
    """opinions: text of a response -> probability of Yes."""

    def __init__(self, tokenizer, script, opinions):
        super().__init__(tokenizer, script)
        self.opinions = opinions

    def score(self, sequences):
        found = super().score(sequences)
        for ids, (log_prob, _) in zip(sequences, found, strict=True):
            text = self.tokenizer.decode(ids)
            for response, opinion in self.opinions.items():
                if response in text and text.endswith(("Yes", "No")):
                    yes = text.endswith("Yes")
                    [prompt] = self.tokenizer.encode_batch([text.removesuffix("Yes" if yes else "No")], [[]])
                    log_prob[len(prompt.ids) - 1 :] = 0
                    log_prob[len(prompt.ids) - 1] = np.log(opinion if yes else 1 - opinion)
        return found


def run(tokenizer, script, opinions, answer=None, **changes):
    messages = [{"role": "user", "content": "What jumps?"}, {"role": "assistant", "content": "The lazy dog."}]
    engine = JudgingEngine(tokenizer, script, opinions)
    defaults = {"seed": 5, "max_positions": 800, "max_tokens": 50, "templates": (HINT,), "retries": 0}
    defaults["model_judge_threshold"] = 0.5
    settings = RealignSettings(**(defaults | {"mixing": EntropyMixing(600)} | changes))
    realigner = Realigner(engine, tokenizer, settings, Verifier(), LeakFilter(), {"model": "m", "versions": {}})
    rows = realigner.realign([RealignInput(0, Record(messages, "r", "data.jsonl", 1, answer, None, {}))])
    [row] = pa.Table.from_pylist(rows, OUTCOME_SCHEMA).to_pylist()
    summarize([row], {}, "t")
    return row, engine


def asked(engine) -> list[str]:
    texts = [engine.tokenizer.decode(ids) for call in engine.scored for ids in call]
    return [text for text in texts if "Reference answer" in text]


def test_a_text_without_a_checkable_answer_is_kept_where_the_model_says_yes(tokenizer):
    row, engine = run(tokenizer, {NAME: TEXT}, {TEXT: 0.8})
    assert row["status"] == "kept" and json.loads(row["record"])["messages"][-1]["content"] == TEXT
    [candidate] = row["turns"][0]["candidates"]
    assert (candidate["verdict"], candidate["verified_by"]) == ("right", "model")
    assert candidate["model_probability"] == pytest.approx(0.8, abs=1e-5)
    yes, no = asked(engine)
    assert yes.endswith("Yes") and no.endswith("No") and "What jumps?" in yes and "The lazy dog." in yes and TEXT in yes
    methods = count_methods(row["turns"])
    assert describe_methods(methods) == "kept turns: 0 right, 0 UNVERIFIED, 1 right only by the model's own judgement"


def test_where_it_says_no_the_next_stage_is_tried(tokenizer):
    other = "Lazy is the dog."
    row, _ = run(tokenizer, {NAME: TEXT, "r/0/hinted": other}, {TEXT: 0.3, other: 0.3}, model_judge_threshold=0.4)
    assert row["status"] == "dropped" and describe_reason(row) == "own response: wrong; hinted: wrong"
    row, _ = run(tokenizer, {NAME: TEXT, "r/0/hinted": other}, {TEXT: 0.3, other: 0.5}, model_judge_threshold=0.4)
    assert row["status"] == "kept" and row["turns"][0]["stage"] == "hinted"


def test_it_is_asked_only_where_nothing_else_decides(tokenizer):
    row, engine = run(tokenizer, {NAME: "The answer is 7."}, {}, answer="7")
    assert row["status"] == "kept" and not asked(engine)
    row, engine = run(tokenizer, {NAME: "The answer is about 7."}, {"about": 0.9}, answer="7")
    assert len(asked(engine)) == 2 and "The lazy dog.\n\n7\n" in asked(engine)[0]  # with the final answer
    assert [c["verified_by"] for c in row["turns"][0]["candidates"]] == ["model"]


def test_a_prompt_beyond_the_context_leaves_it_undecided(tokenizer):
    script = {NAME: "The answer is about 7.", "r/0/hinted": "The answer is about 7."}
    row, engine = run(tokenizer, script, {"about": 0.9}, answer="7", max_positions=60)
    assert not asked(engine) and row["status"] == "dropped"
    reason = "unverified (words are no formula)"
    assert describe_reason(row) == f"own response: {reason}; hinted: {reason}"


def test_without_it_such_texts_are_dropped_undecoded(tokenizer):
    row, engine = run(tokenizer, {}, {}, model_judge_threshold=None)
    assert row["reason"] == "no reference answer to verify with" and not engine.calls and not asked(engine)
