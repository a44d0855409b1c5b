"""From `score` to training: each trained token meets its own log q, whatever the form of the data and the layout.

The reference is the model that training begins with. So in the first step p = q for every token, to rounding, and the
distance to the reference is 0; a number that went to another token would show. Later steps move away from it.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare
from megatron_idft.data.packed.store import PackedStore
from megatron_idft.data.reference.columns import ReferenceColumns
from megatron_idft.data.reference.settings import ReferenceSettings
from tests.launch import forked
from tests.run_outputs import load_scalars
from tests.tiny_corpora import additions, write_records
from tests.tiny_tokenizers import train_tokenizer

SEQ_LENGTH, TOP_K = 48, 4
# Without attention it also runs under context parallelism: Megatron's local attention does not.
MODEL = f"""
    --hybrid-layer-pattern=---- --position-embedding-type none --hidden-size 32 --num-attention-heads 4
    --seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH} --chat-template chatml --hidden-dropout 0
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Records of two sources, a model, its scores, and packs with their numbers."""
    folder = tmp_path_factory.mktemp("corpus")
    records = additions(48, [1, 2])
    for number, record in enumerate(records):
        record["source"] = "even" if number % 2 == 0 else "odd"
    write_records(folder / "train.jsonl", records)
    train_tokenizer(folder)
    data = f"--sft-data {folder / 'train.jsonl'} --tokenizer-model {folder / 'tokenizer.model'}"
    model = f"--train-iters 20 --micro-batch-size 8 --global-batch-size 8 --lr 1e-2 --save {folder / 'model'}"
    forked(["-m", "megatron_idft", "train", *f"{MODEL} {data} {model} --lr-decay-style constant".split()])
    score = f"{MODEL} {data} --load {folder / 'model'} --output {folder / 'scores'} --reference-top-k {TOP_K}"
    forked(["-m", "megatron_idft", "score", *f"{score} --chunk-records 10".split()])
    tokenizer = load_tokenizer(str(folder / "tokenizer.model"), "chatml")
    reference = ReferenceSettings(str(folder / "scores"), ReferenceColumns(entropy=True, top_k=TOP_K))
    for name, of in (("packs", reference), ("plain", None)):
        settings = PrepareSettings((str(folder / "train.jsonl"),), SEQ_LENGTH, reference=of)
        prepare(settings, tokenizer, folder / name, workers=0, progress=False)
    return folder


def train(corpus: Path, folder: Path, data: str, flags: str, nproc: int = 1) -> str:
    words = f"{MODEL} --sft-data {data} --tokenizer-model {corpus / 'tokenizer.model'} --load {corpus / 'model'}"
    words += f" --finetune --train-iters 3 --global-batch-size 4 --lr 1e-2 --lr-decay-style constant {flags}"
    return forked(["-m", "megatron_idft", "train", *words.split(), "--tensorboard-dir", str(folder)], nproc=nproc)


def test_the_packs_hold_the_scorers_numbers_to_the_bit(corpus):
    store, scored = PackedStore(corpus / "packs"), {}
    for part in sorted((corpus / "scores" / "parts").glob("*.parquet")):
        scored |= {row["line"]: row for row in pq.read_table(part).to_pylist()}
    manifest = json.loads((corpus / "scores" / "manifest.json").read_text())["settings"]
    assert manifest["tokenizer"] == store.meta["settings"]["tokenizer"] and manifest["checkpoint"]
    assert store.meta["reference"]["recorded"] == manifest
    for index in range(len(store)):
        pack = store.pack(index)
        for document, (_, line) in zip(pack.documents(), store.origins(index), strict=True):
            row, at = scored.pop(line), np.flatnonzero(pack.mask[document])
            assert at.tolist() == row["positions"] and pack.ids[document][at].tolist() == row["token_ids"]
            for column, name in {"log_prob": "log_prob", "entropy": "entropy", "top_log_prob": "top_log_prob"}.items():
                wanted = np.array(row[name], dtype=np.float32).reshape(len(at), -1)
                assert np.array_equal(pack.reference[column][document][at].reshape(len(at), -1), wanted), name
            assert pack.reference["top_ids"][document][at].ravel().tolist() == row["top_token_ids"]
    assert not scored


PACKS, RECORDS = "{corpus}/packs", "{corpus}/train.jsonl"
VIRTUAL = "--hybrid-layer-pattern=-|-|-|- --pipeline-model-parallel-size 2"  # two virtual stages on each rank
RUNS = [
    ("asft_topk", PACKS, 2, "--micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    ("prift", PACKS, 2, f"{VIRTUAL} --micro-batch-size 1 --sft-valid-data {{corpus}}/plain"),
    ("idft --idft-weights reference", RECORDS, 2, "--micro-batch-size 2 --context-parallel-size 2"),
    ("asft", RECORDS, 1, "--micro-batch-size 2 --sft-packing --sft-reference-dtype float16"),
]


@pytest.mark.parametrize(("objective", "data", "nproc", "layout"), RUNS)
def test_the_first_step_is_no_distance_from_the_reference(corpus, tmp_path, objective, data, nproc, layout):
    flags = f"--sft-loss {objective} {layout}"
    if data == RECORDS:
        flags += f" --sft-reference {corpus / 'scores'}"
    output = train(corpus, tmp_path, data.format(corpus=corpus), flags.format(corpus=corpus), nproc)
    assert f"{corpus / 'model'}, iteration 20; its log q is -" in output
    scalars = load_scalars(tmp_path)
    distance, far = scalars["reference/k3"], 1e-5 if "float16" in layout else 1e-9
    assert 0 <= distance[1] < far and abs(scalars["reference/log ratio mean"][1]) < 10 * far**0.5, scalars
    assert distance[3] > 100 * far, "the model has moved"


def test_an_objective_without_a_reference_reads_none_and_one_with_it_is_refused_without(corpus, tmp_path):
    output = train(corpus, tmp_path, f"{corpus}/packs", "--sft-loss dft --micro-batch-size 1")
    assert f"> not read: the reference model of {corpus}/packs; --sft-loss dft compares with none" in output
    with pytest.raises(AssertionError, match=r"--sft-loss asft .*plain does not hold .*--sft-reference SCORES"):
        train(corpus, tmp_path, f"{corpus}/packs {corpus}/plain", "--sft-loss asft --micro-batch-size 1")
