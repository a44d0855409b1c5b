"""Tool calls and reasoning in the templates of the families: what is trained, against texts written by hand."""

import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_idft.data.chat.conversations import encode_conversation, render_conversation, tokenize
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.errors import ConversationError, TemplateError
from tests.data import tool_templates as templates
from tests.data.chat_templates import CHATML, GEMMA, LLAMA3, REFUSED
from tests.tiny_tokenizers import byte_level

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The sky.", "parameters": {}}}]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
RESULT = {"role": "tool", "content": '{"sky": "blue"}', "tool_call_id": "abcdefghi", "name": "weather"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content="", **fields):
    return {"role": "assistant", "content": content, **fields}


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [SYSTEM, user("Weather in Paris?"), assistant(tool_calls=[CALL]), RESULT, assistant("Blue sky.")]
THANKED = [*ASKED, user("Thanks!"), assistant("You are welcome.")]
THOUGHT = [
    *ASKED[:2],
    assistant(tool_calls=[CALL], reasoning_content="Ask the tool."),
    RESULT,
    assistant("Blue sky.", reasoning_content="The tool said so."),
]
THOUGHT_THANKED = [*THOUGHT, *THANKED[5:]]

QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
THOUGHT_TRAINED = [
    "<think>\nAsk the tool.\n</think>\n\n" + QWEN_CALL,
    "<think>\nThe tool said so.\n</think>\n\nBlue sky.<|im_end|>",
]
THINKING_IN_TEXT = ["3 + 4?", "<think>\n3, 4\n</think>\n\n7.", "And 1?", "<think>\n1\n</think>\n\n8."]
# (template, messages, what is trained of each assistant turn)
EXPECTED = {
    "qwen2.5": (templates.QWEN25, THANKED, [QWEN_CALL, "Blue sky.<|im_end|>", "You are welcome.<|im_end|>"]),
    "qwen2.5, content beside the call": (
        templates.QWEN25,
        [ASKED[1], assistant("Let me see.", tool_calls=[CALL, CALL]), RESULT, RESULT, assistant("Blue.")],
        ["Let me see.\n" + QWEN_CALL[:-10] + "\n" + QWEN_CALL, "Blue.<|im_end|>"],
    ),
    "qwen3, one question": (
        templates.QWEN3,
        THOUGHT,
        THOUGHT_TRAINED,
    ),
    "qwen3, earlier turns edited": (
        templates.QWEN3,
        THOUGHT_THANKED,
        [QWEN_CALL, "Blue sky.<|im_end|>", "<think>\n\n</think>\n\nYou are welcome.<|im_end|>"],
    ),
    "qwen3, reasoning in the content": (
        templates.QWEN3,
        [role(text) for role, text in zip([user, assistant] * 2, THINKING_IN_TEXT, strict=True)],
        ["7.<|im_end|>", "<think>\n1\n</think>\n\n8.<|im_end|>"],
    ),
    "qwen3, results as user messages": (
        templates.QWEN3,
        [*THOUGHT[:3], user("<tool_response>\nblue\n</tool_response>"), THOUGHT[4]],
        THOUGHT_TRAINED,
    ),
    "qwen3 not thinking": (
        templates.QWEN3_NOT_THINKING,
        THANKED,
        [QWEN_CALL, "Blue sky.<|im_end|>", "You are welcome.<|im_end|>"],
    ),
    "qwen3 always thinking": (
        templates.QWEN3_THINKING,
        THOUGHT,
        ["Ask the tool.\n</think>\n\n" + QWEN_CALL, "The tool said so.\n</think>\n\nBlue sky.<|im_end|>"],
    ),
    "qwen3 always thinking, earlier turns edited": (
        templates.QWEN3_THINKING,
        [*THOUGHT_THANKED[:-1], assistant("You are welcome.", reasoning_content="Polite.")],
        [QWEN_CALL, "Blue sky.<|im_end|>", "Polite.\n</think>\n\nYou are welcome.<|im_end|>"],
    ),
    "llama3.1": (
        templates.LLAMA31,
        THANKED,
        [
            '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
            "Blue sky.<|eot_id|>",
            "You are welcome.<|eot_id|>",
        ],
    ),
    "mistral": (
        templates.MISTRAL3,
        THANKED,
        [
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]</s>',
            " Blue sky.</s>",
            " You are welcome.</s>",
        ],
    ),
    "glm4": (
        templates.GLM4,
        THANKED,
        ['weather\n{"city": "Paris"}<|observation|>', "\nBlue sky.<|user|>", "\nYou are welcome.<|user|>"],
    ),
    "deepseek": (
        templates.DEEPSEEK,
        THANKED,
        [
            '<|tool_call_begin|>weather\n{"city": "Paris"}<|tool_call_end|>\n<|tool_calls_end|></s>',
            "Blue sky.</s>",
            "You are welcome.</s>",
        ],
    ),
}  # fmt: skip


