"""28 public chat formats: the mask without marks is the mask with marks, and TRL's but for what the table says."""

import re

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_idft.data.chat.conversations import render_conversation, tokenize
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.errors import ConversationError, TemplateError
from tests.data.family_templates import FAMILIES
from tests.tiny_tokenizers import byte_level

SPECIAL = re.compile(
    r"<\|[A-Za-z_]+\|?>|<[a-z_]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|<sop>|\[gMASK\]"
)  # with Gemma's one-sided ones
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The sky.", "parameters": {}}}]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
RESULT = {"role": "tool", "content": "blue", "tool_call_id": "abcdefghi", "name": "weather"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content="", **fields):
    return {"role": "assistant", "content": content, **fields}


def thought(content):
    return {"reasoning_content": content}


PLAIN = [user("3 + 4?"), assistant("7."), user("And 1?"), assistant("8.\n\nIndeed."), user("3 + 4?"), assistant("7.")]
ASKED = [user("Weather?"), assistant(tool_calls=[CALL]), RESULT, assistant("Blue."), user("Thanks!"), assistant("Bye.")]
# Name -> (messages, tools, fields that the template must write).
CONVERSATIONS = {
    "plain": (PLAIN, None, ""),
    "ends with a question": (PLAIN[:3], None, ""),
    "system": ([{"role": "system", "content": "Be brief."}, *PLAIN], None, "system"),
    "reasoning": (
        [PLAIN[0], assistant("7.", **thought("3, 4")), PLAIN[2], assistant("8.", **thought("1"))],
        None,
        "reasoning",
    ),
    "tags": (
        [PLAIN[0], assistant("<think>\n3, 4\n</think>\n\n7."), PLAIN[2], assistant("<think>\n1\n</think>\n\n8.")],
        None,
        "",
    ),
    "tools": (ASKED, TOOLS, "tools"),
    "tools, reasoning": (
        [
            ASKED[0],
            assistant(tool_calls=[CALL], **thought("ask")),
            RESULT,
            assistant("Blue.", **thought("it said")),
            ASKED[4],
            assistant("Bye.", **thought("polite")),
        ],
        TOOLS,
        "tools reasoning",
    ),
    "ends with tools": (
        [ASKED[0], assistant(tool_calls=[CALL], **thought("ask")), RESULT, assistant("Blue.", **thought("it said"))],
        TOOLS,
        "tools reasoning",
    ),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """(family, template) -> a tokenizer that knows the family's special tokens."""
    made = {}

    def get(name, template):
        if (name, template) not in made:
            family, folder, backend = FAMILIES[name], tmp_path_factory.mktemp("tokenizer"), byte_level()
            backend.add_special_tokens(sorted({*SPECIAL.findall(family.template), family.eos, "<bos>"}))
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=family.eos)
            tokenizer.save_pretrained(folder)
            (folder / "own.jinja").write_text(template, encoding="utf-8")
            made[name, template] = load_tokenizer(folder, chat_template=str(folder / "own.jinja"))
        return made[name, template]

    return get


def served(family, fields):
    return set(fields.split()) <= set(family.fields.split())


CASES = [
    (name, conversation)
    for name, family in FAMILIES.items()
    for conversation, (_, _, fields) in CONVERSATIONS.items()
    if served(family, fields)
]


def said(rendered):
    return [rendered.text[start:end] for start, end in rendered.spans]


def differing_runs(theirs, ours, text):
    """(the text that theirs trains and ours does not, whether it stands before a span of ours) in order."""
    trained = [any(a <= at < b for a, b in ours) for at in range(len(text))]
    marked = [any(a <= at < b for a, b in theirs) for at in range(len(text))]
    assert all(mark or not own for mark, own in zip(marked, trained, strict=True)), "ours trains what theirs does not"
    kinds = "".join("o" if own else "t" if mark else " " for mark, own in zip(marked, trained, strict=True))
    return [
        (text[run.start() : run.end()], kinds[run.end() : run.end() + 1] == "o") for run in re.finditer("t+", kinds)
    ]


@pytest.mark.parametrize(("name", "conversation"), CASES)
def test_the_mask_is_trls_but_for_what_the_table_says(tokenizers, name, conversation):
    family, (messages, tools, _) = FAMILIES[name], CONVERSATIONS[conversation]
    tokenizer = tokenizers(name, family.template)
    rendered = render_conversation(tokenizer, messages, tools=tools)
    text, blocks = tokenizer.template.render_marked(messages, tools=tools)
    assert text == rendered.text
    assert len(rendered.spans) == sum(message["role"] == "assistant" for message in messages)
    for run, before_ours in differing_runs(blocks, rendered.spans, text):
        assert run in (family.before if before_ours else (family.after, family.after + family.eos)), said(rendered)
    [encoded] = tokenize(tokenizer, [rendered])  # each span ends with a special token
    assert encoded.mask.any() and not encoded.straddles


@pytest.mark.parametrize(("name", "conversation"), CASES)
def test_the_mask_is_the_same_without_marks(tokenizers, name, conversation):
    family, (messages, tools, _) = FAMILIES[name], CONVERSATIONS[conversation]
    unmarked = tokenizers(name, family.unmarked())
    assert not unmarked.template.has_generation_blocks
    if conversation in family.unproven:
        with pytest.raises((ConversationError, TemplateError), match="the loss mask cannot be proven"):
            render_conversation(unmarked, messages, tools=tools)
    else:
        marked = render_conversation(tokenizers(name, family.template), messages, tools=tools)
        assert render_conversation(unmarked, messages, tools=tools) == marked


