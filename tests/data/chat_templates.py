# ruff: noqa: E501 (a template reads best with one tag's text on one line)
"""Chat templates in the shape of the public families, written for these tests, and what each must train."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QWEN25 = (
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\n\n' %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"
    "{{- bos_token }}"
    "{%- for m in turns %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('conversation roles must alternate user/assistant') }}{%- endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}"
    "{%- endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

COHERE = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN|>{{ m.role }}:{{ m.content }}"
    "{% if m.role == 'assistant' %}<|END_RESPONSE|>{% endif %}<|END_OF_TURN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN|>assistant:{% endif %}"
)

# Reasoning is kept in the last turn only, where an empty one is written if there is none.
QWEN3 = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
    "{{- '<|im_start|>assistant\n' }}OPEN"
    "{%- if loop.last %}{{- '<think>\n' + thought + '\n</think>\n\n' + answer }}{%- else %}{{- answer }}{%- endif %}"
    "{{- '<|im_end|>' }}CLOSE{{- '\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN3_MARKED = QWEN3.replace("OPEN", "{%- generation %}").replace("CLOSE", "{%- endgeneration %}")
QWEN3 = QWEN3.replace("OPEN", "").replace("CLOSE", "")

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# SmolLM3's way: the block begins before the header.
MARKED_WITH_HEADER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

OPENS_THE_NEXT_TURN = (
    "{% for m in messages %}{% if loop.first %}<|im_start|>{% endif %}{{ m.role }}\n{{ m.content }}<|im_end|>\n<|im_start|>"
    "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)

ENDS_IN_THE_NEXT_MESSAGE = (
    "{% for m in messages %}{% if not loop.first %}<|im_end|>{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|><|im_start|>assistant\n{% endif %}"
)

# Name -> (template, what a trained span looks like around the answer, trimmed or not).
FAMILIES = {
    "chatml": (CHATML, "{}<|im_end|>", False),
    "qwen2.5": (QWEN25, "{}<|im_end|>", False),
    "llama3": (LLAMA3, "{}<|eot_id|>", True),
    "mistral": (MISTRAL, " {}</s>", False),
    "gemma": (GEMMA, "{}<end_of_turn>", True),
    "cohere": (COHERE, "{}<|END_RESPONSE|><|END_OF_TURN|>", False),
    "opens the next turn": (OPENS_THE_NEXT_TURN, "{}<|im_end|>", False),
    "marked": (MARKED, "{}<|im_end|>", False),
    "marked with header": (MARKED_WITH_HEADER, "{}<|im_end|>", False),
}

# Name -> (template, words of the refusal).
REFUSED = {
    "never ends": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
        "never ends the assistant's turn",
    ),
    "ends all but the last turn": (
        "{% for m in messages %}{{ m.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}",
        "cannot be proven",
    ),
    "next turn's BOS is not an end": (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<s>{% endif %}{% endfor %}",
        "never ends the assistant's turn",
    ),
    "drops earlier answers": (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
        "nothing of it stands in the conversation",
    ),
    "no generation prompt": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "ignores add_generation_prompt",
    ),
    "other generation prompt": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>Assistant\n{% endif %}",
        "edits earlier turns",
    ),
    "never writes the answer": (
        "{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}",
        "stands nowhere",
    ),
    "writes the answer twice": (
        "{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}",
        "more than once",
    ),
    "end depends on the answer": (
        "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if 'Probe' in m.content else '</s>' }}{% endfor %}",
        "depends on the answer",
    ),
    "marks without the end": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}",
        "never ends the assistant's turn",
    ),
    "marks the last turn only": (
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
        "stands outside of its {% generation %} block",
    ),
    "edits a marked block": (
        "{% for m in messages %}{% set x %}{% if m.role == 'assistant' %}{% generation %} {{ m.content }} {% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endset %}{{ x | trim }}<|im_end|>{% endfor %}",
        "edits the output",
    ),
    "nests marked blocks": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% generation %}<|im_end|>{% endgeneration %}"
        "{% endgeneration %}{% endfor %}",
        "nests",
    ),
    "today's date": (
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        "give the date",
    ),
}
