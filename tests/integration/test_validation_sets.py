"""Validation sets by name and metrics by source, measured against each other.

A step that trains all records at once measures, before it changes the model, what the evaluation before it measured on
the same records; and a source's tokens within a set are those of a set that holds this source alone.
"""

import argparse
import json
import random
from pathlib import Path

import pytest

from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare
from megatron_idft.data.validation_sets import named_sets
from megatron_idft.errors import ArgumentError, InputError
from megatron_idft.integration.training.arguments import validate_evaluation_arguments
from tests.launch import forked
from tests.run_outputs import load_scalars
from tests.tiny_tokenizers import train_tokenizer

SEQ_LENGTH = 32
FLAGS = f"""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length {SEQ_LENGTH} --position-embedding-type rope
    --max-position-embeddings {SEQ_LENGTH} --lr 2e-2 --lr-decay-style constant --log-interval 1
    --hidden-dropout 0 --attention-dropout 0 --chat-template chatml --sft-loss idft
    --make-vocab-size-divisible-by 32
"""
DDT = ("ddt/phi mean", "ddt/phi std", "ddt/phi below -1", "ddt/phi below -3", "ddt/phi below -5", "ddt/entropy")
SOURCES = ("sums", "products")


def records(source: str, count: int, seed: int) -> list[str]:
    rng = random.Random(f"{source} {seed}")
    lines = []
    for _ in range(count):
        ids = [rng.randrange(8, 30) if source == "sums" else rng.randrange(25, 56) for _ in range(rng.randrange(4, 12))]
        mask = [0, 0, *(rng.choice((1, 1, 0.5)) for _ in ids[2:])]
        record = {"prompt": "1?", "response": "2", "token_ids": ids, "loss_mask": mask, "source": source}
        lines.append(json.dumps(record))
    return lines


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    train_tokenizer(folder)
    each = {source: records(source, 6, seed=1) for source in SOURCES}
    # Twelve records in an order that mixes the sources.
    files = each | {"all": [line for pair in zip(*each.values(), strict=True) for line in pair]}
    tokenizer = load_tokenizer(str(folder / "tokenizer.model"), chat_template="chatml")
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        settings = PrepareSettings(paths=(str(folder / f"{name}.jsonl"),), seq_length=SEQ_LENGTH)
        prepare(settings, tokenizer, folder / f"packed-{name}", workers=1, progress=False)
    return folder


def train(corpus: Path, folder: Path, flags: str, *more: str, nproc: int = 1) -> str:
    words = f"{FLAGS} --tokenizer-model {corpus / 'tokenizer.model'} --save {folder} --tensorboard-dir {folder} {flags}"
    return forked(["-m", "megatron_idft", "train", *words.split(), *more], nproc=nproc)


def data(corpus: Path, prefix: str = "", suffix: str = ".jsonl") -> str:
    def path(name: str) -> Path:
        return corpus / f"{prefix}{name}{suffix}"

    return f"--sft-data {path('all')} --sft-valid-data {path('all')} " + " ".join(
        f"{source}={path(source)}" for source in SOURCES
    )


# By this, the first checkpoint is the best: it must outlive the others and a resume.
RANKED_BY = "ddt/phi mean validation"
KEEP = ["--sft-keep-best-metric", RANKED_BY, *["--sft-keep-best", "1", "--sft-keep-best-mode", "max"]]
INTERVALS = "--eval-interval 2 --save-interval 2"
BATCH = "--micro-batch-size 4 --global-batch-size 12 --eval-global-batch-size 8 --eval-micro-batch-size 2"


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> tuple[Path, str, dict]:
    folder = tmp_path_factory.mktemp("run")
    output = train(corpus, folder, f"{data(corpus)} {BATCH} {INTERVALS} --train-iters 8", *KEEP)
    return folder, output, load_scalars(folder)


def test_every_set_is_evaluated_before_the_first_step_and_then_at_each_interval(run):
    _, output, scalars = run
    for ending in ("validation", *(f"validation-{source}" for source in SOURCES)):
        for key in ("lm loss", *DDT):
            assert sorted(scalars[f"{key} {ending}"]) == [0, 2, 4, 6, 8], f"{key} {ending}"
    assert "sft validation-sums at iteration 0 | ddt/phi mean:" in output
    assert "sft validation at iteration 0 | source products | lm loss:" in output


def test_a_source_is_measured_as_if_it_were_alone(run):
    _, _, scalars = run
    for source in SOURCES:
        for key in ("lm loss", *DDT, "trained tokens"):
            of_set = scalars[f"{key} validation-{source}"]
            assert scalars[f"{key} validation source-{source}"] == pytest.approx(of_set, rel=1e-5), key
    tokens = {source: scalars[f"trained tokens validation-{source}"][0] for source in SOURCES}
    assert sum(tokens.values()) == scalars["trained tokens validation"][0]
    for key in ("lm loss", "ddt/phi mean", "ddt/entropy"):
        mean = sum(scalars[f"{key} validation-{source}"][4] * n for source, n in tokens.items()) / sum(tokens.values())
        assert scalars[f"{key} validation"][4] == pytest.approx(mean, rel=1e-5), key
    assert abs(scalars["lm loss validation-sums"][0] - scalars["lm loss validation-products"][0]) > 1e-4


