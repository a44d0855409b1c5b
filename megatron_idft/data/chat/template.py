"""Chat templates: Jinja in the dialect of Hugging Face, rendered in a sandbox, the same for every tokenizer."""

import datetime
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_idft.corpus.messages import Message
from megatron_idft.data.chat.tokenizer_files import read_text
from megatron_idft.errors import ConversationError, EndlessTemplateError, TemplateError

BUILTIN_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # The blank before an answer belongs to the answer: sentencepiece pieces carry their blank in front.
    "plain": (
        "{% for message in messages %}"
        "{{ message.role | capitalize }}: {{ message.content }}"
        "{{ eos_token if message.role == 'assistant' else '' }}\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}

QUESTION: list[Message] = [{"role": "user", "content": "Xquestion"}]

# Private-use characters, so that no honest text holds them; a text that does is refused before they are looked for.
_OPEN, _CLOSE = "\ue0f0\ue0f2\ue0f1", "\ue0f0\ue0f3\ue0f1"


# Limits of one rendering: beyond them a template is taken for one that never ends.
MAX_LOOP_STEPS = 10_000_000  # 600 messages that each look at all messages take 360,000
MAX_CHARACTERS = 1 << 28
_MAX_INDENT = 64
_SHOWN = 500  # characters of what a failing template says


class _Environment(ImmutableSandboxedEnvironment):
    generation_blocks = 0  # how many the compiled template has
    mark_generation = False
    loop_steps = 0  # of the rendering that is under way
    intercepted_binops = frozenset({"*", "**"})  # nor are they computed while the template is compiled

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The template with its loops counted: Python lets nobody stop one from outside."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Products and powers, unless they are huge."""
        if isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() * right if operator == "**" else 0
        else:
            sizes = [
                each if isinstance(each, int) else len(each) for each in (left, right) if not isinstance(each, float)
            ]
            size = math.prod(sizes) if operator == "*" and len(sizes) == 2 else 0
        if size > MAX_CHARACTERS:
            raise EndlessTemplateError(f"it computes something of {size:,} letters or bits")
        return super().call_binop(context, operator, left, right)


@jinja2.pass_environment
def _counted(environment: _Environment, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        environment.loop_steps += 1
        if environment.loop_steps > MAX_LOOP_STEPS:
            raise EndlessTemplateError(f"its loops take more than {MAX_LOOP_STEPS:,} steps for one conversation")
        yield item


class _GenerationBlocks(Extension):
    """`{% generation %} … {% endgeneration %}`: what the assistant generates. Marked in the text when asked for."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)
    environment: _Environment

    def parse(self, parser: Parser) -> nodes.Node:
        self.environment.generation_blocks += 1
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

    def _block(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}" if self.environment.mark_generation else caller()


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text.
        variables: given to it besides `messages`, `tools` and `add_generation_prompt`, such as `bos_token`.
        date: `strftime_now` returns its parts. Without it the function is undefined, so that templates fall back to
            their fixed date or fail: the tokens of a corpus must not depend on the day it is read.

    Raises:
        TemplateError: `source` is not valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None, date: datetime.date | None = None):
        self.source, self.variables, self.date = source, dict(variables or {}), date
        self._env = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols])
        self._env.filters |= {"tojson": _tojson, "_counted": _counted}
        del self._env.globals["lipsum"]  # writes random text
        self._env.globals["raise_exception"] = _raise_exception
        if date is not None:
            self._env.globals["strftime_now"] = date.strftime
        try:
            self._template = self._env.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template is not valid Jinja: {error.message} (line {error.lineno})"
            ) from error
        except Exception as error:  # nested too deep for Jinja or for Python, constants that cannot be computed, …
            what = f"{type(error).__name__}: {error}"[:_SHOWN]
            raise TemplateError(f"the chat template cannot be compiled: {what}") from error
        self._template.globals = dict(self._template.globals)  # Jinja's chain of maps is read whole at each rendering
        self._prompts: dict[bool | None, str] = {}

    @property
    def has_generation_blocks(self) -> bool:
        return self._env.generation_blocks > 0

    def render(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> str:
        """The conversation as text.

        Args:
            messages: of the conversation.
            add_generation_prompt: end with the beginning of an answer.
            tools: the functions that the assistant may call.
            thinking: `enable_thinking`, by which templates open or close the model's reasoning; None: not defined.

        Raises:
            ConversationError: the template rejects the conversation.
            TemplateError: the template fails.
        """
        variables = dict(self.variables, messages=messages, add_generation_prompt=add_generation_prompt, tools=tools)
        if thinking is not None:
            variables["enable_thinking"] = thinking
        try:
            return self._write(variables)
        except _RejectedError as error:
            raise ConversationError(f"the chat template rejects it: {str(error.message)[:_SHOWN]}") from error
        except EndlessTemplateError as error:
            raise EndlessTemplateError(f"the chat template does not end: {error}") from None
        except Exception as error:  # whatever a foreign template may raise
            hint = (
                "; give the date that it asks for with --sft-template-date YYYY-MM-DD"
                if "strftime_now" in str(error)
                else ""
            )
            what = f"{type(error).__name__}: {error}"[:_SHOWN]
            raise TemplateError(f"the chat template failed: {what}{hint}") from error

    def generation_prompt(self, thinking: bool | None = None) -> str:
        """The text that `add_generation_prompt` appends to a question; empty where the template rejects a lone one."""
        if thinking not in self._prompts:
            try:
                without = self.render(QUESTION, thinking=thinking)
                prompt = self.render(QUESTION, add_generation_prompt=True, thinking=thinking).removeprefix(without)
            except ConversationError:  # a template that wants a system message, say
                prompt = ""
            self._prompts[thinking] = prompt
        return self._prompts[thinking]

    def first_header(self) -> str:
        """The beginning of a conversation, up to the words of its first question."""
        try:
            return self.render(QUESTION).partition(str(QUESTION[0]["content"]))[0]
        except ConversationError:
            return ""

    def _write(self, variables: dict[str, Any]) -> str:
        self._env.loop_steps, left = 0, MAX_CHARACTERS
        parts = []
        for part in self._template.root_render_func(self._template.new_context(variables)):
            parts.append(part)
            left -= len(part)
            if left < 0:
                raise EndlessTemplateError(f"it writes more than {MAX_CHARACTERS:,} characters for one conversation")
        return "".join(parts)

    def render_marked(
        self, messages: list[Message], *, tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the [start, end) characters of each generation block in it."""
        plain = self.render(messages, tools=tools)
        if _OPEN in plain or _CLOSE in plain:
            raise ConversationError("holds the private-use characters that mark generation blocks")
        self._env.mark_generation = True
        try:
            marked = self.render(messages, tools=tools)
        finally:
            self._env.mark_generation = False
        text, spans, start = "", [], None
        for part in re.split(f"({_OPEN}|{_CLOSE})", marked):
            if part == _OPEN:
                if start is not None:
                    raise TemplateError("the chat template nests {% generation %} blocks")
                start = len(text)
            elif part == _CLOSE and start is not None:
                spans.append((start, len(text)))
                start = None
            else:
                text += part
        if text != plain or start is not None:
            raise TemplateError("the chat template edits the output of a {% generation %} block after the block")
        return text, spans


def read_template(name_or_path: str) -> str:
    """The source of a built-in template, by name, or of a Jinja file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if name_or_path in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[name_or_path]
    if not Path(name_or_path).is_file():
        names = ", ".join(BUILTIN_TEMPLATES)
        raise FileNotFoundError(f"chat template {name_or_path!r} is neither a file nor built in ({names})")
    return read_text(Path(name_or_path))


class _RejectedError(jinja2.TemplateError):
    """Raised by `raise_exception`: the template's author says that the conversation is malformed."""


def _raise_exception(message: str) -> None:
    raise _RejectedError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML.
    if isinstance(indent, int) and indent > _MAX_INDENT:
        raise ValueError(f"tojson(indent={indent}): more than {_MAX_INDENT} blanks are not served")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
