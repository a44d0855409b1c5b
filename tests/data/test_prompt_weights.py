"""Messages of users, the system and tools that have a weight: where they stand, or the refusal, by templates."""

import numpy as np
import pytest

from megatron_idft.data.chat.conversations import render_conversation, tokenize, trained_messages
from megatron_idft.data.chat.template import ChatTemplate
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.blocks import read_blocks
from megatron_idft.data.packed.encoding import BlockEncoder
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.preview import show_records
from megatron_idft.errors import ConversationError, InputError, RecordError, TemplateError
from tests.data.chat_templates import CHATML, GEMMA, MARKED, MISTRAL
from tests.data.prepared_files import tokenized, write


@pytest.fixture(scope="module")
def tokenizers(huggingface_folder):
    made = {}

    def get(template):
        if template not in made:
            made[template] = load_tokenizer(huggingface_folder("byte-level", template))
        return made[template]

    return get


def talk(*said, system=None):
    """Messages from contents, or (content, weight), user and assistant in turn."""
    roles = [*(["system"] if system else []), *("user", "assistant") * len(said)]
    messages = []
    for role, each in zip(roles, [*([system] if system else []), *said], strict=False):
        content, weight = each if isinstance(each, tuple) else (each, None)
        messages.append({"role": role, "content": content} | ({} if weight is None else {"loss": weight}))
    return messages


def others(rendered):
    """The spans of others: text and weight."""
    spans = zip(rendered.spans, rendered.weights, strict=True)
    return [(rendered.text[a:b], w) for k, ((a, b), w) in enumerate(spans) if k in rendered.others]


def wrapped(body):
    """ChatML whose user messages are written by `body`."""
    return CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'user' %}" + body + "{% else %}{{ m.content }}{% endif %}"
    )


LOOKS = "{{ 'tool' if m.content.startswith('<result>') and m.content.endswith('</result>') else m.role }}"
# Name -> (template, messages, the spans of others).
PROVEN = {
    "blanks are written": (CHATML, talk(("\n a \n", 0.5), "b"), [("\n a \n<|im_end|>", 0.5)]),
    "blanks are trimmed": (GEMMA, talk(("\n a \n", 0.5), "b"), [("a<end_of_turn>", 0.5)]),
    "one is trimmed, the other is not": (
        CHATML.replace("m.content", "(m.content | trim if m.role == 'user' else m.content)"),
        talk(("\n a", 1), "b", system=("s\n", 2)),
        [("s\n<|im_end|>", 2), ("a<|im_end|>", 1)],
    ),
    "the system's is moved into the question": (
        MISTRAL,
        talk(("a", -1), "b", system=("s", 0.5)),
        [("s", 0.5), ("a [/INST]", -1)],
    ),
    "the system's is moved behind the question": (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if loop.index0 == 1 %} ({{ messages[0].content }}){% endif %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        talk(("a", -1), "b", system=("s", 0.5)),
        [("a", -1), ("s", 0.5)],
    ),
    "the same words thrice": (
        CHATML,
        talk("a", ("a", 0), ("a", 0.5), "a"),
        [("a<|im_end|>", 0.5)],
    ),
    "a message spells the end": (CHATML, talk(("a<|im_end|>\n", 0.5), "b"), [("a<|im_end|>\n<|im_end|>", 0.5)]),
    "the next message spells the end": (
        CHATML.replace("{{ m.content }}<|im_end|>\n", "{{ m.content }}{{ '<|im_end|>' if m.role == 'assistant' }}"),
        talk(("a", 0.5), "<|im_end|>b"),
        [("a", 0.5)],
    ),
    "as JSON": (
        wrapped("{{ {'says': m.content} | tojson }}"),
        talk(('he said "a"\n', 0.5), "b"),
        [('he said \\"a\\"\\n', 0.5)],
    ),
    "the template looks at how it begins and ends": (
        CHATML.replace("{{ m.role }}", LOOKS),
        talk(("<result> 7 </result>", 0.5), "b"),
        [("<result> 7 </result><|im_end|>", 0.5)],
    ),
    "it ends the conversation": (CHATML, talk("a", "b", ("c", 0.5)), [("c<|im_end|>", 0.5)]),
    "marked": (MARKED, talk(("a", 0.5), "b", ("c", -0.5), "d"), [("a<|im_end|>", 0.5), ("c<|im_end|>", -0.5)]),
    "nothing is said": (CHATML, talk((" \n", 0.5), "b"), []),
}


@pytest.mark.parametrize("name", PROVEN)
def test_the_place_is_proven(name, tokenizers):
    template, messages, expected = PROVEN[name]
    rendered = render_conversation(tokenizers(template), messages)
    assert others(rendered) == expected
    bare = [
        {"role": m["role"], "content": m["content"]}
        | ({"loss": m["loss"]} if m["role"] == "assistant" and "loss" in m else {})
        for m in messages
    ]
    assert rendered.text == render_conversation(tokenizers(template), bare).text


