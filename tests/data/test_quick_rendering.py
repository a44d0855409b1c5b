"""Rendering many conversations of few structures: what `render_conversation` gives, in fewer renderings."""

import random

import pytest

from megatron_idft.corpus.records import Record
from megatron_idft.data.chat.conversations import render_conversation
from megatron_idft.data.chat.template import ChatTemplate
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.rendering import Renderer
from megatron_idft.errors import ConversationError, TemplateError
from tests.data import tool_templates
from tests.data.chat_templates import CHATML, ENDS_IN_THE_NEXT_MESSAGE, FAMILIES, MARKED, QWEN3, QWEN3_MARKED, REFUSED

TEMPLATES = {name: template for name, (template, _, _) in FAMILIES.items()}
TEMPLATES |= {f"refused: {name}": template for name, (template, *_) in REFUSED.items()}
TEMPLATES |= {"qwen3": QWEN3, "qwen3 marked": QWEN3_MARKED, "ends in the next message": ENDS_IN_THE_NEXT_MESSAGE}
TEMPLATES |= {
    f"tools: {name}": getattr(tool_templates, name) for name in ("QWEN25", "QWEN3", "LLAMA31", "MISTRAL3", "DEEPSEEK")
}
# The answer's end depends on the answer, the question's header on the question.
TEMPLATES["looks at what is said"] = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '!' if 'fox' in m.content else '' }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAID = [
    "hello",
    " fox ",
    "\n\nworld\n",
    "ContentofContentiof",
    "<think>a</think>b",
    "<|im_end|>",
    "a",
    "😀 你好",
    "Probe x",
]


def records(count, plain=False):
    rng = random.Random(1)
    made = []
    for line in range(count):
        messages = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.3 else []
        for role in ("user", "assistant") * rng.choice([1, 1, 2, 3]):
            text = rng.choice(["hello", "what is this", "naïve"]) if plain else "".join(rng.choices(SAID, k=2))
            messages.append({"role": role, "content": text})
        if not plain and line % 9 == 8:
            messages[-1]["loss"] = 0.5
        if not plain and line % 4 == 3:
            messages[0]["loss"] = rng.choice([0, -0.25])
        if not plain and line % 11 == 10:
            messages[-1]["reasoning_content"] = "because"
        made.append(Record(messages, str(line), "a.jsonl", line))
    return made


def outcome(render, *arguments, **options):
    try:
        return render(*arguments, **options)
    except (ConversationError, TemplateError) as error:
        return type(error), str(error)


@pytest.mark.parametrize(("last_turn_only", "prompt_weight"), [(False, 0.0), (True, 0.0), (False, -0.5), (True, 0.2)])
@pytest.mark.parametrize("name", TEMPLATES)
def test_it_renders_alike(name, last_turn_only, prompt_weight, huggingface_folder):
    tokenizer = load_tokenizer(huggingface_folder("byte-level", TEMPLATES[name]))
    options = {"last_turn_only": last_turn_only, "prompt_weight": prompt_weight}
    for plain in (True, False):
        renderer = Renderer(tokenizer, **options)
        for record in records(150 if not prompt_weight else 60, plain):
            whole = outcome(render_conversation, tokenizer, record.messages, **options)
            assert outcome(renderer.render, record) == whole, record.messages


@pytest.mark.parametrize("prompt_weight", [0.0, 0.2])
@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "marked", "qwen3"])
def test_most_take_few_renderings(name, prompt_weight, huggingface_folder, monkeypatch):
    tokenizer = load_tokenizer(huggingface_folder("byte-level", TEMPLATES[name]))
    renderer, made = Renderer(tokenizer, False, prompt_weight), records(400, plain=True)
    for number, record in enumerate(made if prompt_weight else ()):
        record.messages[-1]["loss"] = -number - 1  # a structure is not one of these numbers
    made = [record for record in made if record.messages[0]["role"] != "system"]
    for record in made[:30]:
        renderer.render(record)
    count = 0
    inner = ChatTemplate.render

    def counted(*arguments, **options):
        nonlocal count
        count += 1
        return inner(*arguments, **options)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    for record in made[-100:]:
        renderer.render(record)
    turns = sum(len(record.messages) // 2 for record in made[-100:])
    assert count == (300 if name == "marked" else 100 + turns)  # with the prompt for each turn, or with the blocks


# Two templates whose text for training is the same whatever is said, but not the proof. Nothing else sees these.
UNSEEN = {
    "the next prompt turns on the question": CHATML.replace(
        "<|im_start|>assistant", "<|im_start|>{{ 'model' if 'fox' in messages[-1].content else 'assistant' }}"
    ),
    "the block turns on the answer": MARKED.replace(
        "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}",
        "{% if 'fox' in m.content %}{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
        "{% else %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% endif %}",
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_later_record_that_the_proof_does_not_hold_for_is_seen(name, huggingface_folder):
    tokenizer = load_tokenizer(huggingface_folder("byte-level", UNSEEN[name]))
    renderer = Renderer(tokenizer, False)
    for line in range(40):
        messages = [{"role": "user", "content": f"question {line}"}, {"role": "assistant", "content": "answer"}]
        assert renderer.render(Record(messages, str(line), "a.jsonl", line)).spans
    foxes = [{"role": role, "content": "a fox"} for role in ("user", "assistant")]
    assert tokenizer.template.render(foxes) == tokenizer.template.render(messages).replace(
        "question 39", "a fox"
    ).replace("answer", "a fox")
    with pytest.raises(ConversationError, match="cannot be proven"):
        renderer.render(Record(foxes, "x", "a.jsonl", 41))


def test_a_template_that_turns_on_later_text_is_still_seen(huggingface_folder):
    tokenizer = load_tokenizer(huggingface_folder("byte-level", TEMPLATES["looks at what is said"]))
    renderer, made = Renderer(tokenizer, False), records(200, plain=True)
    for record in made:
        renderer.render(record)
    for place in (0, 1):
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
        messages[place]["content"] = "a fox"
        whole = outcome(render_conversation, tokenizer, messages)
        assert outcome(renderer.render, Record(messages, "x", "a.jsonl", 1)) == whole
