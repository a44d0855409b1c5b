"""Records with tools, reasoning and untrained turns: exact ids and masks in the families' templates, and the stages."""

import json

import numpy as np
import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_idft.corpus.records import Record
from megatron_idft.corpus.verification.leaks import LeakFilter
from megatron_idft.corpus.verification.verifier import Verifier
from megatron_idft.data.chat.conversations import encode_conversation, render_conversation, tokenize
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.errors import ConversationError, TemplateError
from megatron_idft.hinted_decoding.input.provided import ProvidedText
from megatron_idft.hinted_decoding.mixing import EntropyMixing
from megatron_idft.hinted_decoding.output.outcomes import OUTCOME_SCHEMA
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.report.summary import summarize
from megatron_idft.hinted_decoding.settings import RealignSettings
from megatron_idft.hinted_decoding.stages.conversation import RunningConversation, encode
from megatron_idft.hinted_decoding.stages.pipeline import Realigner
from megatron_idft.hinted_decoding.stages.tasks import RealignInput
from tests.data.family_templates import FAMILIES
from tests.data.test_family_templates import CALL, RESULT, SPECIAL, TOOLS, assistant, thought, user
from tests.data.tool_templates import QWEN3, QWEN3_THINKING, QWEN25
from tests.hinted_decoding.scripted import ScriptedEngine, make_tokenizer
from tests.tiny_tokenizers import byte_level