@pytest.mark.parametrize(
    ("name", "conversation"), [(name, conversation) for name, conversation in CASES if FAMILIES[name].original]
)
def test_the_models_own_template_trains_earlier_turns_as_it_writes_them(tokenizers, name, conversation):
    family, (messages, tools, _) = FAMILIES[name], CONVERSATIONS[conversation]
    theirs = said(render_conversation(tokenizers(name, family.template), messages, tools=tools))
    own = render_conversation(tokenizers(name, family.original), messages, tools=tools)
    last_question = max(i for i, message in enumerate(messages) if message["role"] == "user")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if name == "glm4moe":  # TRL only moves the end of a turn, which its own template writes with the next message
        assert said(own) == theirs
    else:
        assert said(own) == [
            text if i > last_question else re.sub(r"^.*?</think>\n\n", "", text, flags=re.DOTALL)
            for i, text in zip(turns, theirs, strict=True)
        ]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_format_does_not_write_is_refused(tokenizers, name):
    family = FAMILIES[name]
    for template in (family.template, family.unmarked()):
        for messages, tools, fields in CONVERSATIONS.values():
            if not served(family, fields):
                with pytest.raises((ConversationError, TemplateError)):
                    render_conversation(tokenizers(name, template), messages, tools=tools)


# What ends a message of the system, a user and a tool, by hand; empty where a format opens the next message instead, or
# writes letters between. Qwen3.8's own system message stands before the record's, and rejects it alone: nothing proven.
CHATML_ENDS, GEMMA_END, PHI_END = ("<|im_end|>", "<|im_end|>", ""), "<end_of_turn>", "<|end|>"
ENDS = {
    "qwen3_8": ("", "<|im_end|>", ""),
    "lfm2_v2": ("<|im_end|>", "<|im_end|>", "<|tool_response_end|><|im_end|>"),
    "llama3": ("<|eot_id|>",) * 2,
    "gemma": ("", GEMMA_END),
    "gemma3": ("", GEMMA_END),
    "phi3": (PHI_END, PHI_END),
    "phi3_5": (PHI_END, PHI_END),
    "cohere": ("<|END_OF_TURN_TOKEN|>",) * 2,
    "cohere2": ("<|END_OF_TURN_TOKEN|>",) * 2,
    "deepseekv3": ("", ""),
    "deepseek_r1_distill": ("", ""),
    "diffusion_gemma": ("<turn|>", "<turn|>", ""),
    "glm4moe": ("", "", ""),
    "gptoss": (PHI_END, PHI_END, ""),
    "muse_glimmer": ("<|eot|>", "<|eot|>", "<|eot|>"),
}
WEIGHED = {
    "system": [
        {"role": "system", "content": "Be brief.", "loss": 0.25},
        user("3 + 4?") | {"loss": -0.5},
        assistant("7.", loss=-2),
        user("And 1?"),
        assistant("8."),
        user("Why?") | {"loss": 3},
        assistant("So."),
    ],
    "tools": [ASKED[0] | {"loss": 0.5}, ASKED[1], RESULT | {"loss": -0.25}, *ASKED[3:5], ASKED[5] | {"loss": 0}],
}


@pytest.mark.parametrize(
    ("name", "conversation"),
    [(name, fields) for name, family in FAMILIES.items() for fields in WEIGHED if served(family, fields)],
)
def test_prompts_are_trained_from_their_first_letter_to_the_end_of_the_message(tokenizers, name, conversation):
    """The oracle: the text and the letters' places by transformers, the ends of messages by the table above."""
    family, messages = FAMILIES[name], WEIGHED[conversation]
    tools = TOOLS if conversation == "tools" else None
    ends = dict(zip(("system", "user", "tool"), ENDS.get(name, CHATML_ENDS), strict=False))
    templates = [family.template] if "plain" in family.unproven or conversation in family.unproven else []
    for template in templates or [family.template, family.unmarked()]:
        tokenizer = tokenizers(name, template)
        theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
        plain = [{key: value for key, value in message.items() if key != "loss"} for message in messages]
        text = theirs.apply_chat_template(
            plain, chat_template=template, tools=tools, tokenize=False, bos_token="<bos>", eos_token=family.eos
        )
        rendered = render_conversation(tokenizer, messages, tools=tools)
        [encoded] = tokenize(tokenizer, [rendered])
        assert rendered.text.startswith(text)  # GLM's may grow by the token that ends it
        offsets = theirs(rendered.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        wanted = np.zeros(len(encoded.ids), dtype=np.float32)
        at = 0
        for message in messages:
            said = message["content"]
            if message["role"] == "assistant":
                at = max(at, text.find(said, at) + len(said))
                continue
            at = text.index(said, at)
            stop = at + len(said + ends[message["role"]])
            assert text[at:stop] == said + ends[message["role"]]
            inside = [at <= begin < stop for begin, _ in offsets]
            wanted[inside] = message.get("loss", 0)
        own = np.zeros(len(encoded.ids), dtype=bool)
        for number, (start, end) in enumerate(rendered.spans):
            if number not in rendered.others:
                own |= np.array([start <= begin < end for begin, _ in offsets])
        assert not (own & (wanted != 0)).any()
        assert np.array_equal(np.where(own, 0, encoded.weights), wanted), rendered
        # The assistant's are where they are without these weights, and weigh what they say.
        others = [m if m["role"] == "assistant" else {k: v for k, v in m.items() if k != "loss"} for m in messages]
        [bare] = tokenize(tokenizer, [render_conversation(tokenizer, others, tools=tools)])
        assert np.array_equal(bare.ids, encoded.ids) and bare.end_ids == encoded.end_ids
        assert np.array_equal(np.where(own, encoded.weights, 0), bare.mask if bare.weights is None else bare.weights)