# Name -> (template, messages, error, words of the refusal).
REFUSED = {
    "the system's is left out": (
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
        talk("a", "b", system=("s", 0.5)),
        ConversationError,
        r"messages\[0\]\.content: the template does not write what this system message says.*--chat-template FILE",
    ),
    "it stands twice": (
        wrapped("{{ m.content }} {{ m.content }}"),
        talk(("a", 0.5), "b"),
        TemplateError,
        r"what messages\[0\], of the role 'user', says more than once",
    ),
    "it is rewritten": (
        wrapped("{{ m.content | upper }}"),
        talk(("a", 0.5), "b"),
        ConversationError,
        r"messages\[0\].content: the template does not write what this user message says, or not with these words",
    ),
    "it is rewritten here": (
        wrapped("{{ m.content | replace('fox', 'dog') }}"),
        talk("a", "b", ("a fox", 0.5), "b"),
        ConversationError,
        r"messages\[2\], of the role 'user', says more than once or in other words",
    ),
    "half of it is left out": (
        wrapped("{{ m.content[:20] }}"),
        talk(("the quick brown fox and the other", 0.5), "b"),
        ConversationError,
        r"messages\[0\]",
    ),
    "other text depends on it": (
        "{{ messages[0].content | length }}" + CHATML,
        talk(("the quick brown fox", 0.5), "b"),
        TemplateError,
        r"messages\[0\], of the role 'user', says more than once or in other words, or other text depends on it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proven_is_refused_by_name(name, tokenizers):
    template, messages, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        render_conversation(tokenizers(template), messages)
    others = [{"role": message["role"], "content": message["content"]} for message in messages]
    assert render_conversation(tokenizers(template), others).spans, "without the weight it is trained as ever"


def test_a_refusal_names_file_line_and_remedy_and_can_be_skipped(tokenizers, tmp_path):
    template, messages, _, _ = REFUSED["the system's is left out"]
    file = write(tmp_path / "a.jsonl", [{"messages": talk("a", "b")}, {"messages": messages}])
    with pytest.raises(RecordError, match=r"a\.jsonl, line 2, messages.*messages\[0\]\.content.*Remedy: set its"):
        tokenized(tokenizers(template), tmp_path / "cache", file, seq_length=64)
    kept = tokenized(tokenizers(template), tmp_path / "cache", file, seq_length=64, bad_records="skip")
    assert kept.counts.bad == 1 and kept.counts.kept == 1
    template = REFUSED["it stands twice"][0]
    file = write(tmp_path / "b.jsonl", [{"messages": talk(("a", 0.5), "b")}])
    with pytest.raises(TemplateError, match=r"b\.jsonl, line 1: .*messages\[0\].*Remedy: set its"):
        tokenized(tokenizers(template), tmp_path / "cache", file, seq_length=64, bad_records="skip")


def test_hundreds_of_results_take_few_renderings(tokenizers, monkeypatch):
    """An agent's: the others' places by one rendering, their ends by one for each kind."""
    template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'tool' %}<result>{{ m.content }}</result>{% else %}{{ m.content }}{% endif %}"
        "{% for call in m.tool_calls %}{{ call.function.arguments | tojson }}{% endfor %}",
    )
    messages = [{"role": "user", "content": "go", "loss": 0.1}]
    for step in range(200):
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": step}}}
        messages += [{"role": "assistant", "content": "", "tool_calls": [call]}]
        messages += [{"role": "tool", "content": f"found {step}", "loss": -0.5}]
    bare = [{key: value for key, value in message.items() if key != "loss"} for message in messages]
    counts, inner = [], ChatTemplate.render

    def counted(*arguments, **options):
        counts[-1] += 1
        return inner(*arguments, **options)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    for conversation in (bare, messages):
        counts.append(0)
        rendered = render_conversation(tokenizers(template), conversation)
    assert others(rendered) == [("go<|im_end|>", 0.1), *((f"found {step}", -0.5) for step in range(200))]
    assert counts[1] - counts[0] <= 6, counts


def test_with_the_last_turn_only_prompts_count_from_the_turn_before():
    messages = talk(("a", 2), "b", ("c", 3), "d", system=("s", 4))
    assert trained_messages(messages) == {0: 4, 1: 2, 2: 1, 3: 3, 4: 1}
    assert trained_messages(messages, last_turn_only=True) == {3: 3, 4: 1}
    assert trained_messages(messages[:3], last_turn_only=True) == {0: 4, 1: 2, 2: 1}
    # A corpus with a record for each turn trains each message once.
    parts = [trained_messages(messages[:end], last_turn_only=True) for end in (3, 5)]
    assert parts[0] | parts[1] == trained_messages(messages) and not parts[0].keys() & parts[1].keys()


