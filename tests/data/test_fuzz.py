"""Drawn records through everything that reads records: each is trained exactly as it says, or refused by name.

FUZZ_RECORDS=20000 draws more of them, FUZZ_SEED=N others; CONTRIBUTING.md says when.
"""

import gzip
import json
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_idft.corpus.json_text import json_text
from megatron_idft.corpus.parquet_values import read_rows
from megatron_idft.corpus.scored_folder import select_records
from megatron_idft.corpus.scores.rows import RECORD_SCHEMA
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.blocks import read_blocks
from megatron_idft.data.packed.encoding import BlockEncoder
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare
from megatron_idft.errors import RecordError
from megatron_idft.hinted_decoding.input.record_store import RecordStore, build_store
from tests.data.chat_templates import FAMILIES, QWEN3, QWEN3_MARKED
from tests.data.fuzzing import json_case, parquet_table
from tests.data.prepared_files import tokenized

RECORDS, SEED = int(os.environ.get("FUZZ_RECORDS", "2000")), os.environ.get("FUZZ_SEED", "0")
LENGTH = 1 << 14
OF_TOKENS = ("loss_mask", "token_ids")  # what only those find who use them


class Corpus:
    """Files of drawn records. cases: (file, line) -> what is right. lines: (file, line) -> bytes."""

    def __init__(self, folder, rng, count):
        self.folder, self.cases, self.lines, self.tables = folder, {}, {}, {}
        folder.mkdir()
        for number, name in enumerate(("a.jsonl", "b.jsonl.gz")):
            drawn = [json_case(rng, f"{number}-{i}") for i in range(count * 3 // 10)]
            data = b"".join(case.line + b"\n" for case in drawn)
            (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
            for line, case in enumerate(drawn, 1):
                self.cases[str(folder / name), line], self.lines[str(folder / name), line] = case, case.line + b"\n"
        left, size = count * 4 // 10, 40
        for number in range(max(left // size, 1)):
            table, drawn = parquet_table(rng, size)
            file = folder / f"t{number}.parquet"
            pq.write_table(table, file, row_group_size=rng.choice([7, 40]))
            self.tables[str(file)] = table
            self.cases |= {(str(file), row): case for row, case in enumerate(drawn, 1)}
        self.files = sorted({file for file, _ in self.cases})


TEMPLATES = {name: template for name, (template, _, _) in FAMILIES.items()}
TEMPLATES |= {"qwen3": QWEN3, "qwen3 marked": QWEN3_MARKED}


def pieces(name, messages):
    """What the template writes, by hand: texts, each with the number of the message whose weight trains it, or None."""
    if name == "mistral":
        yield "<s>", None
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        for i, message in enumerate(messages):
            if message["role"] == "user":
                yield "[INST] ", None
                if i == 1 and system is not None:
                    yield system, 0
                    yield "\n\n", None
                yield message["content"] + " [/INST]", i
            elif message["role"] == "assistant":
                yield f" {message['content']}</s>", i
        return
    if name == "qwen2.5" and messages[0]["role"] != "system":
        yield "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", None
    before, behind = {
        "llama3": ("<|start_header_id|>{}<|end_header_id|>\n\n", ""),
        "gemma": ("<start_of_turn>{}\n", "\n"),
        "cohere": ("<|START_OF_TURN|>{}:", ""),
        "opens the next turn": ("{}\n", "\n<|im_start|>"),
    }.get(name, ("<|im_start|>{}\n", "\n"))
    end = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "cohere": "<|END_OF_TURN|>"}.get(name, "<|im_end|>")
    yield {"opens the next turn": "<|im_start|>"}.get(name, "<s>" if end != "<|im_end|>" else ""), None
    for i, message in enumerate(messages):
        role, text = message["role"], message["content"]
        if name in ("llama3", "gemma"):
            text = text.strip()
        if name == "cohere" and role == "assistant":
            text += "<|END_RESPONSE|>"
        if name.startswith("qwen3") and role == "assistant":
            text = _qwen3(text, message is messages[-1])
        yield before.format("model" if name == "gemma" and role == "assistant" else role), None
        yield text + end, i
        yield behind, None


def _qwen3(text, last):
    """Thoughts stand in the last turn alone, where empty ones are written, too."""
    answer = text.split("</think>")[-1].lstrip("\n")
    thought = text.split("</think>")[0].split("<think>")[-1].strip("\n") if "</think>" in text else ""
    return (f"<think>\n{thought}\n</think>\n\n" if last else "") + answer


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_record_is_trained_as_it_says_or_refused_by_name(name, huggingface_folder, tmp_path):
    tokenizer = load_tokenizer(huggingface_folder("byte-level", TEMPLATES[name]))
    rng = random.Random(f"{SEED} {name}")
    corpus = Corpus(tmp_path / "data", rng, RECORDS // len(TEMPLATES))
    cache = tokenized(tokenizer, tmp_path / "cache", *corpus.files, seq_length=LENGTH, bad_records="skip")
    errors = read_errors(cache.path / "records.errors.jsonl")
    kept = {(row["file"], row["line"]): index for index, row in enumerate(cache.records())}
    blank = {place for place, line in corpus.lines.items() if not line.strip()}
    assert errors.keys() | kept.keys() | blank == corpus.cases.keys() and not errors.keys() & kept.keys()
    for place, error in errors.items():
        check_refusal(name, corpus.cases[place], error)
    lost = 0
    for place, index in kept.items():
        case, (ids, mask) = corpus.cases[place], cache[index]
        assert case.fault is None and case.unreadable is None, (place, case)
        weights = cache.pack(index).weights
        lost += check_tokens(case, ids, mask if weights is None else weights, tokenizer, name)
    assert lost == cache.counts.straddling_spans
    assert len(kept) > len(corpus.cases) / 10 and len(errors) > len(corpus.cases) / 20

    check_blocks(corpus, tokenizer, cache, kept, errors)
    check_store(corpus, tmp_path / "store" / "records")
    check_selection(corpus, kept, tmp_path)
    first = next(place for place in corpus.cases if place in errors)  # in the order of the files
    before = listing(tmp_path)
    with pytest.raises(RecordError) as stopped:
        tokenized(tokenizer, tmp_path / "cache", *corpus.files, seq_length=LENGTH, bad_records="stop")
    assert (stopped.value.file, stopped.value.line) == first and len(str(stopped.value)) < 1500
    assert listing(tmp_path) == before
    assert {path.split("/")[0] for path in before} == {"data", "cache", "store", "scores"}


def read_errors(path):
    found = {}
    for text in path.read_text(encoding="utf-8").split("\n")[:-1]:
        error = json.loads(text)
        assert len(text) < 8000 and len(error["message"]) <= 1000 and len(error["field"]) <= 200, text[:3000]
        assert (error["file"], error["line"]) not in found
        found[error["file"], error["line"]] = error
    return found


def check_refusal(name, case, error):
    """What is refused is named by the field at fault; Gemma's template refuses system messages."""
    if error["field"] not in (case.fault, case.unreadable):
        assert case.fault is None and case.unreadable is None, (error, case)
        assert name == "gemma" and case.messages[0]["role"] == "system" and "System role" in error["message"]


def check_tokens(case, ids, weights, tokenizer, name):
    """A token weighs what the message does in whose piece of the text it begins. How many of these lost a beginning."""
    if case.ids is not None:
        assert ids.tolist() == case.ids[0] and weights.tolist() == np.array(case.ids[1], np.float32).tolist()
        return 0
    written = list(pieces(name, case.messages))
    text = "".join(piece for piece, _ in written)
    assert text == tokenizer.template.render(case.messages)
    of_letters = [0.0 if i is None else case.weights[i] for piece, i in written for _ in piece]
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    wanted = [of_letters[begin] for begin, _ in encoding.offsets]
    starts, at = set(), 0
    for piece, i in written:
        starts |= {at} if i is not None and case.weights[i] else set()
        at += len(piece)
    lost = {start for start in starts for begin, end in encoding.offsets if begin < start < end}
    assert ids.tolist() == encoding.ids and weights.tolist() == np.array(wanted, np.float32).tolist(), case
    return len(lost)


def check_blocks(corpus, tokenizer, cache, kept, errors):
    """`prepare` reads and encodes as `train` does."""
    encoder = BlockEncoder(tokenizer, PrepareSettings(tuple(corpus.files), seq_length=LENGTH, bad_records="skip"))
    found, refused = 0, {}
    for block in read_blocks(corpus.files, 20_000):
        chunk = encoder.encode(block)
        refused |= {(error["file"], error["line"]): error for error in chunk.info.errors}
        ends = np.cumsum(chunk.lengths)
        for line, end, length in zip(chunk.lines.tolist(), ends.tolist(), chunk.lengths.tolist(), strict=True):
            index = kept[block.file, line]
            ids, mask = cache[index]
            weights = cache.pack(index).weights
            assert np.array_equal(chunk.ids[end - length : end], ids)
            assert np.array_equal(chunk.loss[end - length : end], mask if weights is None else weights)
            found += 1
    assert found == len(kept)
    assert {p: (e["field"], e["message"]) for p, e in refused.items()} == {
        p: (e["field"], e["message"]) for p, e in errors.items()
    }


def check_store(corpus, path):
    """`realign` reads the same conversations, and refuses what it could not write again."""
    build_store(path, corpus.files, None, "skip")
    store, errors = RecordStore(path), read_errors(path / "errors.jsonl")
    blank = {place for place, line in corpus.lines.items() if not line.strip()}
    assert len(store) + len(errors) + len(blank) == len(corpus.cases)
    for place, error in errors.items():
        case = corpus.cases[place]
        assert error["field"] in (case.fault, case.unreadable, case.unwritable), (error, case)
    for record in map(store.__getitem__, range(len(store))):
        case = corpus.cases[record.file, record.line]
        assert (record.file, record.line) not in errors and case.unwritable is None
        if case.fault is not None:
            assert case.fault.partition("[")[0] in OF_TOKENS, case
            continue
        said = [{key: message[key] for key in ("role", "content")} for message in record.messages]
        assert said == case.messages and case.identity in (None, record.id)
        json_text({"record": record.extra})
    assert path.parent.exists() and listing(path.parent) == [
        "records/errors.jsonl",
        "records/meta.json",
        "records/records.parquet",
    ]


def check_selection(corpus, kept, folder):
    """`score select` gives back half of what was kept, byte for byte or value for value; or says why not."""
    (folder / "scores" / "parts").mkdir(parents=True)
    chosen = [place for place in corpus.cases if place in kept and kept[place] % 2]
    rows = [{"file": file, "line": line, "phi_mean": float((file, line) in chosen)} for file, line in kept]
    pq.write_table(pa.Table.from_pylist(rows, RECORD_SCHEMA), folder / "scores" / "parts" / "chunk-000000.parquet")

    def select(files, output):
        place = folder / "scores" / "parts" / "chunk-000000.parquet"
        scores = [row for row in rows if row["file"] in files]
        pq.write_table(pa.Table.from_pylist(scores, RECORD_SCHEMA), place)
        return select_records(folder / "scores", "phi_mean > 0", files, folder / output)

    lines = [file for file in corpus.files if not file.endswith("parquet")]
    select(lines, "out.jsonl")
    wanted = [corpus.lines[place] for place in sorted(chosen) if place[0] in lines]
    assert (folder / "out.jsonl").read_bytes() == b"".join(wanted)
    (folder / "out.jsonl").unlink()
    for file, table in corpus.tables.items():
        places = [row for name, row in chosen if name == file]
        select([file], "out.parquet")
        found = pq.read_table(folder / "out.parquet")
        assert found.schema.equals(pq.read_schema(file))
        assert values(found) == values(pq.read_table(file).take(pa.array([row - 1 for row in places], pa.int64())))
        (folder / "out.parquet").unlink()
        unwritable = next(
            (corpus.cases[file, row].unwritable for row in places if corpus.cases[file, row].unwritable), None
        )
        if unwritable:
            with pytest.raises(RecordError, match=rf"{unwritable}: cannot be written as JSON"):
                select([file], "out.jsonl")
        else:
            select([file], "out.jsonl")
            texts = (folder / "out.jsonl").read_bytes().splitlines()
            assert [json.loads(text, parse_constant=pytest.fail).keys() for text in texts] == [
                set(table.column_names)
            ] * len(places)
            (folder / "out.jsonl").unlink()


def values(table):
    return [repr(row) for batch in table.to_batches() for row in read_rows(batch)]


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_prepare_skips_and_stops_alike(huggingface_folder, tmp_path):
    """The verb itself, with processes: all good records are packed, all bad ones listed, nothing else is left."""
    tokenizer = load_tokenizer(huggingface_folder("byte-level", FAMILIES["chatml"][0]))
    corpus = Corpus(tmp_path / "data", random.Random(SEED), RECORDS // 10)
    options = {"seq_length": LENGTH, "chunk_bytes": 20_000}
    skip = PrepareSettings(tuple(corpus.files), bad_records="skip", **options)
    (tmp_path / "packs").mkdir()
    done = prepare(skip, tokenizer, tmp_path / "packs" / "p", workers=2, progress=False)
    errors = read_errors(tmp_path / "packs" / "p.errors.jsonl")
    counts = done.store.meta["counts"]
    blank = sum(not line.strip() for line in corpus.lines.values())
    assert counts["bad"] == len(errors) and counts["kept"] + len(errors) + blank == len(corpus.cases)
    for place, error in errors.items():
        check_refusal("chatml", corpus.cases[place], error)
    assert not [path for path in (tmp_path / "packs").iterdir() if path.name.startswith(".") or path.is_dir()]
    stop = PrepareSettings(tuple(corpus.files), **options)
    with pytest.raises(RecordError) as stopped:
        prepare(stop, tokenizer, tmp_path / "packs" / "q", workers=2, progress=False)
    assert (stopped.value.file, stopped.value.line) in errors and len(str(stopped.value)) < 1500
