# ruff: noqa: E501 (a template reads best with one tag's text on one line)
"""The formats of public chat models, rewritten for these tests, with `{% generation %}` blocks where TRL marks them.

TRL 1.16 has a training template with such marks for each of these 28 names (and for three that take images only). The
layouts are theirs, and so is where a block begins and ends; the Jinja and the prompts about tools are ours.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

OPEN, CLOSE = "{%- generation %}", "{%- endgeneration %}"


def marked(*parts: str) -> str:
    return OPEN + "".join(parts) + CLOSE


def turns(assistant: str, others: str, prompt: str, *, before: str = "", after: str = "") -> str:
    """A template of one branch for the assistant's messages `m` and one for the others'."""
    return (
        f"{before}{{%- for m in messages %}}{{%- if m.role == 'assistant' %}}{assistant}{{%- else %}}{others}{{%- endif %}}"
        f"{{%- endfor %}}{{%- if add_generation_prompt %}}{prompt}{{%- endif %}}{after}"
    )


def when(condition: str, then: str, otherwise: str = "") -> str:
    return f"{{%- if {condition} %}}{then}{{%- else %}}{otherwise}{{%- endif %}}"


ALTERNATE = "{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list %}{%- for m in turns %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}{%- endfor %}"
# The last question: what Qwen and others take for the beginning of the present turn.
LAST_QUESTION = "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
# Reasoning of its own field, or between tags in the content.
THOUGHT = (
    "{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}{%- set answer = m.content %}"
    "{%- if not thought and '<think>' in answer and '</think>' in answer %}"
    "{%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{%- set answer = answer.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
)

# ChatML and Qwen

CHATML_HEADER, CHATML_END = "{{- '<|im_start|>assistant\n' }}", "{{- '<|im_end|>\n' }}"
CHATML_OTHERS = "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
# Results of tools are a user's message, several of them one.
CHATML_RESULTS = when(
    "m.role == 'tool'",
    "{%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}",
    CHATML_OTHERS,
)
SYSTEM_IS_OTHERS = (
    "{%- if tools %}{{- '<|im_start|>system\nTools: ' }}{{- tools | tojson }}{{- '<|im_end|>\n' }}{%- endif %}"
)
DEFAULT_SYSTEM = "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
JSON_CALLS = "{%- for call in m.tool_calls %}{%- if not loop.first or m.content %}{{- '\n' }}{%- endif %}{{- '<tool_call>\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}"
XML_CALLS = (
    "{%- for call in m.tool_calls %}{{- 'BEFORE<tool_call>\n<function=' + call.function.name + '>\n' }}"
    "{%- for name, value in call.function.arguments.items() %}{{- '<parameter=' + name + '>\n' }}{{- value }}{{- '\n</parameter>\n' }}{%- endfor %}"
    "{{- '</function>\n</tool_call>AFTER' }}{%- endfor %}"
)
QWEN_XML_CALLS = XML_CALLS.replace(
    "'BEFORE", "('' if loop.first and not answer | trim else '\n\n' if loop.first else '\n') + '"
).replace("AFTER", "")
THINK = "{{- '<think>\n' + thought + '\n</think>\n\n' + answer }}"
QUESTIONED = "{%- if not messages | selectattr('role', 'equalto', 'user') | list %}{{- raise_exception('no question') }}{%- endif %}"


def chatml(said: str, *, before: str = SYSTEM_IS_OTHERS, others: str = CHATML_RESULTS, prompt: str = "") -> str:
    """`said` is what the assistant's block holds up to its end."""
    return turns(CHATML_HEADER + marked(said, CHATML_END), others, CHATML_HEADER + prompt, before=before)


def qwen3(calls: str, *, edits: bool, prompt: str = "") -> str:
    """edits: reasoning of turns before the last question is left out, tags and all, as the models' own template does."""
    said = when("loop.index0 > ns.last", THINK, "{{- answer }}") if edits else THINK
    return chatml(THOUGHT + said + calls, before=QUESTIONED + LAST_QUESTION + SYSTEM_IS_OTHERS, prompt=prompt)