SPECIAL = [
    "[TOOL_CALLS]", "[/TOOL_RESULTS]", "<|user|>", "<|assistant|>", "<|observation|>", "<|User|>", "<|Assistant|>",
    "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_calls_end|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made, folder, backend = {}, tmp_path_factory.mktemp("tokenizer"), byte_level()
    backend.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)

    def get(template):
        if template not in made:
            file = tmp_path_factory.mktemp("template") / "chat.jinja"
            file.write_text(template, encoding="utf-8")
            made[template] = load_tokenizer(folder, chat_template=str(file))
        return made[template]

    return get


def trained_texts(tokenizer, ids, mask):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [tokenizer.decode(ids[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("tools", [TOOLS, None])
@pytest.mark.parametrize("name", EXPECTED)
def test_what_the_assistant_says_is_trained(tokenizers, name, tools):
    template, messages, expected = EXPECTED[name]
    tokenizer = tokenizers(template)
    ids, mask = encode_conversation(tokenizer, messages, tools=tools)
    assert trained_texts(tokenizer, ids, mask) == expected
    rendered = tokenizer.template.render(messages, tools=tools)
    assert tokenizer.decode(ids) == rendered + ("<|user|>" if name == "glm4" else "")
    ends = np.flatnonzero(mask[:-1] & (1 - mask[1:]))
    assert all(int(i) in tokenizer.special_ids.values() for i in ids[[*ends, *([-1] if mask[-1] else [])]])


@pytest.mark.parametrize("name", EXPECTED)
def test_the_last_turn_alone(tokenizers, name):
    template, messages, expected = EXPECTED[name]
    tokenizer = tokenizers(template)
    ids, mask = encode_conversation(tokenizer, messages, tools=TOOLS, last_turn_only=True)
    assert trained_texts(tokenizer, ids, mask) == expected[-1:]
    whole, _ = encode_conversation(tokenizer, messages, tools=TOOLS)
    assert ids.tolist() == whole.tolist()


def test_turns_that_the_template_edits_are_told(tokenizers):
    tokenizer = tokenizers(templates.QWEN3)
    assert not render_conversation(tokenizer, THOUGHT).unwritten
    assert render_conversation(tokenizer, THOUGHT_THANKED).unwritten


def test_weights_of_turns(tokenizers):
    tokenizer = tokenizers(templates.QWEN25)
    messages = [dict(message) for message in THANKED]
    for i, loss in ((2, 0), (4, 0.25), (6, True)):
        messages[i]["loss"] = loss
    [encoded] = tokenize(tokenizer, [render_conversation(tokenizer, messages)])
    assert trained_texts(tokenizer, encoded.ids, encoded.mask) == ["Blue sky.<|im_end|>", "You are welcome.<|im_end|>"]
    assert encoded.weights.dtype == np.float32 and ((encoded.weights > 0) == encoded.mask).all()
    assert trained_texts(tokenizer, encoded.ids, encoded.weights == 0.25) == ["Blue sky.<|im_end|>"]
    assert trained_texts(tokenizer, encoded.ids, encoded.weights == 1) == ["You are welcome.<|im_end|>"]
    messages[4]["loss"] = False
    [encoded] = tokenize(tokenizer, [render_conversation(tokenizer, messages)])
    assert encoded.weights is None and trained_texts(tokenizer, encoded.ids, encoded.mask) == [
        "You are welcome.<|im_end|>"
    ]


def test_a_turn_that_is_not_trained_needs_no_proof(tokenizers):
    drops = "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}" + CHATML.split("%}", 1)[1].replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )
    tokenizer = tokenizers(drops)
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    with pytest.raises(TemplateError, match=r"messages\[1\]: nothing of it stands .*--sft-last-turn-only"):
        encode_conversation(tokenizer, messages)
    for options, conversation in (
        ({"last_turn_only": True}, messages),
        ({}, [user("a"), assistant("b", loss=0), *messages[2:]]),
    ):
        assert trained_texts(tokenizer, *encode_conversation(tokenizer, conversation, **options)) == ["d<|im_end|>"]


# Name -> (template, messages, tools, words of the refusal): each is the conversation's fault, and skipped when asked.
UNWRITTEN = {
    "no tools": (LLAMA3, [user("a"), assistant("b")], TOOLS, "does not write the record's `tools`"),
    "no tool calls": (CHATML, ASKED, None, r"messages\[2\]\.tool_calls stands nowhere"),
    "no tool calls, gemma": (GEMMA, ASKED[1:], None, r"messages\[1\]\.tool_calls stands nowhere"),
    "no reasoning": (
        CHATML,
        [user("a"), assistant("b", reasoning_content="c")],
        None,
        "reasoning_content stands nowhere",
    ),
    "no content beside calls": (
        templates.LLAMA31,
        [user("a"), assistant("b", tool_calls=[CALL])],
        None,
        "no content beside tool calls",
    ),
    "one call only": (
        templates.LLAMA31,
        [user("a"), assistant(tool_calls=[CALL, CALL])],
        None,
        "only single tool calls",
    ),
    "calls without ids": (
        templates.MISTRAL3,
        [user("a"), assistant(tool_calls=[{key: value for key, value in CALL.items() if key != "id"}])],
        None,
        "need nine letters",
    ),
}


@pytest.mark.parametrize("name", UNWRITTEN)
def test_what_the_template_would_leave_out_is_refused(tokenizers, name):
    template, messages, tools, words = UNWRITTEN[name]
    with pytest.raises(ConversationError, match=words):
        encode_conversation(tokenizers(template), messages, tools=tools)


def test_calls_that_are_context_must_be_written_too(tokenizers):
    with pytest.raises(ConversationError, match=r"messages\[2\]\.tool_calls stands nowhere in the conversation"):
        encode_conversation(tokenizers(CHATML), ASKED, last_turn_only=True)
    assert render_conversation(tokenizers(templates.QWEN3), THOUGHT_THANKED, last_turn_only=True).unwritten


ANOTHER_HEADER = "its generation prompt is another header"
# Name -> (template, what is replaced, by what, words of the refusal).
MUTATIONS = {
    "no end": (CHATML, "<|im_end|>", "", "never ends the assistant's turn"),
    "another header": (CHATML, "<|im_start|>assistant", "<|im_start|>Assistant", ANOTHER_HEADER),
    "no generation prompt": (templates.QWEN3, "{%- if add_", "{%- if false and add_", "ignores add_generation_prompt"),
    "upper case": (CHATML, "m.content", "m.content | upper", "stands nowhere"),
    "the answer twice": (CHATML, "{{ m.content }}", "{{ m.content }}{{ m.content }}", "more than once"),
    "the question inside the answer": (
        CHATML,
        "{{ m.content }}",
        "{{ m.content }}{% if m.role == 'assistant' %} to: {{ messages[loop.index0 - 1].content }}{% endif %}",
        "depends on what other messages say",
    ),
    "the answer's length before it": (
        CHATML,
        "{% for",
        "{% if messages[1] %}{{ messages[1].content | length }}{% endif %}{% for",
        "depends on what the assistant says",
    ),
    "the answer's length behind it": (
        CHATML,
        "{% if add_",
        "{% if messages[1] %}{{ messages[1].content | length }}{% endif %}{% if add_",
        "depends on the answer",
    ),
    "an end that depends on the answer": (
        CHATML,
        "<|im_end|>",
        "{{ '</s>' if 'Probe' in m.content else '<|im_end|>' }}",
        "depends on the answer",
    ),
    "an editing template without the header in its prompt": (
        templates.QWEN3,
        "{{- '<|im_start|>assistant\n' }}",
        "",
        "ignores add_generation_prompt",
    ),
    "an editing template with another header": (
        templates.QWEN3,
        "{{- '<|im_start|>assistant\n' }}",
        "{{- '<|im_start|>Assistant\n' }}",
        ANOTHER_HEADER,
    ),
    "a last turn asked for otherwise": (
        templates.QWEN25,
        "{{- '<|im_start|>assistant\n' }}",
        "{{- '<|im_start|>assistant\n<think>\n' }}",
        ANOTHER_HEADER,
    ),
    "reasoning behind the next message": (
        CHATML,
        "{{ m.content }}",
        "{{ m.content }}{% if m.role == 'user' and loop.index > 1 %}{{ messages[1].reasoning_content }}{% endif %}",
        "reasoning_content stands nowhere",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_template_that_breaks_the_proof_is_refused(tokenizers, name):
    template, old, new, words = MUTATIONS[name]
    assert old in template
    mutated = tokenizers(template.replace(old, new))
    sane = [user("question"), assistant("answer"), user("again"), assistant("once more")]
    sane[1] |= {"reasoning_content": "thought"} if "reasoning" in name or template == templates.QWEN3 else {}
    with pytest.raises((TemplateError, ConversationError), match=words):
        encode_conversation(mutated, sane)
    if "reasoning" not in name:
        encode_conversation(tokenizers(template), sane)  # as it was


NAMES = st.text("abcxyz_", min_size=1, max_size=8)
WORDS = st.text("aéb 你{}\":,.'\n\\", max_size=12)
SAID = WORDS.filter(lambda text: text.strip())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | WORDS, lambda inner: st.lists(inner, max_size=2), max_leaves=4
)
CALLS = st.builds(
    lambda name, arguments: {**CALL, "function": {"name": name, "arguments": arguments}},
    NAMES,
    st.dictionaries(NAMES, VALUES, max_size=3),
)


@st.composite
def conversations(draw):
    """Questions, each answered at once or behind calls with results."""
    messages = [SYSTEM] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(WORDS)))
        for calls in draw(st.lists(st.lists(CALLS, min_size=1, max_size=2), max_size=2)):
            messages.append(assistant(draw(st.just("") | SAID), tool_calls=calls))
            messages += [{**RESULT, "content": draw(WORDS)} for _ in calls]
        messages.append(assistant(draw(SAID)))
    for message in messages:
        if message["role"] == "assistant" and draw(st.booleans()):
            message["reasoning_content"] = draw(SAID)
    return messages


def qwen3_turns(messages):
    """What QWEN3 writes of the assistant's turns, in Python."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        thought, text = message.get("reasoning_content", ""), message["content"]
        if i > last and (thought or i + 1 == len(messages)):
            stripped = thought.strip("\n")
            written = "<think>\n" + stripped + "\n</think>\n\n" + text.lstrip("\n")
        else:
            written = text
        for k, call in enumerate(message.get("tool_calls", [])):
            function = call["function"]
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            written += "\n" if k or text else ""
            written += f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
        yield written + "<|im_end|>"


def glm4_turns(messages):
    """What GLM4 writes of turns that are calls or texts, and the role that ends them."""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        following = messages[i + 1]["role"] if i + 1 < len(messages) else "user"
        calls = [
            f"{call['function']['name']}\n{json.dumps(call['function']['arguments'], ensure_ascii=False)}"
            for call in message.get("tool_calls", [])
        ]
        written = "<|assistant|>".join(calls) if calls else "\n" + message["content"]
        yield written + ("<|observation|>" if following == "tool" else "<|user|>")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations(), with_tools=st.booleans())
def test_any_conversation_with_tools_and_reasoning(tokenizers, messages, with_tools):
    """Whole texts: what is trained is what Python says, and what is not is the rest of the template's text."""
    tools = TOOLS if with_tools else None
    plain = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in messages]
    plain = [message | ({"content": ""} if message.get("tool_calls") else {}) for message in plain]
    cases = (templates.QWEN3, qwen3_turns, messages), (templates.GLM4, glm4_turns, plain)
    for template, turns, said in cases:
        tokenizer = tokenizers(template)
        rendered = render_conversation(tokenizer, said, tools=tools)
        assert [rendered.text[start:end] for start, end in rendered.spans] == list(turns(said))
        assert rendered.text.removesuffix("<|user|>") == tokenizer.template.render(said, tools=tools)
        [encoded] = tokenize(tokenizer, [rendered])
        if encoded.straddles == 0 and not re.search(r"[^\x00-\x7f]", rendered.text):
            outside, at = "", 0
            for start, end in rendered.spans:
                outside, at = outside + rendered.text[at:start], end
            assert tokenizer.decode(encoded.ids[encoded.mask == 0]) == outside + rendered.text[at:]


def test_a_template_that_proves_ordinary_conversations_makes_others_bad_records(tokenizers):
    tokenizer = tokenizers(templates.QWEN3_NOT_THINKING)
    ordinary = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert len(render_conversation(tokenizer, ordinary).spans) == 2
    thought = [*ordinary[:3], assistant("d", reasoning_content="because")]
    with pytest.raises(ConversationError, match="cannot be proven: before messages"):
        render_conversation(tokenizer, thought)
    with pytest.raises(TemplateError, match="never ends"):
        render_conversation(tokenizers(REFUSED["never ends"][0]), ordinary)