PLAIN = [user("3 + 4?"), assistant("It is 7."), user("And 1?"), assistant("8.\n\nIndeed.")]
# Name -> (messages, tools, fields that the template must write, the turns that stay as they are).
CONVERSATIONS = {
    "plain": (PLAIN, None, "", []),
    "untrained": ([PLAIN[0], assistant("It is 7.", loss=0), *PLAIN[2:]], None, "", [0]),
    "weighted": ([PLAIN[0], assistant("It is 7.", loss=0.5), *PLAIN[2:]], None, "", []),
    "moved away from": ([PLAIN[0], assistant("It is 7.", loss=-0.5), *PLAIN[2:]], None, "", [0]),
    "reasoning at the end": ([user("3 + 4?"), assistant("It is 7.", **thought("3, then 4"))], None, "reasoning", []),
    "reasoning before": (
        [PLAIN[0], assistant("It is 7.", **thought("3, 4")), PLAIN[2], assistant("8.", **thought("1"))],
        None,
        "reasoning",
        None,
    ),
    "calls": ([user("Weather?"), assistant(tool_calls=[CALL]), RESULT, assistant("It is blue.")], TOOLS, "tools", [0]),
    "a text beside a call": (
        [user("Weather?"), assistant("Let me see.", tool_calls=[CALL]), RESULT, assistant("It is blue.")],
        TOOLS,
        "tools",
        None,
    ),
    "calls with reasoning": (
        [
            user("Weather?"),
            assistant(tool_calls=[CALL], **thought("ask")),
            RESULT,
            assistant("It is blue.", **thought("it said")),
        ],
        TOOLS,
        "tools reasoning",
        [0],
    ),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Name of a family -> a tokenizer with its template, without marks, and its special tokens."""
    made = {}

    def get(name):
        if name not in made:
            family, folder, backend = FAMILIES[name], tmp_path_factory.mktemp("tokenizer"), byte_level()
            backend.add_special_tokens(sorted({*SPECIAL.findall(family.template), family.eos, "<bos>"}))
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=family.eos)
            tokenizer.save_pretrained(folder)
            (folder / "own.jinja").write_text(family.original or family.unmarked(), encoding="utf-8")
            made[name] = load_tokenizer(folder, chat_template=str(folder / "own.jinja"))
        return made[name]

    return get


CASES = [
    (name, conversation)
    for name, family in FAMILIES.items()
    for conversation, (_, _, fields, _) in CONVERSATIONS.items()
    if set(fields.split()) <= set(family.fields.split())
]


def retold(tokenizer, messages, tools) -> tuple[RunningConversation, list[bool]]:
    """The conversation whose turns the model answers by the very texts of the record, and which of them are fixed."""
    conversation = RunningConversation(tokenizer, messages, tools)
    fixed = []
    for number in range(len(conversation.turns)):
        prompt = conversation.begin(number)
        fixed.append(prompt.fixed)
        if prompt.fixed:
            conversation.accept(prompt.original_ids, None, prompt.weight)
        else:
            body = prompt.original_ids[: len(prompt.original_ids) - len(prompt.end_ids)]
            conversation.accept(np.concatenate([body, prompt.end_ids]), tokenizer.decode(body), prompt.weight)
    return conversation, fixed


NEMOTRON = set(CONVERSATIONS) - {"calls with reasoning", "reasoning at the end"}
THINKING = {"plain", "untrained", "weighted", "moved away from", "reasoning before"}
# Their own templates edit what stands before the last turn, or ask for the turn by another text than they write then.
REFUSED = {
    "glm4moe": {"a text beside a call"},
    "gptoss": {"plain", "weighted"},
    "qwen3_5_think": THINKING,
    "qwen3_6": THINKING,
    "qwen3_5_nothink": THINKING | {"calls with reasoning", "reasoning at the end"},
    **dict.fromkeys((name for name in FAMILIES if name.startswith("nemotron")), NEMOTRON),
}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_texts_of_the_record_give_the_ids_and_the_mask_of_training(tokenizers, name, kind):
    tokenizer, (messages, tools, _, expected) = tokenizers(name), CONVERSATIONS[kind]
    try:
        trained = render_conversation(tokenizer, messages, tools=tools)
    except (ConversationError, TemplateError):  # training refuses it
        with pytest.raises((ConversationError, TemplateError)):
            retold(tokenizer, messages, tools)
        return
    if kind in REFUSED.get(name, ()):
        with pytest.raises(TemplateError, match=r"Remedy: pass a template"):
            retold(tokenizer, messages, tools)
        return
    conversation, fixed = retold(tokenizer, messages, tools)
    assert conversation.messages == messages and (
        expected is None or [i for i, on in enumerate(fixed) if on] == expected
    )
    [encoded] = tokenize(tokenizer, [trained])
    weights = encoded.mask if encoded.weights is None else encoded.weights
    assert tokenizer.decode(conversation.ids) == trained.text[: trained.spans[-1][1]]
    for weight in set(weights.tolist()):
        ours, theirs = conversation.ids[conversation.mask == weight], encoded.ids[weights == weight]
        assert not weight or tokenizer.decode(ours) == tokenizer.decode(theirs)
    # Of two line breaks at its end, inference makes one token; before an answer they are two.
    if not trained.text[: trained.spans[-1][0]].endswith("\n\n"):
        n = len(conversation.ids)
        assert conversation.ids.tolist() == encoded.ids[:n].tolist()
        assert conversation.mask.tolist() == weights[:n].tolist() and not weights[n:].any()


def test_weights_of_others_are_refused_before_they_are_lost(tokenizers):
    for other in (PLAIN[0] | {"loss": 0.2}, {"role": "system", "content": "Be brief.", "loss": -1}):
        with pytest.raises(ConversationError, match=r"messages\[0\]\.loss: .* drop token_ids and loss_mask"):
            RunningConversation(tokenizers("llama3"), [other, *PLAIN[1:]])
    assert RunningConversation(tokenizers("llama3"), [PLAIN[0] | {"loss": 0}, *PLAIN[1:]]).turns == [1, 3]


@pytest.mark.parametrize(
    ("name", "begins"),
    [("qwen2_5", "<tool_call>"), ("qwen3_5_think", "<tool_call>"), ("lfm2_v2", "<|tool_call_start|>[")],
)
def test_a_call_of_its_own_is_known_by_its_beginning(tokenizers, name, begins):
    messages, tools, _, _ = CONVERSATIONS["a text beside a call"]
    prompt = RunningConversation(tokenizers(name), messages, tools).begin(0)
    assert prompt.calls_begin == begins and begins in prompt.end and prompt.end.endswith("<|im_end|>")


HINT = HintTemplate(
    "h",
    "---\n{% for m in conversation %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{{ question }} {{ solution }}",
)
RIGHT = "The answer is 7."


def run(folder, template, messages, script, tools=TOOLS, answer="7", rollouts=None, **changes):
    """(row, written record, engine, tokenizer)."""
    tokenizer = make_tokenizer(folder, template)
    engine = ScriptedEngine(tokenizer, script)
    settings = {"seed": 5, "max_positions": 2000, "max_tokens": 50, "templates": (HINT,), "retries": 0} | changes
    settings["mixing"] = EntropyMixing(600)
    verifier, leaks = Verifier(), LeakFilter()
    realigner = Realigner(engine, tokenizer, RealignSettings(**settings), verifier, leaks, {"versions": {}})
    extra = {} if tools is None else {"tools": tools}
    record = Record([dict(m) for m in messages], "r", "data.jsonl", 3, answer, None, extra, tools)
    rows = realigner.realign([RealignInput(0, record, rollouts or {})])
    [row] = pa.Table.from_pylist(rows, OUTCOME_SCHEMA).to_pylist()
    summarize([row], {}, "t")
    return row, json.loads(row["record"] or "null"), engine, tokenizer


ADDED = [user("3 + 4?"), assistant(tool_calls=[CALL]), RESULT, assistant("It is \\boxed{7}.")]
BESIDE = [ADDED[0], assistant("I ask.", tool_calls=[CALL]), *ADDED[2:]]


def check_ids(row, written, tokenizer, tools=TOOLS):
    """They are those that training would make of the new messages."""
    ids, mask = encode_conversation(tokenizer, written["messages"], tools=tools)
    n = len(row["token_ids"])
    assert written["token_ids"] == row["token_ids"] == ids[:n].tolist()
    assert written["loss_mask"] == row["loss_mask"] == mask[:n].tolist() and not mask[n:].any()


def test_calls_stay_and_the_answer_to_their_results_is_written_anew(tmp_path):
    row, written, engine, tokenizer = run(tmp_path, QWEN25, ADDED, {"r/1/rollout/0": RIGHT})
    assert row["status"] == "kept" and [turn["stage"] for turn in row["turns"]] == ["original", "rollout"]
    assert written["messages"] == [*ADDED[:3], assistant(RIGHT)] and written["tools"] == TOOLS
    prompt = tokenizer.decode(engine.requests["r/1/rollout/0"].prompt)
    assert '"weather"' in prompt and "<tool_response>\nblue" in prompt and '{"city": "Paris"}' in prompt
    check_ids(row, written, tokenizer)


def test_the_hint_shows_calls_and_their_results(tmp_path):
    row, _, engine, tokenizer = run(tmp_path, QWEN25, ADDED, {"r/1/rollout/0": "Well, 8.", "r/1/hinted": RIGHT})
    assert row["status"] == "kept"
    hint = tokenizer.decode(engine.requests["r/1/hinted"].hinted_prompt)
    assert '<assistant>weather({"city": "Paris"})\n<tool>blue\n3 + 4?' in hint and "# Tools" in hint


def test_a_text_beside_a_call_is_written_anew_and_the_call_stays(tmp_path):
    own = 'I look.\n<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>'
    script = {"r/0/rollout/0": own, "r/1/rollout/0": RIGHT}
    row, written, _, tokenizer = run(tmp_path, QWEN25, BESIDE, script, unverified="keep")
    assert row["status"] == "kept" and [turn["stage"] for turn in row["turns"]] == ["rollout", "rollout"]
    assert written["messages"][1] == assistant("I look.", tool_calls=[CALL])
    check_ids(row, written, tokenizer)
    [candidate] = row["turns"][0]["candidates"]
    # Its tokens, and the one that began to go on.
    assert candidate["num_tokens"] == len(encode(tokenizer, "I look.")) + 1 == len(row["turns"][0]["phi"])
    # Ended instead of a call: the record's call follows all the same.
    row, written, _, tokenizer = run(tmp_path, QWEN25, BESIDE, script | {"r/0/rollout/0": "I look."}, unverified="keep")
    assert written["messages"][1] == assistant("I look.", tool_calls=[CALL])
    check_ids(row, written, tokenizer)
    # Nothing but a call: no text to take.
    row, written, _, _ = run(
        tmp_path, QWEN25, BESIDE, script | {"r/0/rollout/0": "<tool_call>", "r/0/hinted": "I look."}, unverified="keep"
    )
    assert row["turns"][0]["candidates"][0]["rejected_because"] == "unfinished" and row["status"] == "kept"


def test_calls_in_a_rollout_of_another_engine_are_cut_off(tmp_path):
    own = 'I look.\n<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call><|im_end|>'
    ids = tuple(encode(make_tokenizer(tmp_path, QWEN25), own).tolist())
    for given in (ProvidedText(own.removesuffix("<|im_end|>")), ProvidedText(own, token_ids=ids)):
        rollouts = {0: [given], 1: [ProvidedText(RIGHT)]}
        row, written, _, tokenizer = run(tmp_path, QWEN25, BESIDE, {}, rollouts=rollouts, unverified="keep")
        assert row["status"] == "kept" and written["messages"][1] == assistant("I look.", tool_calls=[CALL])
        check_ids(row, written, tokenizer)


def test_a_text_beside_a_call_stays_where_nothing_can_verify_another(tmp_path):
    row, written, _, _ = run(tmp_path, QWEN25, BESIDE, {"r/1/rollout/0": RIGHT})
    assert row["status"] == "kept" and [turn["stage"] for turn in row["turns"]] == ["original", "rollout"]
    assert written["messages"] == [*BESIDE[:3], assistant(RIGHT)]


def test_reasoning_is_a_part_of_the_response(tmp_path):
    messages = [user("3 + 4?"), assistant("It is \\boxed{7}.", **thought("Three, four."))]
    script = {"r/0/rollout/0": "<think>\nIt is 7, no end", "r/0/hinted": "<think>\nAdd 3 to 4.\n</think>\n\n" + RIGHT}
    row, written, engine, tokenizer = run(tmp_path, QWEN3, messages, script, tools=None)
    assert [c["rejected_because"] for c in row["turns"][0]["candidates"]] == ["unfinished", None]
    assert written["messages"][1] == assistant(RIGHT, **thought("Add 3 to 4."))
    assert "Three, four.\n\nIt is" in tokenizer.decode(engine.requests["r/0/hinted"].hinted_prompt)
    check_ids(row, written, tokenizer, tools=None)
    # Where it writes no thought, the message has none.
    row, written, _, _ = run(tmp_path, QWEN3, messages, {"r/0/rollout/0": RIGHT}, tools=None)
    assert written["messages"][1] == assistant(RIGHT)


def test_a_thought_that_the_prompt_opens_must_end(tmp_path):
    messages = [user("3 + 4?"), assistant("It is \\boxed{7}.", **thought("Three, four."))]
    script = {"r/0/rollout/0": "Add them: " + RIGHT, "r/0/hinted": "Add them.\n</think>\n\n" + RIGHT}
    row, written, engine, tokenizer = run(tmp_path, QWEN3_THINKING, messages, script, tools=None)
    assert tokenizer.decode(engine.requests["r/0/rollout/0"].prompt).endswith("<think>\n")
    assert [c["rejected_because"] for c in row["turns"][0]["candidates"]] == ["unfinished", None]
    assert written["messages"][1] == assistant(RIGHT, **thought("Add them."))
    check_ids(row, written, tokenizer, tools=None)


def test_untrained_turns_stay_and_weights_are_kept(tmp_path):
    messages = [user("1 + 1?"), assistant("3!", loss=0), user("3 + 4?"), assistant("It is \\boxed{7}.", loss=0.5)]
    row, written, engine, tokenizer = run(tmp_path, QWEN25, messages, {"r/1/rollout/0": RIGHT}, tools=None)
    assert row["status"] == "kept" and [turn["stage"] for turn in row["turns"]] == ["original", "rollout"]
    assert written["messages"] == [*messages[:3], assistant(RIGHT, loss=0.5)]
    trained = [token for token, weight in zip(row["token_ids"], written["loss_mask"], strict=True) if weight]
    assert tokenizer.decode(trained) == RIGHT + "<|im_end|>" and set(written["loss_mask"]) == {0, 0.5}
    assert "3!" in tokenizer.decode(engine.requests["r/1/rollout/0"].prompt)