THINKS, THINKS_NOT = "{{- '<think>\n' }}", "{{- '<think>\n\n</think>\n\n' }}"
QWEN35_THINK = when("enable_thinking is defined and not enable_thinking", THINKS_NOT, THINKS)
QWEN35_NOTHINK = when("enable_thinking is defined and enable_thinking", THINKS, THINKS_NOT)
# In Qwen2.5's block stands the header's newline.
QWEN25 = turns(
    "{{- '<|im_start|>assistant' }}" + marked("{{- '\n' + m.content }}", JSON_CALLS, CHATML_END),
    CHATML_RESULTS, CHATML_HEADER, before=DEFAULT_SYSTEM + SYSTEM_IS_OTHERS,
)  # fmt: skip


def nemotron(before_answer: str, after_thought: str) -> str:
    """Reasoning before the last question is left out, and stands empty where there is none."""
    said = (
        "{%- if m.reasoning_content is string and m.reasoning_content and loop.index0 > ns.last %}"
        f"{{{{- '<think>\n' + m.reasoning_content + '{after_thought}</think>{before_answer}' }}}}"
        f"{{%- else %}}{{{{- '<think></think>' + ('{before_answer}' if m.reasoning_content else '') }}}}{{%- endif %}}{{{{- m.content }}}}"
    )
    calls = "{%- if m.tool_calls %}{{- '\n' }}{%- endif %}" + XML_CALLS.replace("BEFORE", "").replace("AFTER", "\n")
    prompt = when("enable_thinking is defined and not enable_thinking", "{{- '<think></think>' }}", THINKS)
    return chatml(said + calls, before=LAST_QUESTION + SYSTEM_IS_OTHERS, prompt=prompt)


LFM2_SYSTEM = "{{- bos_token }}" + SYSTEM_IS_OTHERS
LFM2_OTHERS = when(
    "m.role == 'tool'",
    "{{- '<|im_start|>tool\n<|tool_response_start|>' + m.content + '<|tool_response_end|><|im_end|>\n' }}",
    CHATML_OTHERS,
)
LFM2_CALLS = (
    "{%- if m.tool_calls %}{{- '<|tool_call_start|>[' }}{%- for call in m.tool_calls %}{{- call.function.name + '(' }}"
    "{%- for name, value in call.function.arguments.items() %}{{- name + '=' }}{{- value | tojson }}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}"
    "{{- ')' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ']<|tool_call_end|>' }}{%- endif %}"
)

# Others

LLAMA3 = turns(
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}" + marked("{{- m.content | trim + '<|eot_id|>' }}"),
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}",
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    before="{{- bos_token }}",
)
GEMMA_TURNS = turns(
    "{{- '<start_of_turn>model\n' }}" + marked("{{- m.content | trim + '<end_of_turn>\n' }}"),
    "{%- if m.role == 'user' %}{{- '<start_of_turn>user\n' + FIRST + m.content | trim + '<end_of_turn>\n' }}{%- endif %}",
    "{{- '<start_of_turn>model\n' }}",
    before="{{- bos_token }}" + ALTERNATE,
)
GEMMA = GEMMA_TURNS.replace("FIRST + ", "").replace(
    "{{- bos_token }}",
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}",
)
# A system message is the beginning of the first question.
GEMMA3 = GEMMA_TURNS.replace(
    "FIRST", "(messages[0].content + '\n\n' if loop.index0 == 1 and messages[0].role == 'system' else '')"
)


def phi3(system: str) -> str:
    """A second block for the EOS behind the last answer."""
    eos = (
        "{%- if not add_generation_prompt %}"
        + when("messages[-1].role == 'assistant'", marked("{{- eos_token }}"), "{{- eos_token }}")
        + "{%- endif %}"
    )
    return turns(
        "{{- '<|assistant|>\n' }}" + marked("{{- m.content + '<|end|>\n' }}"),
        when(system, "{{- '<|system|>\n' + m.content + '<|end|>\n' }}", "{%- if m.role == 'user' %}{{- '<|user|>\n' + m.content + '<|end|>\n' }}{%- endif %}"),
        "{{- '<|assistant|>\n' }}", after=eos,
    )  # fmt: skip