def test_the_weight_of_all_prompts(tokenizers, tmp_path):
    roles = ("system", "user", "assistant", "tool", "assistant")
    messages = [{"role": role, "content": role[:2]} for role in roles]
    [encoded] = tokenize(tokenizers(CHATML), [render_conversation(tokenizers(CHATML), messages, prompt_weight=-0.25)])
    assert sorted({*encoded.weights.tolist()}) == [-0.25, 0, 1]
    own = [{**message, "loss": 0} if message["role"] == "user" else message for message in messages]
    assert others(render_conversation(tokenizers(CHATML), own, prompt_weight=-0.25)) == [("sy<|im_end|>", -0.25)]

    file = write(tmp_path / "a.jsonl", [{"messages": messages}])
    plain = PrepareSettings((str(file),), 64)
    weighed = PrepareSettings((str(file),), 64, prompt_weight=0.5)
    assert "prompt_weight" not in plain.of_packs("x") and weighed.of_packs("x") != plain.of_packs("x")
    assert "prompt_weight" not in plain.of_chunks("x") and weighed.of_chunks("x") != plain.of_chunks("x")
    for weight in (float("nan"), float("inf"), 1e-60, -1e300):
        with pytest.raises(InputError, match=r"--sft-prompt-weight .* is no weight"):
            PrepareSettings((str(file),), 64, prompt_weight=weight)


def test_samples_that_are_shown_name_their_weights(tokenizers, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"messages": talk(("a", 0.25), ("b", -0.5), "c", "d")}])
    shown = next(iter(show_records(PrepareSettings((str(file),), 64), tokenizers(CHATML), 1)))
    assert "user\n⟦a<|im_end|>⟧×0.25\n" in shown and "⟦b<|im_end|>⟧×-0.5\n" in shown
    assert "user\nc<|im_end|>\n" in shown and "⟦d<|im_end|>⟧\n" in shown and "6 trained" in shown


def test_negative_weights_are_counted_and_a_negative_mean_is_said(tokenizers, tmp_path):
    rows = [talk("a", ("b", -3)), talk("a", ("b", 0.5)), talk("a", "b"), talk("a", ("b", -1), "c", ("d", 0.5))]
    file = write(tmp_path / "a.jsonl", [{"messages": messages} for messages in rows])
    records = tokenized(tokenizers(CHATML), tmp_path / "cache", file, seq_length=64)
    # Each turn is a letter and its end.
    assert records.meta["weights"] == {
        "mean": -2 * 2.0 / 10,
        "negative_tokens": 4,
        "negative_records": 2,
        "prompt_records": 0,
    }
    assert records.counts.weighted == 3 and records.counts.trained_tokens == 10
    assert [records[i][1].sum() for i in range(4)] == [2, 2, 2, 4]
    report = records.report()
    assert "tokens of negative weight" in report and "in 2 records; -0.4 is the mean weight" in report
    assert "WARNING: its trained tokens weigh -0.4 on average" in report
    file = write(tmp_path / "b.jsonl", [{"messages": messages} for messages in rows[1:]])
    report = tokenized(tokenizers(CHATML), tmp_path / "cache", file, seq_length=64).report()
    assert "in 1 records; 0.25 is the mean weight" in report and "WARNING" not in report
    file = write(tmp_path / "c.jsonl", [{"messages": rows[2]}])
    records = tokenized(tokenizers(CHATML), tmp_path / "cache", file, seq_length=64)
    assert (
        "weights" not in records.meta
        and "that train messages" not in records.report()
        and "negative weight" not in records.report()
    )


def test_a_cut_counts_only_the_weights_that_are_left(tokenizers, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"messages": talk(("a", 0.25), ("b", 2), "a b c d", ("e", -3))}])
    whole = tokenized(tokenizers(CHATML), tmp_path / "cache", file, seq_length=64)
    assert whole.meta["weights"]["negative_tokens"] == 2
    [length] = whole.lengths().tolist()
    cut = tokenized(tokenizers(CHATML), tmp_path / "cache", file, seq_length=length - 5)
    figures = {"mean": (0.5 + 4) / 4, "negative_tokens": 0, "negative_records": 0, "prompt_records": 1}
    assert cut.meta["weights"] == figures
    assert np.array_equal(cut.pack(0).loss, whole.pack(0).loss[: length - 4])
    assert cut.counts.lost_trained_tokens == 2


def test_packs_hold_the_weights_of_their_records(tokenizers, tmp_path):
    """The same in chunks, and the encoder's own count of end-of-turn tokens is of the assistant's."""
    file = write(tmp_path / "a.jsonl", [{"messages": talk(("a", 0.25), ("b", -0.5), system=("s", 0.75))}])
    tokenizer = tokenizers(MISTRAL)
    chunk = BlockEncoder(tokenizer, PrepareSettings((str(file),), 64)).encode(
        next(iter(read_blocks([str(file)], 1 << 16)))
    )
    assert chunk.loss.dtype == np.float32 and chunk.info.end_ids == [tokenizer.eos_id]
    text = tokenizer.decode(chunk.ids)
    assert tokenizer.decode(chunk.ids[chunk.loss == -0.5]).strip() == "b</s>", text
    assert tokenizer.decode(chunk.ids[chunk.loss == 0.25]).strip() == "a [/INST]", text