def test_a_step_over_all_records_measures_what_the_evaluation_before_it_did(run):
    _, _, scalars = run
    for step in (1, 3, 5, 7):
        for source in ("", *SOURCES):
            for key in DDT if source == "" else ("lm loss", *DDT, "trained tokens"):
                trained = scalars[f"{key} source-{source}" if source else key][step]
                evaluated = scalars[f"{key} validation-{source}" if source else f"{key} validation"][step - 1]
                assert trained == pytest.approx(evaluated, rel=1e-4, abs=1e-6), (key, source, step)
        assert scalars["lm loss"][step] == pytest.approx(scalars["lm loss validation"][step - 1], rel=1e-4)
    assert "idft/gamma mean source-sums" in scalars and "sft weight mean source-products" in scalars


def test_packs_over_tensor_and_data_parallel_ranks_measure_the_same(corpus, run, tmp_path):
    _, _, scalars = run
    # The number of packs of all records, and so of one step over all of them, is not known beforehand.
    packs = json.loads((corpus / "packed-all.json").read_text())["packs"]
    batch = f"--micro-batch-size 1 --global-batch-size {packs + packs % 2} --eval-global-batch-size 2"
    flags = f"{data(corpus, 'packed-', '')} {batch} --train-epochs 1 --tensor-model-parallel-size 2"
    train(corpus, tmp_path, flags, nproc=4)
    got = load_scalars(tmp_path)
    for source in ("", *SOURCES):
        ending = f"-{source}" if source else ""
        for key in ("lm loss", *DDT, "trained tokens"):
            assert got[f"{key} validation{ending}"][0] == pytest.approx(
                scalars[f"{key} validation{ending}"][0], rel=1e-4, abs=1e-6
            ), (key, source)
            if source:
                assert got[f"{key} source-{source}"][1] == pytest.approx(
                    scalars[f"{key} source-{source}"][1], rel=1e-4, abs=1e-6
                )


def test_the_best_checkpoint_stays_over_a_resume_on_two_stages(corpus, run):
    folder, _, scalars = run
    values = scalars[RANKED_BY]
    best = max((2, 4, 6, 8), key=values.__getitem__)
    assert best < 8 and kept(folder) == [best, 8]
    flags = f"{data(corpus)} {BATCH} {INTERVALS} --load {folder} --train-iters 12 --override-opt_param-scheduler"
    output = train(corpus, folder, f"{flags} --pipeline-model-parallel-size 2", *KEEP, nproc=2)
    assert "at iteration 0 " not in output, "a continued run has been evaluated before its first step"
    values = load_scalars(folder)[RANKED_BY]
    assert values[10] < values[best] and values[12] < values[best]
    assert kept(folder) == [best, 12] and f"> the best checkpoints by {RANKED_BY}: iterations {best} (" in output


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*"))


def test_sets_are_named_on_the_command_line(tmp_path):
    odd = tmp_path / "a=b.jsonl"
    odd.write_text("")
    assert named_sets(["x.jsonl", "math=a", "code=b", "math=c", "y", "/data/run=3/z", str(odd)]) == {
        "": ["x.jsonl", "y", "/data/run=3/z", str(odd)],
        "math": ["a", "c"],
        "code": ["b"],
    }
    for word, reason in (("math=", "no file behind the name"), ("a b=x", "is no name")):
        with pytest.raises(InputError, match=reason):
            named_sets([word])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sft_keep_best": None}, "--sft-keep-best-mode was given without --sft-keep-best K"),
        ({"sft_keep_best": 0}, "pass a whole number from 1"),
        ({"save": None}, "pass --save DIR"),
        ({"sft_valid_data": None}, "pass --sft-valid-data FILE"),
        ({"save_interval": 3}, "a multiple of the former"),
        ({"eval_interval": None}, "a multiple of the former"),
        ({"save_retain_interval": 4}, "--save-retain-interval deletes checkpoints as well"),
    ],
)
def test_what_cannot_rank_checkpoints_is_refused(changes, reason):
    args = argparse.Namespace(
        sft_keep_best=1,
        sft_keep_best_metric=None,
        sft_keep_best_mode="min",
        sft_valid_data=["x"],
        save="y",
        save_interval=4,
        eval_interval=2,
        save_retain_interval=None,
    )
    validate_evaluation_arguments(args)
    with pytest.raises(ArgumentError, match=reason):
        validate_evaluation_arguments(argparse.Namespace(**vars(args) | changes))