def cohere(assistant: str, content: str, end: str, prompt: str) -> str:
    return turns(
        "{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>" + assistant + "' }}" + marked("{{- " + content + " + '" + end + "<|END_OF_TURN_TOKEN|>' }}"),
        "{{- '<|START_OF_TURN_TOKEN|><|' + m.role | upper + '_TOKEN|>' + " + content + " + '<|END_OF_TURN_TOKEN|>' }}",
        "{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>" + prompt + "' }}", before="{{- bos_token }}" + ALTERNATE,
    )  # fmt: skip


def deepseek(content: str) -> str:
    """The header stands in the block; the prompt opens the reasoning, which answers do not."""
    return turns(
        marked("{{- '<｜Assistant｜>' + " + content + " + '<｜end▁of▁sentence｜>' }}"),
        "{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}{%- endif %}",
        "{{- '<｜Assistant｜><think>\n' }}",
        before="{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content }}{%- endif %}{%- endfor %}",
    )


# A block for each part of a turn. Results of tools stand in the model's turn, before the content of its message.
DIFFUSION_GEMMA = turns(
    "{{- '<|turn>model\n' }}"
    + when("m.reasoning_content and loop.index0 > ns.last", marked("{{- '<|channel>thought\n' + m.reasoning_content + '\n<channel|>' }}"))
    + "{%- set place = loop.index0 %}{%- set results = namespace(open=true) %}{%- if m.tool_calls %}"
    + marked(
        "{%- for call in m.tool_calls %}{{- '<|tool_call>call:' + call.function.name + '{' }}"
        "{%- for name, value in call.function.arguments.items() %}{{- name + ':<|\"|>' }}{{- value }}{{- '<|\"|>' }}{%- if not loop.last %}{{- ',' }}{%- endif %}{%- endfor %}{{- '}<tool_call|>' }}{%- endfor %}"
    )
    + "{%- for r in messages[place + 1:] %}{%- if r.role != 'tool' %}{%- set results.open = false %}{%- elif results.open %}"
    "{{- '<|tool_response>response:' + r.name + '{value:<|\"|>' + r.content + '<|\"|>}<tool_response|>' }}{%- endif %}{%- endfor %}{%- endif %}"
    + marked("{{- m.content | trim }}") + when("not m.tool_calls", marked("{{- '<turn|>\n' }}")),
    "{%- if m.role != 'tool' %}{{- '<|turn>' + m.role + '\n' + m.content | trim + '<turn|>\n' }}{%- endif %}",
    "{%- if messages[-1].role != 'tool' %}{{- '<|turn>model\n' }}{%- endif %}",
    before=LAST_QUESTION + "{{- bos_token }}{%- if tools %}{{- '<|turn>system\n<|tool>' }}{{- tools | tojson }}{{- '<tool|><turn|>\n' }}{%- endif %}",
)  # fmt: skip

GLM_NEXT = "{%- if m.tool_calls %}{{- '<|observation|>' }}{%- elif loop.last %}{{- '<|user|>' }}{%- elif loop.nextitem.role == 'system' %}{{- '<|system|>' }}{%- else %}{{- '<|user|>' }}{%- endif %}"
GLM_SAID = (
    THOUGHT + "{{- '\n<think>' + (thought if loop.index0 > ns.last else '') + '</think>' }}{%- if answer.strip() %}{{- '\n' + answer.strip() }}{%- endif %}"
    "{%- for call in m.tool_calls %}{{- '\n<tool_call>' + call.function.name + '\n' }}{%- for name, value in call.function.arguments.items() %}"
    "{{- '<arg_key>' + name + '</arg_key>\n<arg_value>' }}{{- value }}{{- '</arg_value>\n' }}{%- endfor %}{{- '</tool_call>' }}{%- endfor %}"
)  # fmt: skip
GLM_BEFORE = "[gMASK]<sop>" + LAST_QUESTION + "{%- if tools %}{{- '<|system|>\n' }}{{- tools | tojson }}{%- endif %}"
GLM_ROLE = "{%- if m.role == 'tool' %}{{- '<|observation|>' }}{%- else %}{{- '<|' + m.role + '|>' }}{%- endif %}"
GLM_TEXT = when(
    "m.role == 'tool'", "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}", "{{- '\n' + m.content }}"
)
# TRL moves the role of the next message, at which the model stops, into the block.
GLM45 = turns(
    "{{- '<|assistant|>' }}" + marked(GLM_SAID, GLM_NEXT),
    "{%- if loop.first or loop.previtem.role != 'assistant' %}" + GLM_ROLE + "{%- endif %}" + GLM_TEXT,
    "{{- '<|assistant|>' }}", before=GLM_BEFORE,
)  # fmt: skip
GLM45_ORIGINAL = turns(
    "{{- '<|assistant|>' }}" + GLM_SAID, GLM_ROLE + GLM_TEXT, "{{- '<|assistant|>' }}", before=GLM_BEFORE
)

