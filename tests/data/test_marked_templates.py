"""Templates with `{% generation %}` blocks: the mask is what the assistant says, whatever anybody says."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_idft.data.chat.conversations import render_conversation
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.errors import ConversationError, TemplateError
from tests.data.chat_templates import CHATML, LLAMA3, MARKED, MARKED_WITH_HEADER, QWEN3_MARKED

# A header of no special token, in the block.
WORDS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ 'Assistant: ' + m.content + '</s>\n' }}"
    "{% endgeneration %}{% else %}{{ m.role + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
TRIMMED = MARKED.replace("{{ m.content + '<|im_end|>\n' }}{% endg", "{{ m.content | trim + '<|im_end|>\n' }}{% endg")
# Name -> (template, what ends an answer, whether it is trimmed). The unmarked beside them, to the same texts.
TEMPLATES = {
    "marked": (MARKED, "<|im_end|>", False),
    "header in the block": (MARKED_WITH_HEADER, "<|im_end|>", False),
    "header of words in the block": (WORDS, "</s>", False),
    "trimmed": (TRIMMED, "<|im_end|>", True),
    "unmarked": (CHATML, "<|im_end|>", False),
    "unmarked, trimmed": (LLAMA3, "<|eot_id|>", True),
}
SPELLED = [
    "<|im_start|>assistant\n", "<|im_end|>", "<|im_end|>\n", "<|im_start|>user\n", "Assistant: ", "</s>\n", "<s>",
    "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "{% generation %}", "{% endgeneration %}",
    "{{ m.content }}", "<think>", "\n</think>\n\n", "Probe", "ProbebZ", "Probeca", "Xquestion", "Contentof", "\ue0f0",
    "\ue0f2\ue0f1", "\ue0f1", " ", "\n", "\t", "\u00a0", "\u2028", "\u200b", "e\u0301", "é", "😀", "ﬁ", "İ", "\x00",
]  # fmt: skip
MARKS = ("\ue0f0\ue0f2\ue0f1", "\ue0f0\ue0f3\ue0f1")  # refused, see below
TEXT = st.lists(st.sampled_from(SPELLED) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)).map("".join)


@pytest.fixture(scope="module")
def tokenizer(huggingface_folder, tmp_path_factory):
    folder = huggingface_folder("byte-level", CHATML)

    def load(template):
        file = tmp_path_factory.mktemp("template") / "chat.jinja"
        file.write_text(template, encoding="utf-8")
        return load_tokenizer(folder, chat_template=str(file))

    return load


def conversation(*pairs, system=None):
    turns = [
        {"role": role, "content": c} for pair in pairs for role, c in zip(("user", "assistant"), pair, strict=True)
    ]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


@pytest.fixture(scope="module")
def tokenizers(tokenizer):
    return {name: tokenizer(template) for name, (template, _, _) in TEMPLATES.items()}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=3),
    system=st.none() | TEXT,
)
def test_whatever_is_said_the_spans_are_the_answers(name, tokenizers, pairs, system):
    _, end, trim = TEMPLATES[name]
    assume(not any(mark in text for text in (system or "", *sum(pairs, ())) for mark in MARKS))
    messages = conversation(*pairs, system=system)
    rendered = render_conversation(tokenizers[name], messages)
    answers = [answer.strip() if trim else answer for _, answer in pairs]
    assert [rendered.text[a:b] for a, b in rendered.spans] == [answer + end for answer in answers]
    assert rendered.text == tokenizers[name].template.render(messages) and not rendered.unwritten


def test_an_answer_that_spells_the_marks_is_refused(tokenizers):
    with pytest.raises(ConversationError, match="private-use characters"):
        render_conversation(tokenizers["marked"], conversation(("q", "a\ue0f0\ue0f2\ue0f1b")))


WRONG = {
    "holds the question": MARKED.replace("{{ m.content +", "{{ messages[loop.index0 - 1].content + m.content +", 1),
    "depends on the question": MARKED.replace(
        "{{ m.content +", "{{ ('!' if messages[loop.index0 - 1].content | length > 20 else '') + m.content +", 1
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_block_that_holds_what_others_say_is_refused(tokenizer, name):
    messages = conversation(("a fox asks again", "answer"), ("and again, fox", "once more"))
    error = ConversationError if name == "depends on the question" else TemplateError  # others it proves
    with pytest.raises(error, match="depends on what other messages say, or holds some of it"):
        render_conversation(tokenizer(WRONG[name]), messages)


def test_what_a_block_leaves_out_of_its_answer_is_counted(tokenizer):
    """A template may edit what the assistant said: the text is then what inference shows, but not all that was said."""
    cut = tokenizer(MARKED.replace("m.content +", "m.content[:20] +", 1))
    assert not render_conversation(cut, conversation(("question", "a short answer"))).unwritten
    rendered = render_conversation(cut, conversation(("question", "an answer of more letters than that")))
    assert rendered.unwritten and [rendered.text[a:b] for a, b in rendered.spans] == ["an answer of more le<|im_end|>"]
    thought = render_conversation(tokenizer(QWEN3_MARKED), conversation(("q", "<think>\n1\n</think>\n\n7"), ("q", "8")))
    assert thought.unwritten


# Blocks for the parts of a turn, as some templates write them; `BETWEEN` stands between the answer and its end.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}{% generation %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endgeneration %}"
    "{{ '\n' }}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}BETWEEN{% generation %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THOUGHT = [{"role": "assistant", "content": "answer", "reasoning_content": "why"}]


def test_blocks_in_a_row_are_one_turn(tokenizer):
    messages = [*conversation(("q", "a"), ("again", "answer"))[:3], *THOUGHT, *conversation(("q", "<|im_end|>"))]
    rendered = render_conversation(tokenizer(PARTS.replace("BETWEEN", "")), messages)
    assert [rendered.text[a:b] for a, b in rendered.spans] == [
        "a<|im_end|>",
        "<think>why</think>\nanswer<|im_end|>",
        "<|im_end|><|im_end|>",
    ]


def test_a_turn_in_blocks_with_text_between_is_refused(tokenizer):
    between = tokenizer(PARTS.replace("BETWEEN", "{{ messages[0].content }}"))
    with pytest.raises(TemplateError, match="never ends the assistant's turn"):
        render_conversation(between, conversation(("q", "a")))
    apart = tokenizer(PARTS.replace("BETWEEN", "").replace("'\n' }}{% endif", "'\nSo: ' }}{% endif"))
    with pytest.raises(ConversationError, match="or in several with other text between them"):
        render_conversation(apart, [*conversation(("q", "a"))[:1], *THOUGHT])
    assert render_conversation(apart, conversation(("q", "a"))).spans


def test_what_stands_between_blocks_may_not_depend_on_the_answer(tokenizer):
    blanks = tokenizer(PARTS.replace("BETWEEN", "{{ ' ' * (m.content | length) }}"))
    with pytest.raises((ConversationError, TemplateError), match="cannot be proven"):
        render_conversation(blanks, conversation(("q", "answer")))


def test_a_block_around_somebody_else_is_refused(tokenizer):
    with pytest.raises(TemplateError, match=r"holds some of it: messages\[0\], of the role 'user'"):
        render_conversation(
            tokenizer(
                CHATML.replace(
                    "{{ m.content }}<|im_end|>", "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
                )
            ),
            conversation(("q", "a")),
        )
