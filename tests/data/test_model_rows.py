"""Tokens that a tokenizer has and the model has no row for: refused by name, as prompt and as label."""

import json

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from megatron_idft.corpus.records import read_records
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.model_rows import require_rows, require_rows_of_records
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare
from megatron_idft.data.packed.store import PackedStore
from megatron_idft.errors import InputError
from tests.data.chat_templates import CHATML
from tests.data.prepared_files import tokenized


@pytest.fixture(scope="module")
def tokenizer(huggingface_folder):
    """With two tokens more than its model has rows, and the number of these."""
    folder = huggingface_folder("byte-level", CHATML)
    hf = AutoTokenizer.from_pretrained(folder)
    rows = len(hf)
    hf.add_tokens([AddedToken("<tool_response>", special=True), AddedToken("</tool_response>", special=True)])
    hf.save_pretrained(folder)
    return load_tokenizer(folder), rows


def records(path, *pairs):
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


PLAIN = [("2 + 5?", "7")] * 40
USES = {
    "nobody": ([], None),
    "a prompt": ([("<tool_response>7</tool_response> What is it?", "7")], "'<tool_response>' .* '</tool_response>'"),
    "an answer": ([("What is it?", "It is <tool_response>7")], "'<tool_response>'"),
}


@pytest.mark.parametrize("name", USES)
def test_tokens_without_rows_are_named_before_they_are_trained(tokenizer, tmp_path, name):
    tokenizer, rows = tokenizer
    pairs, names = USES[name]
    file = records(tmp_path / "data.jsonl", *PLAIN, *pairs, *PLAIN)
    cache = tokenized(tokenizer, tmp_path, file, seq_length=128)
    store = prepare(PrepareSettings((file,), 128), tokenizer, tmp_path / "packs", workers=1, progress=False).store

    def check_all(rows):
        for data in (cache, store):
            require_rows(data, tokenizer, rows)
        require_rows_of_records(read_records([file]), tokenizer, rows)

    check_all(None)
    check_all(rows + 2)
    if names is None:
        check_all(rows)
        return
    for check in (
        lambda: require_rows(cache, tokenizer, rows),
        lambda: require_rows(store, tokenizer, rows),
        lambda: require_rows_of_records(read_records([file]), tokenizer, rows),
    ):
        with pytest.raises(InputError, match=f"data.jsonl, line 41: .*{names}.*model has {rows} rows.*resize_token"):
            check()


def test_caches_and_packs_of_earlier_versions_are_looked_at(tokenizer, tmp_path):
    tokenizer, rows = tokenizer
    file = records(tmp_path / "data.jsonl", *PLAIN, *USES["a prompt"][0])
    cache = tokenized(tokenizer, tmp_path, file, seq_length=128)
    prepare(PrepareSettings((file,), 128), tokenizer, tmp_path / "packs", workers=1, progress=False)
    store = PackedStore(tmp_path / "packs")
    for data in (cache, store):
        assert data.meta.pop("largest_id") == data.token_ids.max() == rows + 1
        with pytest.raises(InputError, match="line 41: "):
            require_rows(data, tokenizer, rows)