GPTOSS = turns(
    marked(
        "{%- if m.tool_calls %}{{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' }}{{- m.tool_calls[0].function.arguments | tojson }}{{- '<|call|>' }}"
        "{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}{%- endif %}"
    ),
    when("m.role == 'tool'", "{{- '<|start|>functions.' + m.name + ' to=assistant<|channel|>commentary<|message|>' }}{{- m.content | tojson }}{{- '<|end|>' }}", "{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"),
    "{{- '<|start|>assistant' }}", before="{%- if tools %}{{- '<|start|>developer<|message|>' }}{{- tools | tojson }}{{- '<|end|>' }}{%- endif %}",
)  # fmt: skip

MUSE_CALL = (
    "{{- '<|start|>assistant to=' + call.function.name + '<|message|><atem:invoke name=\"' + call.function.name + '\">\n' }}{%- for name, value in call.function.arguments.items() %}"
    "{{- '<atem:parameter name=\"' + name + '\">' }}{{- value }}{{- '</atem:parameter>\n' }}{%- endfor %}{{- '</atem:invoke>' + ('<|eot|>' if loop.last else '<|eom|>') }}"
)
MUSE = turns(
    marked(
        "{%- if m.reasoning_content %}{{- '<|start|>assistant to=self<|message|>' + m.reasoning_content + '<|eom|>' }}{%- endif %}"
        "{%- if m.content or not m.tool_calls %}{{- '<|start|>assistant to=user<|message|>' + m.content + ('<|eom|>' if m.tool_calls else '<|eot|>') }}{%- endif %}"
        "{%- for call in m.tool_calls %}" + MUSE_CALL + "{%- endfor %}"
    ),
    "{{- '<|start|>' + m.role + (' ' + m.name if m.role == 'tool' else '') + '<|message|>' + m.content + '<|eot|>' }}",
    "{{- '<|start|>assistant' }}", before="{{- bos_token }}{%- if tools %}{{- '<|start|>system<|message|>' }}{{- tools | tojson }}{{- '<|eot|>' }}{%- endif %}",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A format, and how our mask differs from TRL's marks.

    fields: what it writes of "system", "tools" and "reasoning"; a conversation with others of them is refused.
    before, after: what TRL trains around our spans: one of `before`, which inference writes for the model, and `after`,
        which stands behind the token that ends the turn.
    original: the models' own template, where TRL's says something else. It leaves out the reasoning of earlier turns,
        GLM's the role of the next message at the end.
    unproven: conversations that are refused without marks, and why.
    """

    template: str
    fields: str = "system"
    before: tuple[str, ...] = ("",)
    after: str = ""
    eos: str = "</s>"
    original: str = ""
    unproven: Mapping[str, str] = field(default_factory=dict)

    def unmarked(self) -> str:
        return re.sub(r"\{%- (end)?generation %\}", "", self.template)


ALL = "system tools reasoning"
# What the generation prompt of a model that thinks writes, or is told to write for one that does not.
QWEN35 = ("<think>\n",)
QWEN35_OFF = ("<think>\n\n</think>\n\n", "<think>\n")
NEMOTRON = ("<think>\n", "<think></think>")
DEEPSEEK = ("<｜Assistant｜>", "<｜Assistant｜><think>\n"), "", "<｜end▁of▁sentence｜>"
NO_THOUGHT = dict.fromkeys(("plain", "system"), "the model is asked for reasoning, and the answer begins without")
NO_PROMPT = dict.fromkeys(
    ("tools", "tools, reasoning", "ends with tools"), "no generation prompt asks for an answer to results"
)

FAMILIES = {
    "qwen2_5": Family(QWEN25, "system tools", before=("\n",), after="\n"),
    "qwen2_5_vl": Family(chatml("{{- m.content }}", before=DEFAULT_SYSTEM, others=CHATML_OTHERS), after="\n"),
    "qwen3": Family(qwen3(JSON_CALLS, edits=False), ALL, after="\n", original=qwen3(JSON_CALLS, edits=True)),
    "qwen3_instruct_2507": Family(chatml("{{- m.content }}" + JSON_CALLS), "system tools", after="\n"),
    "qwen3_vl": Family(chatml("{{- m.content }}" + JSON_CALLS, before=SYSTEM_IS_OTHERS + QUESTIONED), "system tools", after="\n"),
    "qwen3_5_think": Family(
        qwen3(QWEN_XML_CALLS, edits=False, prompt=QWEN35_THINK), ALL, QWEN35, "\n",
        original=qwen3(QWEN_XML_CALLS, edits=True, prompt=QWEN35_THINK),
    ),
    "qwen3_5_nothink": Family(
        qwen3(QWEN_XML_CALLS, edits=False, prompt=QWEN35_NOTHINK), ALL, QWEN35_OFF, "\n",
        original=qwen3(QWEN_XML_CALLS, edits=True, prompt=QWEN35_NOTHINK),
    ),
    "qwen3_6": Family(
        qwen3(QWEN_XML_CALLS, edits=False, prompt=QWEN35_THINK), ALL, QWEN35, "\n",
        original=qwen3(QWEN_XML_CALLS, edits=True, prompt=QWEN35_THINK),
    ),
    "qwen3_8": Family(
        "{{- '<|im_start|>system\nReasoning effort: high.<|im_end|>\n' }}" + qwen3(QWEN_XML_CALLS, edits=False, prompt=QWEN35_THINK),
        ALL, QWEN35, "\n",
    ),
    "nemotron_3_nano": Family(nemotron("\n", "\n"), ALL, NEMOTRON, "\n"),
    "nemotron_3_super": Family(nemotron("\n", "\n"), ALL, NEMOTRON, "\n"),
    "nemotron_3_ultra": Family(nemotron("", ""), ALL, NEMOTRON, "\n"),
    "nemotron_3_5_lightning": Family(nemotron("", ""), ALL, NEMOTRON, "\n"),
    "lfm2": Family(chatml("{{- m.content }}", before=LFM2_SYSTEM, others=LFM2_OTHERS), after="\n"),
    "lfm2_v2": Family(chatml("{{- m.content }}" + LFM2_CALLS, before=LFM2_SYSTEM, others=LFM2_OTHERS), "system tools", after="\n"),
    "llama3": Family(LLAMA3),
    "gemma": Family(GEMMA, "", after="\n"),
    "gemma3": Family(GEMMA3, after="\n"),
    "phi3": Family(phi3("m.role == 'system'"), after="\n", eos="<|endoftext|>"),
    "phi3_5": Family(phi3("m.role == 'system' and m.content"), after="\n", eos="<|endoftext|>"),
    "cohere": Family(cohere("", "m.content | trim", "", "")),
    "cohere2": Family(cohere("<|START_RESPONSE|>", "m.content", "<|END_RESPONSE|>", "<|START_RESPONSE|>")),
    "deepseekv3": Family(deepseek("m.content.split('</think>')[-1]"), "system", *DEEPSEEK, unproven={**NO_THOUGHT, "tags": NO_THOUGHT["plain"]}),
    "deepseek_r1_distill": Family(deepseek("m.content"), "system", *DEEPSEEK, unproven=NO_THOUGHT),
    "diffusion_gemma": Family(DIFFUSION_GEMMA, ALL, after="\n", unproven=NO_PROMPT),
    "glm4moe": Family(GLM45, ALL, original=GLM45_ORIGINAL),
    "gptoss": Family(GPTOSS, "system tools", before=("<|start|>assistant",)),
    "muse_glimmer": Family(MUSE, ALL, before=("<|start|>assistant",)),
}  # fmt: skip
