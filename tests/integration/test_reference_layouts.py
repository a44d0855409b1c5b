"""Objectives with a reference train alike in every layout: its columns reach the loss of the rank that needs them.

Records hold their own ids and what a reference said of every token, each number another, so that one that lands on a
wrong place changes the loss. Each step reads all records, in packs; the first test also compares a step with sums over
the records themselves. The layouts go on from a checkpoint of one process.
"""

import json
import math
import random
from pathlib import Path

import pytest

from tests.launch import forked
from tests.run_outputs import load_scalars
from tests.tiny_tokenizers import train_tokenizer

SEQ_LENGTH, K = 32, 3
COMMON = f"""
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length {SEQ_LENGTH}
    --max-position-embeddings {SEQ_LENGTH} --position-embedding-type rope --lr 1e-3 --lr-decay-style constant
    --log-interval 1 --train-iters 4 --hidden-dropout 0 --attention-dropout 0 --chat-template chatml
    --make-vocab-size-divisible-by 32 --global-batch-size 4 --sft-packing
    --sft-reference records --sft-reference-top-k {K}
"""
PACKS = [(22, 10), (20, 12), (15, 9, 8), (32,)]  # positions of their documents: four full packs
COMPARED = ("grad-norm", "lm loss", "sft loss", "sft weight mean", "reference/log ratio mean", "reference/k3")
RTOL = 1e-5  # sums are taken in another order; nothing else may differ


def records() -> list[dict]:
    rng = random.Random(5)
    found = []
    for length in (length for lengths in PACKS for length in lengths):
        n = length + 1
        top = [sorted((-rng.uniform(1.2, 4) for _ in range(K)), reverse=True) for _ in range(n)]
        prompt = rng.randrange(1, length) if length < SEQ_LENGTH else length - 2
        found.append(
            {
                "prompt": "1?",
                "response": "2",
                "token_ids": [rng.randrange(8, 56) for _ in range(n)],
                "loss_mask": [0] * prompt + [1] * (n - prompt),
                "reference_log_prob": [-rng.uniform(0.5, 6) for _ in range(n)],
                "reference_entropy": [rng.uniform(0.5, 3) for _ in range(n)],
                "reference_top_token_ids": [rng.sample(range(8, 56), K) for _ in range(n)],
                "reference_top_log_prob": top,
            }
        )
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    train_tokenizer(folder)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    return folder


def train(corpus: Path, folder: Path, flags: str, nproc: int = 1) -> str:
    words = f"{COMMON} --sft-data {corpus / 'records.jsonl'} --tokenizer-model {corpus / 'tokenizer.model'} {flags}"
    return forked(["-m", "megatron_idft", "train", *f"{words} --tensorboard-dir {folder}".split()], nproc=nproc)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Objective -> the run of one process over whole batches, when first asked for."""
    made: dict[str, Path] = {}

    def run(objective: str) -> Path:
        if objective not in made:
            made[objective] = tmp_path_factory.mktemp("alone")
            flags = f"--micro-batch-size 4 --save {made[objective]} --save-interval 2"
            train(corpus, made[objective], f"{flags} --sft-loss {objective}")
        return made[objective]

    return run


def test_metrics_are_those_of_the_records(alone):
    """Of the first step, from the records and what does not depend on the reference: cross-entropy."""
    scalars = load_scalars(alone("gift --gift-beta 3"))
    trained = [(record, t) for record in records() for t, on in enumerate(record["loss_mask"]) if on]
    log_q = [record["reference_log_prob"][t] for record, t in trained]
    assert scalars["trained tokens"][1] == len(trained)
    want = -scalars["lm loss"][1] - sum(log_q) / len(log_q)
    assert scalars["reference/log ratio mean"][1] == pytest.approx(want, rel=1e-5)
    weight = sum(1 - 1 / (1 + math.exp(lq) * math.expm1(3)) for lq in log_q) / len(log_q)
    assert scalars["sft weight mean"][1] == pytest.approx(weight, rel=1e-5)
    # Random weights: p is nearly uniform, so KL(q, p) follows from the reference alone.
    top = [[math.exp(x) for x in record["reference_top_log_prob"][t]] for record, t in trained]
    vocabulary = round(math.exp(scalars["ddt/entropy"][1]))
    kl = [
        sum(q * math.log(q * vocabulary) for q in qs) + (1 - sum(qs)) * math.log((1 - sum(qs)) / (1 - K / vocabulary))
        for qs in top
    ]
    assert scalars["reference/kl"][1] == pytest.approx(sum(kl) / len(kl), rel=0.05)


TENSOR = "--micro-batch-size 2 --tensor-model-parallel-size 2"
PIPELINE = "--micro-batch-size 1 --pipeline-model-parallel-size 2"
LAYOUTS = [
    ("gift --gift-beta 3", 2, f"{TENSOR} --sequence-parallel"),
    ("gift --gift-beta 3", 2, f"{PIPELINE} --num-layers-per-virtual-pipeline-stage 1"),
    (
        "gift --gift-beta 3",
        4,
        "--micro-batch-size 1 --tensor-model-parallel-size 2",
    ),  # and data parallel, two micro-batches
    (
        "gift --gift-beta 3",
        4,
        "--micro-batch-size 1 --tensor-model-parallel-size 2 --sft-loss-head fused --sft-loss-chunk-tokens 9",
    ),
    ("idft --idft-weights reference", 2, f"{PIPELINE}"),
    # Negative weights, by the kernels: interpreted where there is no GPU.
    (
        "asft --anchor-coefficient 0.5",
        2,
        "--micro-batch-size 2 --tensor-model-parallel-size 2 --sft-loss-backend triton",
    ),
]


@pytest.mark.parametrize(("objective", "processes", "layout"), LAYOUTS)
def test_layouts_train_like_one_process(corpus, alone, tmp_path, objective, processes, layout):
    start = alone(objective)
    output = train(corpus, tmp_path, f"{layout} --load {start} --ckpt-step 2 --sft-loss {objective}", processes)
    assert "reads the reference's" in output and ("WARNING: this run continues" in output) == ("fused" in layout)
    expected, got = load_scalars(start), load_scalars(tmp_path)
    keys = [*COMPARED, *(key for key in ("reference/kl", "sft weight negative", "idft/gamma mean") if key in expected)]
    assert ("reference/kl" in keys) == objective.startswith("gift")
    assert not objective.startswith("asft") or 0.05 < expected["sft weight negative"][1] < 0.95
    for key in keys:
        assert got[key] == pytest.approx({step: expected[key][step] for step in (3, 4)}, rel=RTOL, abs=1e-6), key
