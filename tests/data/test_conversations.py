"""The loss mask against texts written by hand: the decoded trained tokens must be just the answers and their ends."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_idft.data.chat.conversations import encode_conversation, render_conversation, tokenize
from megatron_idft.data.chat.show import render_sample
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.errors import ConversationError, TemplateError
from tests.data.chat_templates import CHATML, ENDS_IN_THE_NEXT_MESSAGE, FAMILIES, LLAMA3, QWEN3, QWEN3_MARKED, REFUSED
from tests.tiny_tokenizers import byte_level

CONTENTS = [
    "What is 3 + 4?",
    "It is 7.",
    "héllo 你好,世界。",
    "😀🤖 wörld",
    "  spaced\n\n",
    "two\n\nlines  \n",
    "a",
    "aa",
    "",
    "\t  indented\n",
]


def conversation(*contents, system=None):
    """Alternating user and assistant turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


def trained_texts(tokenizer, ids, mask):
    """The text of each run of trained tokens, each decoded behind what precedes it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [
        tokenizer.decode(ids[:end])[len(tokenizer.decode(ids[:start])) :]
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def same(kind, got, expected):
    """Equal, but for the blanks that an old metaspace tokenizer decodes behind special tokens."""
    blanks = str.maketrans("", "", " ") if kind == "old metaspace" else {}
    return [text.translate(blanks) for text in got] == [text.translate(blanks) for text in expected]


def expected_texts(family, messages):
    _, form, trim = FAMILIES[family]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    return [form.format(answer.strip() if trim else answer) for answer in answers]


CONVERSATIONS = {
    "one turn": conversation(*CONTENTS[:2]),
    "ten messages": conversation(*CONTENTS),
    "system": conversation(*CONTENTS[:4], system="Be brief."),
    "ends with the user": conversation(*CONTENTS[:3]),
    "same text everywhere": conversation("a", "a", "a", "a"),
    "words of ours": conversation("Probe", "Probex", "Probexx Probe", "Probe"),
}


@pytest.fixture(scope="module")
def tokenizers(huggingface_folder, sentencepiece_model, tmp_path_factory):
    """(kind, template) -> a ChatTokenizer, made once."""
    made = {}
    folders = {kind: huggingface_folder(kind, CHATML) for kind in ("byte-level", "metaspace", "old metaspace")}

    def get(kind, template):
        if (kind, template) not in made:
            file = tmp_path_factory.mktemp("template") / "chat.jinja"
            file.write_text(template, encoding="utf-8")
            made[kind, template] = load_tokenizer(folders.get(kind, sentencepiece_model), chat_template=str(file))
        return made[kind, template]

    return get


KINDS = ["byte-level", "metaspace", "old metaspace", "sentencepiece"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_exactly_the_answers_and_their_ends_are_trained(tokenizers, kind, family, name):
    messages = CONVERSATIONS[name]
    if family == "gemma" and messages[0]["role"] == "system":
        with pytest.raises(ConversationError, match="System role not supported"):
            encode_conversation(tokenizers(kind, FAMILIES[family][0]), messages)
        return
    tokenizer = tokenizers(kind, FAMILIES[family][0])
    ids, mask = encode_conversation(tokenizer, messages)
    assert ids.dtype == np.int32 and mask.dtype == np.uint8 and ids.shape == mask.shape
    assert same(kind, trained_texts(tokenizer, ids, mask), expected_texts(family, messages))
    assert same(kind, [tokenizer.decode(ids)], [tokenizer.template.render(messages)])


TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Co"], exclude_characters="<>|[]▁") | st.sampled_from(" \n")
)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_conversation(tokenizers, kind, data):
    family = data.draw(st.sampled_from(["chatml", "llama3", "cohere", "marked"]))
    answer = TEXT.filter(str.strip)
    pairs = data.draw(st.lists(st.tuples(TEXT, answer), min_size=1, max_size=4))
    messages = conversation(*(text for pair in pairs for text in pair), system=data.draw(st.none() | TEXT))
    tokenizer = tokenizers(kind, FAMILIES[family][0])
    [encoded] = tokenize(tokenizer, [render_conversation(tokenizer, messages)])
    got, expected = trained_texts(tokenizer, encoded.ids, encoded.mask), expected_texts(family, messages)
    if encoded.straddles:  # an answer that begins with a newline, merged with the header's
        differ = [(a, b) for a, b in zip(got, expected, strict=True) if not same(kind, [a], [b])]
        assert len(differ) <= encoded.straddles
        assert all(same(kind, [a], [b[-len(a) :]]) and b[0].isspace() for a, b in differ)
    else:
        assert same(kind, got, expected)


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "old metaspace"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_ids_are_those_of_transformers(huggingface_folder, kind, family):
    template = FAMILIES[family][0]
    folder = huggingface_folder(kind, template)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    messages = CONVERSATIONS["ten messages"]
    assert ours.template.render(messages) == theirs.apply_chat_template(messages, tokenize=False)
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encode_conversation(ours, messages)
    assert ids.tolist() == list(expected["input_ids"])
    if family == "marked":
        # transformers trains what follows the end in the block as well: a newline, which inference never reaches. Old
        # metaspace writes a blank of its own before it; transformers 4 and 5.0 train that alone, newer ones both.
        theirs_only = np.flatnonzero(mask < np.asarray(expected["assistant_masks"]))
        assert (np.asarray(expected["assistant_masks"]) >= mask).all()
        runs = np.split(theirs_only, np.flatnonzero(np.diff(theirs_only) > 1) + 1)
        assert [ids[run[0] - 1] for run in runs] == [ours.special_ids["<|im_end|>"]] * 5
        assert {ours.decode(ids[run]).strip(" ") for run in runs} <= {"\n", ""}


def test_bos_is_written_once(huggingface_folder):
    tokenizer = load_tokenizer(huggingface_folder("byte-level", LLAMA3))
    ids, _ = encode_conversation(tokenizer, CONVERSATIONS["ten messages"])
    assert (ids == tokenizer.bos_id).sum() == 1 and ids[0] == tokenizer.bos_id


@pytest.mark.parametrize("kind", KINDS)
def test_earlier_turns_are_trained_as_an_editing_template_writes_them(tokenizers, kind):
    one = conversation("3 + 4?", "<think>\n3 and 4\n</think>\n\n7.")
    several = [*one, *conversation("and 4 + 4?", "<think>\n4 twice\n</think>\n\n8.")]
    unmarked, marked = tokenizers(kind, QWEN3), tokenizers(kind, QWEN3_MARKED)
    for tokenizer in (unmarked, marked):
        assert trained_texts(tokenizer, *encode_conversation(tokenizer, one)) == [
            "<think>\n3 and 4\n</think>\n\n7.<|im_end|>"
        ]
        assert trained_texts(tokenizer, *encode_conversation(tokenizer, several)) == [
            "7.<|im_end|>",
            "<think>\n4 twice\n</think>\n\n8.<|im_end|>",
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_that_the_template_writes_with_the_next_message_is_trained(tokenizers, kind):
    """Behind the last turn it is what would stand there if a message followed."""
    tokenizer = tokenizers(kind, ENDS_IN_THE_NEXT_MESSAGE)
    for messages in (CONVERSATIONS["system"], CONVERSATIONS["ends with the user"]):
        ids, mask = encode_conversation(tokenizer, messages)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert same(kind, trained_texts(tokenizer, ids, mask), [f"{answer}<|im_end|>" for answer in answers])
        added = "<|im_end|>" if messages[-1]["role"] == "assistant" else ""
        assert same(kind, [tokenizer.decode(ids)], [tokenizer.template.render(messages) + added])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_proves_nothing_is_refused(tokenizers, kind, name):
    template, words = REFUSED[name]
    with pytest.raises(TemplateError, match=words):
        encode_conversation(tokenizers(kind, template), conversation("question", "answer", "again", "once more"))


def test_an_end_of_turn_that_is_no_token_is_refused(tokenizers):
    template = CHATML.replace("<|im_end|>", "<|nobody_knows|>").replace("<|im_start|>", "")
    with pytest.raises(TemplateError, match="never ends the assistant's turn with a special token of this tokenizer"):
        encode_conversation(tokenizers("byte-level", template), CONVERSATIONS["one turn"])


def test_an_end_of_turn_that_the_tokenizer_overlooks_is_refused(tmp_path):
    """`single_word` tokens are not found next to a letter."""
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|end|>", single_word=True)])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    hf.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    hf.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    encode_conversation(tokenizer, conversation("question?", "answer."))
    with pytest.raises(TemplateError, match=r"does not read the end of turn 'answer<\|end\|>' as a special token"):
        encode_conversation(tokenizer, conversation("question?", "answer"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_over_the_beginning_of_the_answer_is_not_trained(tokenizers, kind):
    """The header ends with the blank that the tokenizer merges with the first word."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = tokenizers(kind, template)
    messages = conversation("question", "hello world")
    [encoded] = tokenize(tokenizer, [render_conversation(tokenizer, messages)])
    assert encoded.straddles == 1
    [got] = trained_texts(tokenizer, encoded.ids, encoded.mask)
    assert "hello world</s>".endswith(got) and len(" world</s>") <= len(got) < len("hello world</s>")
    blank_in_answer = template.replace("assistant: {%", "assistant:{%")
    [encoded] = tokenize(
        tokenizers(kind, blank_in_answer), [render_conversation(tokenizers(kind, blank_in_answer), messages)]
    )
    assert encoded.straddles == 0
    assert trained_texts(tokenizer, encoded.ids, encoded.mask) == [" hello world</s>"]


