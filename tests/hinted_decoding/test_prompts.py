"""The templates that show the reference, and where an analysis is cut."""

import hashlib

import pytest

from megatron_idft.corpus.verification.leaks import LeakFilter
from megatron_idft.errors import InputError
from megatron_idft.hinted_decoding.named_prompts import PACKAGED, named_prompt, packaged_prompt
from megatron_idft.hinted_decoding.prompts import HintTemplate

QUESTION = {"role": "user", "content": "What is 3 + 4?"}
CONVERSATION = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And times 3?"},
]
SOLUTION = "3 + 4 = \\boxed{7}"


@pytest.mark.parametrize("template", map(packaged_prompt, PACKAGED), ids=lambda template: template.name)
def test_the_packaged_templates_read_well(template):
    """One turn and several, with and without an answer: no loose ends of the template's own text."""
    for conversation in ([QUESTION], CONVERSATION):
        for solution, answer in ((SOLUTION, "7"), ("It is 7.", "7"), ("Hello!", None)):
            [message] = template.render(conversation, solution, answer)
            text = message["content"]
            assert message["role"] == "user" and conversation[-1]["content"] in text
            assert solution in text or (template.name == "answer-only" and answer)
            assert "{{" not in text and "{%" not in text and "\n\n\n" not in text and "\n " not in text
            assert text == text.strip() and not any(line != line.rstrip() for line in text.splitlines())
            assert answer is None or f"{answer}" in text.replace(solution, "", 1)
            if answer is None:
                assert "answer is" not in text and "final result" not in text
            assert ("\\boxed" in text.replace(solution, "", 1)) == (
                "\\boxed" in solution and template.name != "answer-only"
            )


@pytest.mark.parametrize(
    "template", [packaged_prompt("analysis"), packaged_prompt("hint")], ids=lambda template: template.name
)
def test_the_elaborate_templates_hold_question_reference_and_answer(template):
    [message] = template.render([QUESTION], SOLUTION, "7")
    text = message["content"]
    assert message["role"] == "user" and QUESTION["content"] in text and SOLUTION in text and "result: 7" in text
    assert (
        " End with the final result in \\boxed{}." in text
        and "\n End" not in text
        and "{{" not in text
        and "{%" not in text
    )
    [message] = template.render([QUESTION], "It is 7.", "7")
    assert "\\boxed" not in message["content"] and "in the form in which the reference gives it" in message["content"]
    [message] = template.render([QUESTION], "Hello!", None)
    assert "final result" not in message["content"] and "Its final" not in message["content"]


@pytest.mark.parametrize("template", map(packaged_prompt, PACKAGED), ids=lambda template: template.name)
def test_history_and_system_message(template):
    system = {"role": "system", "content": "Answer in French."}
    found_system, message = template.render([system, *CONVERSATION], "6", "6")
    assert found_system == system and "French" not in message["content"]
    for part in CONVERSATION:
        assert f"[{part['role']}]\n{part['content']}" in message["content"]


def test_the_analysis_template_asks_for_its_marker_alone_on_a_line_and_the_hint_has_none():
    assert packaged_prompt("analysis").marker == "# CoT" and packaged_prompt("analysis").after_marker == "\n\n"
    assert packaged_prompt("hint").marker is None
    assert LeakFilter().find("Now my reply.\n# CoT\n7") is not None  # a response that writes the marker again


def test_text_of_the_record_is_no_template():
    [message] = packaged_prompt("analysis").render([{"role": "user", "content": "{{ 6 * 7 }}"}], "{% if %}", None)
    assert "{{ 6 * 7 }}" in message["content"] and "{% if %}" in message["content"] and "42" not in message["content"]


def test_a_template_of_the_users(tmp_path):
    path = tmp_path / "analysis.txt"
    path.write_text('marker: ### Reply:\nafter-marker: "\\n\\n"\n---\n{{ question }}|{{ answer }} then ### Reply:\n')
    template = named_prompt(str(path))
    assert (template.marker, template.after_marker) == ("### Reply:", "\n\n")
    assert template.render(CONVERSATION, "x", "6") == [{"role": "user", "content": "And times 3?|6 then ### Reply:"}]
    assert template.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != packaged_prompt("analysis").sha256


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{{ question }} {{ answer }}", "no line `---`"),
        ("colour: red\n---\n{{ question }} {{ answer }}", "the header knows marker"),
        ("marker:\n---\n{{ question }} {{ answer }}", "has no value"),
        ("marker: X\nafter-marker: \\n\n---\n{{ question }} {{ answer }} X", "JSON text"),
        ("marker: X\n---\n{{ question }} {{ answer }}", "never asks for the marker"),
        ("marker: X\n---\n{{ question }} {{ anwser }} X", "unknown anwser"),
        ("marker: X\n---\n{{ question }} X", "solution or answer"),
        ("marker: X\n---\n{{ solution }} X", "question or conversation"),
        ("marker: X\n---\n{{ question }} {% if answer %} X", "not valid Jinja"),
    ],
)
def test_unusable_templates_are_refused_by_name(source, what):
    with pytest.raises(InputError, match=what) as error:
        HintTemplate("mine.txt", source)
    assert "mine.txt" in str(error.value)
