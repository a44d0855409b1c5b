"""Records with token ids of their own: what becomes of them, and what is refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_idft.corpus.records import read_records
from megatron_idft.data.chat.conversations import encode_conversation
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed import encoding, pack_settings
from megatron_idft.data.packed.dataset import IGNORED_LABEL, PackedDataset
from megatron_idft.errors import RecordError
from tests.data.chat_templates import CHATML
from tests.data.prepared_files import tokenized


@pytest.fixture(scope="module")
def byte_level(huggingface_folder):
    return load_tokenizer(huggingface_folder("byte-level", CHATML))


@pytest.fixture
def build(tokenizer, tmp_path):
    def build(*paths, seq_length=64, **options):
        used = options.pop("tokenizer", tokenizer)
        return tokenized(used, tmp_path / "cache", *paths, seq_length=seq_length, **options)

    return build


def plain(question="hello", answer="world"):
    return {"prompt": question, "response": answer}


def own(ids, mask, **columns):
    return plain() | {"token_ids": ids, "loss_mask": mask} | columns


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, *rows):
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet}


def tokens_of(tokenizer, row):
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    ids, mask = encode_conversation(tokenizer, messages)
    return ids.tolist(), mask.tolist()


def contents(cache):
    return [(ids.tolist(), mask.tolist()) for ids, mask in (cache[i] for i in range(len(cache)))]


def split_into_bytes(tokenizer, row):
    """Other ids of the same text: its answer drawn one character at a time, as a model is free to do."""
    ids, mask = tokens_of(tokenizer, row)
    start = mask.index(1)
    letters = [i for letter in row["response"] for i in tokenizer.encode_batch([letter], [[]])[0].ids.tolist()]
    end = tokenizer.special_ids["<|im_end|>"]
    return ids[:start] + letters + [end], [0] * start + [1] * (len(letters) + 1)


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_ids_are_kept_though_the_text_tokenizes_otherwise(build, byte_level, tmp_path, suffix):
    ids, mask = split_into_bytes(byte_level, plain())
    assert ids != tokens_of(byte_level, plain())[0]
    unrelated = own([9, 8, 7, 6], [0, 1, 0, 1])
    path = tmp_path / f"a.{suffix}"
    file = WRITERS[suffix](path, own(ids, mask, tokenizer_fingerprint=byte_level.fingerprint()), unrelated)
    cache = build(file, tokenizer=byte_level)
    assert contents(cache) == [(ids, mask), ([9, 8, 7, 6], [0, 1, 0, 1])]
    assert cache.counts.pretokenized == cache.counts.kept == 2
    tokens = PackedDataset({"": cache}, 64, byte_level.pad_id, bounds=False)[1]
    assert tokens["tokens"][:3].tolist() == [9, 8, 7]
    assert tokens["labels"][:4].tolist() == [8, IGNORED_LABEL, 6, IGNORED_LABEL]


@pytest.mark.parametrize("suffix", WRITERS)
def test_own_tokens_stand_in_order_among_ordinary_records_over_many_batches(
    build, tokenizer, tmp_path, monkeypatch, suffix
):
    monkeypatch.setattr(encoding, "_BATCH_RECORDS", 7)
    rows, expected = [], []
    for i in range(60):
        ids, mask = [10 + i, 11, 12 + i, 13][: 2 + i % 3], [0, 1, 1, 0][: 2 + i % 3]
        text = plain(f"question {i}", f"answer {i}")
        has_own = i % 3 == 0 or 20 <= i < 40  # whole batches, and single ones
        rows.append(text | {"token_ids": ids if has_own else None, "loss_mask": mask if has_own else None})
        expected.append((ids, mask) if has_own else tokens_of(tokenizer, text))
    cache = build(WRITERS[suffix](tmp_path / f"a.{suffix}", *rows))
    assert contents(cache) == expected
    own_tokens = sum(row["token_ids"] is not None for row in rows)
    assert (cache.counts.kept, cache.counts.pretokenized) == (60, own_tokens)
    assert any(line.split()[:3] == ["pre-tokenized", "records", str(own_tokens)] for line in cache.report().split("\n"))


def test_a_corpus_without_own_tokens_says_nothing_of_them(build, tmp_path):
    cache = build(write_jsonl(tmp_path / "a.jsonl", plain()))
    assert cache.counts.pretokenized == 0 and "pre-tokenized" not in cache.report()


def test_a_batch_of_own_tokens_is_bounded_in_ids_too(build, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 50)
    held, inner = [], encoding.tokenize
    monkeypatch.setattr(encoding, "tokenize", lambda *args: held.append(1) or inner(*args))
    rows = [own(list(range(20)), [0] + [1] * 19)] * 9
    assert len(build(write_jsonl(tmp_path / "a.jsonl", *rows))) == 9
    assert len(held) == 4  # three records pass the bound, and the rest


def test_long_own_tokens_are_cut_and_counted_like_others(build, tmp_path):
    ids, mask = list(range(30)), [0] * 10 + [1] * 20
    late = own(list(range(40)), [0] * 35 + [1] * 5)
    file = write_jsonl(tmp_path / "a.jsonl", own(ids, mask), own(ids[:21], mask[:21]), late)
    cache = build(file, seq_length=20)
    assert contents(cache) == [(ids[:21], mask[:21])] * 2
    counts = cache.counts
    assert (counts.kept, counts.truncated, counts.empty, counts.pretokenized) == (2, 1, 1, 2)
    assert counts.lost_trained_tokens == 9 + 5 and counts.trained_tokens == 22
    dropping = build(file, seq_length=20, truncation="drop")
    assert contents(dropping) == [(ids[:21], mask[:21])] and dropping.counts.dropped == 2
    with pytest.raises(RecordError, match=r"line 1, token_ids: 30 tokens are more than seq_length \+ 1 = 21"):
        build(file, seq_length=20, truncation="error")


def test_the_special_tokens_that_end_trained_spans_end_turns(build, tokenizer, tmp_path):
    end, eos = tokenizer.special_ids["<|im_end|>"], tokenizer.eos_id
    start = tokenizer.special_ids["<|im_start|>"]
    two_turns = own([30, 31, end, start, 32, eos, 33], [0, 1, 1, 0, 1, 1, 0])
    cut_off = own([30, start, 31, 32], [0, 1, 1, 1])  # a marker inside the answer, which ends with no special token
    assert build(write_jsonl(tmp_path / "a.jsonl", two_turns, cut_off)).end_of_turn_ids == sorted({end, eos})
    assert build(write_jsonl(tmp_path / "b.jsonl", cut_off)).end_of_turn_ids == []
    last = own([30, 31, eos], [0, 1, 1])
    assert build(write_jsonl(tmp_path / "c.jsonl", last, plain())).end_of_turn_ids == sorted({end, eos})


def test_what_no_template_renders_is_no_reason_to_refuse_own_tokens(build, tokenizer, tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    assistant = {"role": "assistant", "content": "a", "tool_calls": [call]}
    record = {"messages": [{"role": "user", "content": "what is <|im_end|>?"}, assistant], "tools": [call]}
    cache = build(write_jsonl(tmp_path / "a.jsonl", record | {"token_ids": [5, 6], "loss_mask": [0, 1]}))
    assert contents(cache) == [([5, 6], [0, 1])] and cache.counts.spells_special == 0
    with pytest.raises(RecordError, match="messages"):
        build(write_jsonl(tmp_path / "b.jsonl", record))


IDS, MASK = [5, 6, 7], [0, 1, 1]
REFUSED = {
    "no mask": ({"token_ids": IDS}, "loss_mask: missing beside token_ids"),
    "no ids": ({"loss_mask": MASK}, "token_ids: missing beside loss_mask"),
    "null ids": ({"token_ids": None, "loss_mask": MASK}, "token_ids: missing beside loss_mask"),
    "null mask": ({"token_ids": IDS, "loss_mask": None}, "loss_mask: missing beside token_ids"),
    "text": ({"token_ids": "5 6 7", "loss_mask": MASK}, r'token_ids: expected a list of integers, found "5 6 7"'),
    "one number": ({"token_ids": IDS, "loss_mask": 1}, "loss_mask: expected a list of numbers, found 1"),
    "float id": ({"token_ids": [5.0, 6.0, 7.0], "loss_mask": MASK}, r"token_ids\[0\]: expected an integer, found 5\.0"),
    "null id": ({"token_ids": [5, None, 7], "loss_mask": MASK}, r"token_ids\[1\]: expected an integer, found null"),
    "word": ({"token_ids": ["a", "b", "c"], "loss_mask": MASK}, r'token_ids\[0\]: expected an integer, found "a"'),
    "nested": ({"token_ids": [IDS], "loss_mask": [0, 1, 1]}, r"token_ids\[0\]: expected an integer, found \[5, 6, 7\]"),
    "boolean mask": (
        {"token_ids": IDS, "loss_mask": [False, True, True]},
        r"loss_mask\[0\]: expected a number, found false",
    ),
    "short mask": ({"token_ids": IDS, "loss_mask": [0, 1]}, "loss_mask: 2 values for 3 token_ids"),
    "one token": ({"token_ids": [5], "loss_mask": [1]}, "token_ids: 1 tokens; at least 2 are needed"),
    "no token": ({"token_ids": [], "loss_mask": []}, "token_ids: 0 tokens; at least 2 are needed"),
    "negative id": ({"token_ids": [5, -1, 7], "loss_mask": MASK}, r"token_ids\[1\]: -1 is outside .*drop the columns"),
    "beyond int32": ({"token_ids": [5, 6, 2**40], "loss_mask": MASK}, r"token_ids\[2\]: 1099511627776 is outside"),
    "mask beyond fp32": ({"token_ids": IDS, "loss_mask": [0, 1, 1e300]}, r"loss_mask\[2\]: 1e\+300 is no weight"),
    "mask below fp32": ({"token_ids": IDS, "loss_mask": [0, 1, 1e-60]}, r"loss_mask\[2\]: 1e-60 is no weight"),
    "negative mask beyond fp32": (
        {"token_ids": IDS, "loss_mask": [0, -1e300, 1]},
        r"loss_mask\[1\]: -1e\+300 is no weight",
    ),
    "negative mask below fp32": (
        {"token_ids": IDS, "loss_mask": [0, -1e-60, 1]},
        r"loss_mask\[1\]: -1e-60 is no weight",
    ),
    "NaN in the mask": ({"token_ids": IDS, "loss_mask": [0, float("nan"), 1]}, r"loss_mask\[1\]: NaN is no weight"),
    "nothing trained": ({"token_ids": IDS, "loss_mask": [0, 0, 0]}, "loss_mask: no token is trained"),
    "first trained": ({"token_ids": IDS, "loss_mask": [1, 1, 1]}, r"loss_mask\[0\]: the first token cannot be trained"),
    "fingerprint of no text": (
        {"token_ids": IDS, "loss_mask": MASK, "tokenizer_fingerprint": 7},
        "tokenizer_fingerprint: expected a string, found 7",
    ),
    "another fingerprint": (
        {"token_ids": IDS, "loss_mask": MASK, "tokenizer_fingerprint": "0123"},
        r'tokenizer_fingerprint: the ids were made with the tokenizer and chat template "0123", .*'
        "use the tokenizer and chat template that the ids were made with, or drop the columns token_ids and loss_mask "
        "to tokenize the text anew",
    ),
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("name", REFUSED)
def test_columns_that_cannot_be_used_are_named(build, tmp_path, suffix, name):
    columns, words = REFUSED[name]
    file = WRITERS[suffix](tmp_path / f"a.{suffix}", plain() | columns)
    place = {"jsonl": r"a\.jsonl, line 1", "parquet": r"a\.parquet, row 1"}[suffix]
    with pytest.raises(RecordError, match=f"{place}, {words}"):
        build(file)


def test_a_mask_may_hold_weights(build, tmp_path):
    rows = own(IDS, [0, 1, 1]), own([5, 6, 7, 8], [0, 0.5, 0, -2]), own(IDS, [0, 1.0, -0.0])
    for suffix, writer in WRITERS.items():
        cache = build(writer(tmp_path / f"a.{suffix}", *rows))
        assert contents(cache) == [(IDS, [0, 1, 1]), ([5, 6, 7, 8], [0, 1, 0, 1]), (IDS, [0, 1, 0])]
        weights = [cache.pack(i).weights.tolist() for i in range(3)]
        assert weights == [[0, 1, 1], [0, 0.5, 0, -2], [0, 1, 0]] and cache.counts.weighted == 1
        assert cache.counts.trained_tokens == 5 and cache.meta["weights"]["negative_tokens"] == 1


def test_weights_that_json_alone_can_spell_are_refused(build, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(own(IDS, [0, 1, 10**400])))
    with pytest.raises(RecordError, match=r"loss_mask\[2\]: 1000+ is no weight"):
        build(tmp_path / "a.jsonl")


def test_the_last_turn_only_takes_one_trained_span(build, tmp_path):
    one, two = own([5, 6, 7, 8], [0, 1, -1, 0]), own([5, 6, 7, 8], [0, -1, 0, 1])
    assert contents(build(write_jsonl(tmp_path / "a.jsonl", one), last_turn_only=True)) == [
        ([5, 6, 7, 8], [0, 1, 1, 0])
    ]
    with pytest.raises(
        RecordError, match=r"loss_mask: 2 trained spans, but only the last turn is to be trained: .*--sft"
    ):
        build(write_jsonl(tmp_path / "b.jsonl", two), last_turn_only=True)


def test_ids_end_at_the_vocabulary(build, tokenizer, tmp_path):
    size = tokenizer.vocab_size
    assert contents(build(write_jsonl(tmp_path / "a.jsonl", own([0, size - 1], [0, 1])))) == [([0, size - 1], [0, 1])]
    with pytest.raises(RecordError, match=rf"token_ids\[0\]: {size} is outside this tokenizer's vocabulary of {size}"):
        build(write_jsonl(tmp_path / "b.jsonl", own([size, 0], [0, 1])))


def test_refused_columns_are_skipped_and_written_down_when_asked(build, tokenizer, tmp_path):
    bad = own([5, 6], [1, 1])
    file = write_jsonl(tmp_path / "a.jsonl", plain(), bad, own([5, 6], [0, 1]), bad)
    cache = build(file, bad_records="skip")
    assert contents(cache) == [tokens_of(tokenizer, plain()), ([5, 6], [0, 1])]
    assert (cache.counts.records, cache.counts.bad, cache.counts.pretokenized) == (4, 2, 1)
    errors = [json.loads(line) for line in (cache.path / "records.errors.jsonl").read_text().splitlines()]
    assert [(error["line"], error["field"]) for error in errors] == [(2, "loss_mask[0]"), (4, "loss_mask[0]")]
    assert "world" in errors[0]["raw"]


def test_another_chat_template_refuses_the_ids_but_not_the_text(build, tokenizer, sentencepiece_model, tmp_path):
    ids, mask = tokens_of(tokenizer, plain())
    row = own(ids, mask, tokenizer_fingerprint=tokenizer.fingerprint())
    assert contents(build(write_jsonl(tmp_path / "a.jsonl", row))) == [(ids, mask)]
    other = load_tokenizer(sentencepiece_model, chat_template="plain")
    with pytest.raises(RecordError, match=f"tokenizer_fingerprint: .*{tokenizer.fingerprint()}.*{other.fingerprint()}"):
        build(tmp_path / "a.jsonl", tokenizer=other)
    remedied = {key: value for key, value in row.items() if key not in ("token_ids", "loss_mask")}
    cache = build(write_jsonl(tmp_path / "b.jsonl", remedied), tokenizer=other)
    assert contents(cache) == [tokens_of(other, plain())] and cache.counts.pretokenized == 0


def test_a_cache_of_the_format_before_own_tokens_is_built_again(build, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", own([5, 6], [0, 1]))
    with monkeypatch.context() as older:
        older.setattr(pack_settings, "CHUNK_FORMAT", 2)
        before = build(file)
    assert build(file).path != before.path


def test_readers_of_records_still_carry_the_columns_through(tmp_path):
    [record] = read_records(write_jsonl(tmp_path / "a.jsonl", own([5, 6], [0, 1])))
    assert record.extra == {"token_ids": [5, 6], "loss_mask": [0, 1]}