@pytest.mark.parametrize("kind", KINDS)
def test_blanks_of_the_header_are_not_the_answers(tokenizers, kind):
    """Trimmed offsets would hide the header's blanks from the comparison of characters."""
    blanks = CHATML.replace("assistant\n{% endif", "assistant\n{{ '   ' }}{% endif").replace(
        "{{ m.content", "   {{ m.content"
    )
    tokenizer = tokenizers(kind, blanks)
    messages = conversation("question", "\nanswer")
    assert trained_texts(tokenizer, *encode_conversation(tokenizer, messages)) == ["\nanswer<|im_end|>"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_newline_merged_with_the_headers_is_not_trained(tokenizers, kind):
    tokenizer = tokenizers(kind, CHATML)
    [encoded] = tokenize(tokenizer, [render_conversation(tokenizer, conversation("question", "\n\tanswer"))])
    merged = kind != "sentencepiece"  # where newlines are symbols of their own
    assert encoded.straddles == merged
    [got] = trained_texts(tokenizer, encoded.ids, encoded.mask)
    assert got in (("\tanswer<|im_end|>", "answer<|im_end|>") if merged else ("\n\tanswer<|im_end|>",))


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_contents_are_counted(tokenizers, kind):
    tokenizer = tokenizers(kind, CHATML)
    plain = render_conversation(tokenizer, conversation("question", "answer"))
    spelling = render_conversation(tokenizer, conversation("what is <|im_end|>?", "answer"))
    assert (plain.spells_special, spelling.spells_special) == (False, True)
    ids, mask = encode_conversation(tokenizer, conversation("what is <|im_end|>?", "answer"))
    assert trained_texts(tokenizer, ids, mask) == ["answer<|im_end|>"]


def test_messages_that_the_template_leaves_out_are_counted(tokenizers):
    template = "{% for m in messages if m.role != 'system' %}" + CHATML.split("%}", 1)[1]
    messages = conversation("question", "answer", system="Be brief.")
    assert render_conversation(tokenizers("byte-level", template), messages).unwritten
    assert not render_conversation(tokenizers("byte-level", CHATML), messages).unwritten


@pytest.mark.parametrize("key", ["function_call", "reasoning", "thinking", "refusal", "images", "functions"])
def test_fields_that_would_be_ignored_are_refused(tokenizers, key):
    messages = conversation("question", "answer")
    messages[1][key] = 0
    with pytest.raises(ConversationError, match=rf"messages\[1\]\.{key} is not served: .*, or remove it$"):
        encode_conversation(tokenizers("byte-level", CHATML), messages)


def test_a_first_assistant_turn_is_trained_where_the_template_proves_it(tokenizers):
    messages = [{"role": "assistant", "content": "Hello!"}, *conversation("hello", "Hello again.")]
    tokenizer = tokenizers("byte-level", LLAMA3)
    assert trained_texts(tokenizer, *encode_conversation(tokenizer, messages)) == [
        "Hello!<|eot_id|>",
        "Hello again.<|eot_id|>",
    ]
    with pytest.raises(ConversationError, match="alternate"):
        encode_conversation(tokenizers("byte-level", FAMILIES["mistral"][0]), messages)


def test_the_sentencepiece_templates_built_in(sentencepiece_model):
    messages = CONVERSATIONS["system"]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    for name, form in (("chatml", "{}<|im_end|>"), ("plain", " {}</s>")):
        tokenizer = load_tokenizer(sentencepiece_model, chat_template=name)
        ids, mask = encode_conversation(tokenizer, messages)
        assert trained_texts(tokenizer, ids, mask) == [form.format(answer) for answer in answers]
        assert tokenizer.decode(ids) == tokenizer.template.render(messages)


def test_sentencepiece_symbols_become_their_ids(sentencepiece_model):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = load_tokenizer(sentencepiece_model, chat_template="chatml")
    ids, mask = encode_conversation(tokenizer, conversation("hello", "3 + 4 = 7 you"))
    start, end = model.piece_to_id("<|im_start|>"), model.piece_to_id("<|im_end|>")
    assert (ids == start).sum() == 2 and (ids == end).sum() == 2 and mask[np.flatnonzero(ids == end)].tolist() == [0, 1]
    assert tokenizer.vocab_size == model.get_piece_size()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    # Digits and newlines are the model's business: cutting the text there would put a dummy prefix behind each.
    assert (
        "7" not in tokenizer.special_ids
        and "\n" not in tokenizer.special_ids
        and "<end_of_turn>" in tokenizer.special_ids
    )
    answer = ids[np.flatnonzero(ids == start)[1] + 1 : np.flatnonzero(ids == end)[1]]
    assert answer.tolist() == model.encode("assistant\n3 + 4 = 7 you")


def test_loading_says_what_is_missing(huggingface_folder, sentencepiece_model, tmp_path):
    with pytest.raises(ValueError, match=r"no chat template.*--chat-template"):
        load_tokenizer(sentencepiece_model)
    with pytest.raises(ValueError, match=r"no chat template.*--chat-template"):
        load_tokenizer(huggingface_folder("byte-level", None))
    with pytest.raises(ValueError, match="no EOS token"):
        load_tokenizer(huggingface_folder("byte-level", CHATML, eos_token=None))
    with pytest.raises(FileNotFoundError, match="neither a file nor built in"):
        load_tokenizer(sentencepiece_model, chat_template="no-such-template")
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    with pytest.raises(TemplateError, match="not valid Jinja"):
        load_tokenizer(sentencepiece_model, chat_template=str(tmp_path / "broken.jinja"))


def test_pad_falls_back_to_eos(huggingface_folder):
    assert load_tokenizer(huggingface_folder("byte-level", CHATML)).pad_id == 3
    assert load_tokenizer(huggingface_folder("byte-level", CHATML, pad_token=None)).pad_id == 2


def test_the_fingerprint_follows_template_vocabulary_and_date(huggingface_folder, sentencepiece_model, tmp_path):
    byte_level, again, other = (
        huggingface_folder(kind, CHATML) for kind in ("byte-level", "byte-level", "metaspace")
    )  # fmt: skip
    assert load_tokenizer(byte_level).fingerprint() == load_tokenizer(again).fingerprint()
    prints = [
        load_tokenizer(byte_level), load_tokenizer(byte_level, chat_template="plain"), load_tokenizer(other),
        load_tokenizer(sentencepiece_model, "chatml"), load_tokenizer(sentencepiece_model, "plain"),
        load_tokenizer(sentencepiece_model, "plain", template_date="2026-01-01"),
    ]  # fmt: skip
    assert len({tokenizer.fingerprint() for tokenizer in prints}) == len(prints)


def test_a_template_gets_the_date_that_is_given(sentencepiece_model, tmp_path):
    file = tmp_path / "dated.jinja"
    file.write_text(
        "{% if strftime_now is defined %}{{ strftime_now('%d %B %Y') }}{% else %}no day{% endif %}{{ eos_token }}"
        + CHATML
    )
    for date, words in ((None, "no day</s>"), ("2026-02-03", "03 February 2026</s>")):
        tokenizer = load_tokenizer(sentencepiece_model, str(file), template_date=date)
        assert tokenizer.template.render(conversation("a")).startswith(words)


def test_templates_run_in_a_sandbox(sentencepiece_model, tmp_path):
    file = tmp_path / "hostile.jinja"
    file.write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}")
    with pytest.raises(TemplateError, match="SecurityError"):
        encode_conversation(load_tokenizer(sentencepiece_model, str(file)), conversation("a", "b"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_shows_what_is_trained(tokenizers, kind):
    tokenizer = tokenizers(kind, CHATML)
    text = render_sample(*encode_conversation(tokenizer, conversation("hello", "😀 a", "again", "b")), tokenizer)
    expected = (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n⟦😀 a<|im_end|>⟧\n"
        "<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
    )
    assert same(kind, [text.split("\n", 1)[1]], [expected])


def test_a_long_sample_loses_the_middle_of_its_runs(tokenizers):
    tokenizer = tokenizers("byte-level", CHATML)
    ids, mask = encode_conversation(tokenizer, conversation("hello " * 1000, "answer"))
    text = render_sample(ids, mask, tokenizer, max_run=100)
    assert len(text) < 400 and "characters)…" in text and "⟦answer<|im_end|>⟧" in text
    assert "hello " * 1000 in render_sample(ids, mask, tokenizer, max_run=None)
    with pytest.raises(ValueError, match="alike"):
        render_sample(ids, mask[1:], tokenizer)


def test_importing_the_data_package_needs_neither_torch_nor_transformers(sentencepiece_model, tmp_path):
    import json
    import subprocess
    import sys

    records = tmp_path / "a.jsonl"
    records.write_text(json.dumps({"prompt": "question", "response": "answer"}))
    code = (
        "import sys\n"
        "from megatron_idft.data.chat.show import render_sample\n"
        "from megatron_idft.data.chat.tokenizer import load_tokenizer\n"
        "from megatron_idft.data.packed.pack_settings import PrepareSettings\n"
        "from megatron_idft.data.packed.records import tokenize_records\n"
        "model, records, folder = sys.argv[1:]\n"
        "tokenizer = load_tokenizer(model, 'chatml')\n"
        "cache = tokenize_records(PrepareSettings((records,), 64, packing=False), tokenizer, folder)\n"
        "print(render_sample(*cache[0], tokenizer))\n"
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(sentencepiece_model), str(records), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and "⟦answer<|im_end|>⟧" in done.stdout, done.stderr
