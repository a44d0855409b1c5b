"""Chat templates that never end, or that Python cannot compile: each is refused, in time and in one line."""

import time

import pytest

from megatron_idft.data.chat import template_trial
from megatron_idft.data.chat.template import ChatTemplate
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.errors import EndlessTemplateError, TemplateError, UserError
from tests.data.chat_templates import CHATML

LOOPS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}X{% endfor %}" + "{% endfor %}" * 2
)
GROWS = "{% set ns = namespace(t='x') %}{% for i in range(90) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"
# Template (CHATML is written behind it), words of the refusal.
ENDLESS = {
    "loops that write": (LOOPS, "does not end"),
    "loops that write nothing": (LOOPS.replace("X", "{% set x = 1 %}"), "does not end"),
    "a macro that calls itself twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "timed out",
    ),
    "a text that doubles": (GROWS + "{{ ns.t }}", "ran out of memory|timed out"),
    "random text": ("{{ lipsum(n=10**9) }}", "lipsum"),
    "indented JSON": ("{{ messages | tojson(indent=10**9) }}", "tojson"),
    "a product of text": ("{{ 'x' * 10**11 }}", "does not end"),
    "a product that nobody asks for": ("{% if messages | length > 10**6 %}{{ 10**11 * 'x' }}{% endif %}", None),
    "a power": ("{{ 9 ** (9 ** 9) }}", "does not end"),
    "blanks": ("{{ 'x' | center(10**11) }}", "memory|MemoryError|failed"),
    "a format": ("{{ '%99999999999d' % 1 }}", "memory|MemoryError|failed"),
}  # fmt: skip


@pytest.fixture
def short_trials(monkeypatch):
    monkeypatch.setattr(template_trial, "SECONDS", 1.5)
    monkeypatch.setattr(template_trial, "_TRIALS", template_trial._Trials())
    template_trial._trial.cache_clear()


@pytest.mark.parametrize("name", ENDLESS)
def test_what_does_not_end_is_refused(sentencepiece_model, tmp_path, short_trials, name):
    source, words = ENDLESS[name]
    file = tmp_path / "chat.jinja"
    file.write_text(source + CHATML)
    begin = time.monotonic()
    if words is None:
        load_tokenizer(sentencepiece_model, chat_template=str(file)).template.render([])
    else:
        with pytest.raises(TemplateError, match=words) as caught:
            load_tokenizer(sentencepiece_model, chat_template=str(file)).template.render([])
        assert len(str(caught.value)) < 1000
    assert time.monotonic() - begin < 30


NOT_COMPILED = {
    "nested too deep for Python": "{% for a in b %}" * 60 + "{% endfor %}" * 60,
    "nested too deep for Jinja": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists in lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "not Jinja": "{% for %}",
    "an unknown filter": "{{ 1 | nothing }}",
    "an unknown block": "{% include 'other' %}{% endnothing %}",
    "names that are no Python": "{% set True = 1 %}",
}


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_what_does_not_compile_is_refused(sentencepiece_model, tmp_path, name):
    file = tmp_path / "chat.jinja"
    file.write_text(NOT_COMPILED[name] + CHATML)
    with pytest.raises(UserError, match="chat template") as caught:
        load_tokenizer(sentencepiece_model, chat_template=str(file)).template.render([])
    assert len(str(caught.value)) < 1000


def test_a_template_that_runs_wild_later_meets_a_limit(monkeypatch):
    monkeypatch.setattr("megatron_idft.data.chat.template.MAX_LOOP_STEPS", 100_000)
    template = ChatTemplate("{% if messages | length > 5 %}" + LOOPS.replace("X", "{% set x = 1 %}") + "{% endif %}")
    messages = [{"role": "user", "content": "x"}] * 5
    for _ in range(3):
        assert template.render(messages) == ""
    with pytest.raises(EndlessTemplateError, match="its loops take more than 100,000 steps for one conversation"):
        template.render([*messages, *messages])
    assert template.render(messages) == ""


def test_counted_loops_are_loops():
    """Whatever a loop knows of itself, it knows still."""
    template = ChatTemplate(
        "{% for a, b in pairs %}{{ loop.index }}/{{ loop.length }}{{ a }}{{ b }}{{ loop.first }}{{ loop.last }}"
        "{{ loop.revindex }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('x', 'y') }}{{ loop.changed(a) }};"
        "{% else %}none{% endfor %}"
        "{% for x in [1, 2, 3, 4] if x is even %}{{ x }}{% if loop.last %}!{% endif %}{% endfor %}"
        "{% for x in nothing %}{% else %}nothing{% endfor %}"
        "{% for x in tree recursive %}{{ x.n }}{% if x.of %}({{ loop(x.of) }}){% endif %}{% endfor %}"
        "{% for k in {'a': 1} %}{{ k }}{% endfor %}{% for c in 'xyz' %}{% if c == 'y' %}{% continue %}{% endif %}"
        "{{ c }}{% endfor %}{{ 3 * 4 }}{{ 2 ** 3 }}{{ 'ab' * 2 }}{{ 2 * 1.5 }}{{ [1] * 2 }}",
        {"pairs": [(1, "p"), (1, "q")], "tree": [{"n": 1, "of": [{"n": 2}]}]},
    )
    assert template.render([]) == (
        "1/21pTrueFalse2(1, 'q')xTrue;2/21qFalseTrue1(1, 'p')yFalse;24!nothing1(2)axz128abab3.0[1, 1]"
    )
