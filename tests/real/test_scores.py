"""Real records under the real model's template: what is trained, and what `score` says of it."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from megatron_idft.data.chat.conversations import encode_conversation
from megatron_idft.data.chat.tokenizer import load_tokenizer
from tests.launch import forked
from tests.tiny_corpora import write_records

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the template's, where none is given


def expected(tokenizer, messages) -> tuple[list[int], list[int]]:
    """(ids, mask) of a text that is written here by hand: trained are the assistant's words and their end of turn."""
    text, trained = "", []
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM}, *messages]
    for message in messages:
        text += f"<|im_start|>{message['role']}\n"
        start = len(text)
        text += f"{message['content']}<|im_end|>"
        if message["role"] == "assistant":
            trained.append((start, len(text)))
        text += "\n"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [any(a <= start and end <= b for a, b in trained) for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], [int(m) for m in mask]


def conversations(records):
    alone = [record["messages"] for record in records]
    yield from alone
    for first, second in zip(alone[::2], alone[1::2], strict=True):
        yield [*first, *second]
        yield [{"role": "system", "content": "Answer briefly."}, *first]


def test_trained_tokens_are_the_assistants_words_and_the_end_of_turn(huggingface, tokenizer, records):
    own = load_tokenizer(huggingface)
    for messages in conversations(records):
        ids, mask = encode_conversation(own, messages)
        assert (ids.tolist(), mask.tolist()) == expected(tokenizer, messages), messages
        answers = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
        assert tokenizer.decode(ids[mask == 1]) == answers


@pytest.fixture(scope="module")
def scored(verb, records, tmp_path_factory) -> list[dict]:
    """Of the shortest records, with tokens: the rows of `score`, at TP 3."""
    folder = tmp_path_factory.mktemp("scores")
    write_records(folder / "data.jsonl", records[:8])
    flags = f"--sft-data {folder / 'data.jsonl'} --output {folder / 'out'} --seq-length 256 --per-token"
    forked(verb("score", *flags.split(), "--tensor-model-parallel-size", 3), nproc=3)
    return pq.read_table(folder / "out" / "scores.parquet").to_pylist()


def test_statistics_are_those_of_transformers_logits_in_float64(scored, model, tokenizer, records):
    assert [row["id"] for row in scored] == [record["id"] for record in records[:8]]
    worst = dict.fromkeys(("log_prob", "entropy", "phi"), 0.0)
    for row, record in zip(scored, records, strict=False):
        ids, mask = (torch.tensor(values) for values in expected(tokenizer, record["messages"]))
        positions = mask.nonzero()[:, 0]
        assert row["positions"] == positions.tolist() and row["token_ids"] == ids[positions].tolist()
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, positions - 1].double().log_softmax(-1)
        log_prob = log_probs.gather(-1, ids[positions, None])[:, 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        for name, value in (("log_prob", log_prob), ("entropy", entropy), ("phi", log_prob + entropy)):
            difference = (torch.tensor(row[name]).double() - value).abs().max().item()
            worst[name] = max(worst[name], difference)
        phi = (log_prob + entropy).numpy()
        assert row["phi_mean"] == pytest.approx(phi.mean(), abs=1e-4)
        assert row["phi_std"] == pytest.approx(phi.std(), abs=1e-4)
        assert row["ends_turn"] and not row["truncated"] and row["num_prompt_tokens"] == positions[0]
    print({name: f"{value:.1e}" for name, value in worst.items()})
    assert all(value < 1e-4 for value in worst.values()), f"the statistics differ by {worst} at most"
    assert np.std([row["phi_mean"] for row in scored]) > 0.01, "records that are all alike would prove nothing"
