# ruff: noqa: E501 (a template reads best with one tag's text on one line)
"""Chat templates with tools and reasoning in the formats that the model families publish, written for these tests."""

_QWEN_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    "{{- '# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
)
_QWEN_CALLS = (
    "{%- for call in m.tool_calls %}{%- set call = call.function if call.function else call %}"
    '{{- \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}"
    "{{- '}\n</tool_call>' }}{%- endfor %}"
)
_QWEN_RESULTS = (
    "{%- elif m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
)

QWEN25 = (
    _QWEN_TOOLS + "{%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls) %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}{{- '<|im_start|>' + m.role }}{%- if m.content %}{{- '\n' + m.content }}{%- endif %}"
    + _QWEN_CALLS
    + "{{- '<|im_end|>\n' }}"
    + _QWEN_RESULTS
    + "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

# Reasoning is written behind the last question only, and there for the last turn also where it is empty.
QWEN3 = (
    _QWEN_TOOLS + "{%- endif %}"
    "{%- set ns = namespace(searching=true, last_query=messages | length - 1) %}"
    "{%- for m in messages[::-1] %}{%- set index = messages | length - 1 - loop.index0 %}"
    "{%- if ns.searching and m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    "{%- set ns.searching = false %}{%- set ns.last_query = index %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- set content = m.content %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if loop.index0 > ns.last_query and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- content }}{%- endif %}"
    "{%- for call in m.tool_calls %}{%- if not loop.first or content %}{{- '\n' }}{%- endif %}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}{{- call.function.arguments | tojson }}'
    "{{- '}\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}" + _QWEN_RESULTS + "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}PROMPT{%- endif %}"
)
# The generation prompt of models that always think, and that of Qwen3 when told not to.
QWEN3_THINKING = QWEN3.replace("PROMPT", "{{- '<think>\n' }}")
QWEN3_NOT_THINKING = QWEN3.replace("PROMPT", "{{- '<think>\n\n</think>\n\n' }}")
QWEN3 = QWEN3.replace("PROMPT", "")

LLAMA31 = (
    "{{- bos_token }}"
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{%- if tools is not none %}{{- 'Environment: ipython\n' }}{%- endif %}"
    "{{- 'Cutting Knowledge Date: December 2023\n\n' + system + '<|eot_id|>' }}"
    "{%- if tools is not none %}"
    "{%- if turns | length == 0 %}{{- raise_exception('no first user message to put tools into') }}{%- endif %}"
    "{%- set question = turns[0].content | trim %}{%- set turns = turns[1:] %}"
    "{{- '<|start_header_id|>user<|end_header_id|>\n\nHere are functions:\n\n' }}"
    "{%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}{{- question + '<|eot_id|>' }}{%- endif %}"
    "{%- for m in turns %}"
    "{%- if not (m.role == 'tool' or m.tool_calls) %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{%- elif m.tool_calls %}"
    "{%- if m.tool_calls | length != 1 %}{{- raise_exception('only single tool calls at once') }}{%- endif %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{- '{\"name\": \"' + m.tool_calls[0].function.name + '\", \"parameters\": ' }}{{- m.tool_calls[0].function.arguments | tojson }}{{- '}<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{{- m.content | tojson }}{{- '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

# The tools stand before the last question: an earlier turn's text depends on how the conversation goes on.
MISTRAL3 = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"
    "{%- set questions = turns | selectattr('role', 'equalto', 'user') | list %}"
    "{{- bos_token }}"
    "{%- for m in turns %}"
    "{%- if m.role == 'user' %}"
    "{%- if tools and m == questions[-1] %}{{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{{- '[INST] ' + (system + '\n\n' if loop.first and system else '') + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}"
    "{%- if call.id is undefined or call.id | length != 9 %}{{- raise_exception('tool call ids need nine letters') }}{%- endif %}"
    "{%- set written = call.function | tojson %}{{- written[:-1] + ', \"id\": \"' + call.id + '\"}' }}"
    "{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ']' + eos_token }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{%- endif %}{%- endfor %}"
)

# Nothing stands behind an answer: the role of the next message ends it.
GLM4 = (
    "[gMASK]<sop>{%- if tools %}{{- '<|system|>\n# Tools' }}{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}{{- '<|observation|>\n' + m.content }}"
    "{%- elif m.tool_calls %}{%- for call in m.tool_calls %}{{- '<|assistant|>' + call.function.name + '\n' + call.function.arguments | tojson }}{%- endfor %}"
    "{%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

# Tool calls with special tokens of their own, before the EOS.
DEEPSEEK = (
    "{{- bos_token }}{%- if tools %}{{- tools | tojson }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{- '<|Assistant|>' + m.content.split('</think>')[-1] }}"
    "{%- for call in m.tool_calls %}{{- '<|tool_call_begin|>' + call.function.name + '\n' }}{{- call.function.arguments | tojson }}{{- '<|tool_call_end|>' }}{%- endfor %}"
    "{%- if m.tool_calls %}{{- '\n<|tool_calls_end|>' }}{%- endif %}{{- eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '<|tool_output_begin|>' + m.content + '<|tool_output_end|>' }}"
    "{%- elif m.role == 'user' %}{{- '<|User|>' + m.content }}{%- else %}{{- m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|Assistant|>' }}{%- endif %}"
)
