"""Conversations of many turns: the spans and refusals are those of turn by turn, the number of renderings is not."""

import pytest

from megatron_idft.data.chat import mask_proof
from megatron_idft.data.chat.conversations import render_conversation
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.errors import ConversationError, TemplateError
from tests.data.chat_templates import CHATML, ENDS_IN_THE_NEXT_MESSAGE, FAMILIES, QWEN3, REFUSED

ANSWERS = [
    "",
    "Probe",
    "a",
    "It is 7.",
    "Hello\n\nthere",
    "answer <|im_end|>",
    "x" * 300,
    "a",
    "<|im_start|>assistant\n",
]
UNMARKED = {name: template for name, (template, _, _) in FAMILIES.items() if "generation %}" not in template} | {
    "qwen3": QWEN3, "ends in the next message": ENDS_IN_THE_NEXT_MESSAGE,
}  # fmt: skip


def conversation(turns):
    """Answers of every kind, the empty one and one of another weight among them; questions that repeat."""
    messages = []
    for i in range(turns):
        messages.append({"role": "user", "content": f"question {i % 5}"})
        messages.append({"role": "assistant", "content": ANSWERS[i % len(ANSWERS)]})
    messages[9]["loss"] = 0
    return messages


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_model, tmp_path_factory):
    made = {}

    def get(template):
        if template not in made:
            file = tmp_path_factory.mktemp("template") / "chat.jinja"
            file.write_text(template, encoding="utf-8")
            made[template] = load_tokenizer(sentencepiece_model, chat_template=str(file))
        return made[template]

    return get


def one_by_one(monkeypatch, tokenizer, messages):
    with monkeypatch.context() as patch:
        patch.setattr(mask_proof, "MANY", 10**9)
        return render_conversation(tokenizer, messages)


def renderings(monkeypatch, tokenizer, messages):
    """The conversation, and how often it took the template."""
    count = 0
    render = tokenizer.template.render

    def counted(*args, **options):
        nonlocal count
        count += 1
        return render(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer.template, "render", counted)
        return render_conversation(tokenizer, messages), count


@pytest.mark.parametrize("name", UNMARKED)
def test_spans_are_those_found_one_by_one(monkeypatch, tokenizer, name):
    tokenizer = tokenizer(UNMARKED[name])
    found, count = renderings(monkeypatch, tokenizer, conversation(60))
    assert found == one_by_one(monkeypatch, tokenizer, conversation(60)) and len(found.spans) == 59
    longer, longer_count = renderings(monkeypatch, tokenizer, conversation(180))
    assert longer_count <= count + 2 < 60 and len(longer.spans) == 179


def test_agents_steps_are_those_found_one_by_one(monkeypatch, tokenizer):
    """Reasoning that the template drops before the last question, calls, results of tools."""
    template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.reasoning_content and loop.index > messages | length - 30 %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}",
    )  # fmt: skip
    messages = [{"role": "user", "content": "do it"}]
    for i in range(80):
        call = {"type": "function", "function": {"name": "run", "arguments": {"command": f"ls {i % 3}"}}}
        messages.append({"role": "assistant", "content": "", "reasoning_content": f"step {i}", "tool_calls": [call]})
        messages.append({"role": "tool", "content": f"file {i % 4}"})
    messages.append({"role": "assistant", "content": "done"})
    tokenizer = tokenizer(template)
    found, count = renderings(monkeypatch, tokenizer, messages)
    assert found == one_by_one(monkeypatch, tokenizer, messages) and count < 100
    assert found.text[slice(*found.spans[-1])] == "done<|im_end|>" and found.unwritten


@pytest.mark.parametrize("name", [name for name, (template, _) in REFUSED.items() if "generation %}" not in template])
def test_what_is_refused_in_few_turns_is_refused_in_many(tokenizer, name):
    template, words = REFUSED[name]
    with pytest.raises((TemplateError, ConversationError), match=words):
        render_conversation(tokenizer(template), conversation(30))


# What a template may get wrong of one turn of many, at the place of another: (condition, what it writes).
FAR = "{% if messages | length > 90 and messages[61].content.startswith('Probe') %}"
WRONG = {
    "a header depends on a far answer": CHATML.replace("<|im_start|>", "<|im_start|>" + FAR + "!{% endif %}", 1),
    "a question depends on a far answer": CHATML.replace(
        "{{ m.content }}", "{% if loop.index0 == 20 %}" + FAR + "!{% endif %}{% endif %}{{ m.content }}", 1
    ),
    "an answer depends on a far answer": CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% if loop.index0 == 21 %}" + FAR + "!{% endif %}{% endif %}", 1
    ),
    "an answer depends on a far question": CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}"
        "{% if loop.index0 == 21 and messages | length > 90 and 'Probe' in messages[80].content %}!{% endif %}",
        1,
    ),
    "an answer holds the question before": CHATML.replace(
        "{{ m.content }}", "{% if loop.index0 == 41 %}{{ messages[40].content }}{% endif %}{{ m.content }}", 1
    ),
    "one header is not what the model is asked with": CHATML.replace(
        "{{ m.role }}", "{{ 'Assistant' if loop.index0 == 51 else m.role }}", 1
    ),
    "one answer is not ended": CHATML.replace("<|im_end|>", "{% if loop.index0 != 51 %}<|im_end|>{% endif %}", 1),
    "one answer is written twice": CHATML.replace("{{ m.content }}", "{{ m.content * (1 + (loop.index0 == 51)) }}", 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_wrong_turn_of_many_is_found(tokenizer, name):
    messages = conversation(60)
    messages[51] = {"role": "assistant", "content": "the answer"}
    with pytest.raises(TemplateError, match=r"cannot be proven|never ends"):
        render_conversation(tokenizer(WRONG[name]), messages)
