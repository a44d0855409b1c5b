"""Training from packs is training on their documents one by one, in every layout, and resumes to the bit.

Four packs of eight documents, all of them in every step, so that packed and unpacked runs see the same tokens between
two updates. One pack holds a single trained token: the odd micro-batch, and one rank's whole share under four-way data
parallelism. The unpacked runs read the same records as JSONL, through the other datasets and batches of `train`.
"""

import json
import random
from argparse import Namespace
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.prepare import prepare
from megatron_idft.data.packed.store import PackedStore
from megatron_idft.integration.training import data as training_data
from megatron_idft.integration.training.data import NamedData, TrainingData
from megatron_idft.integration.training.packed_attention import packed_sequence_parameters
from tests.launch import forked
from tests.run_outputs import differences, load_checkpoint, load_scalars
from tests.tiny_tokenizers import train_tokenizer

HERE = Path(__file__).parent
PROGRAM = ("-m", "megatron_idft", "train")
SEQ_LENGTH = 32
COMMON = f"""
    --hidden-size 32 --num-attention-heads 4 --seq-length {SEQ_LENGTH}
    --max-position-embeddings {SEQ_LENGTH} --lr 1e-3 --lr-decay-style constant --log-interval 1
    --hidden-dropout 0 --attention-dropout 0 --chat-template chatml --sft-loss idft
    --make-vocab-size-divisible-by 32
"""
COMPARED = ("grad-norm", "lm loss", "sft loss", "ddt/phi mean", "ddt/entropy", "trained tokens")
# Sums are taken in another order; nothing else may differ.
RTOL = 1e-5
# Positions that the documents of a pack take: one less than their ids. Each pack is full, so there are four.
PACKS = [(22, 10), (20, 12), (15, 9, 8), (32,)]


def records(seed: int, packs: Sequence[tuple[int, ...]] = PACKS) -> list[str]:
    """Own tokens and loss weights. A document that is a full pack by itself trains its last token alone."""
    rng = random.Random(seed)
    lines = []
    for length in (length for lengths in packs for length in lengths):
        ids = [rng.randrange(8, 56) for _ in range(length + 1)]
        prompt = rng.randrange(1, length) if length < SEQ_LENGTH else length
        weights = [0] * prompt + [rng.choice((1, 1, 0.5, 2)) for _ in range(length + 1 - prompt)]
        lines.append(json.dumps({"prompt": "1?", "response": "2", "token_ids": ids, "loss_mask": weights}))
    return lines


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    train_tokenizer(folder)
    tokenizer = load_tokenizer(str(folder / "tokenizer.model"), chat_template="chatml")
    for name, seed in (("packs", 3), ("others", 4)):
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(records(seed)) + "\n")
        settings = PrepareSettings(paths=(str(file),), seq_length=SEQ_LENGTH)
        prepare(settings, tokenizer, folder / name, workers=1, progress=False)
    return folder


def train(
    corpus: Path, folder: Path, data: str, flags: str, nproc: int = 1, script: Sequence[str | Path] = PROGRAM
) -> str:
    words = f"{COMMON} --sft-data {data} --tokenizer-model {corpus / 'tokenizer.model'} {flags}"
    words += f" --save {folder} --tensorboard-dir {folder / 'tensorboard'}"
    return forked([*script, *words.split()], nproc=nproc)


MODELS = {
    # Learned positions tell where a document begins; rotary ones only how far apart two tokens are.
    "gpt": "--num-layers 4 --position-embedding-type learned_absolute",
    "hybrid": "--hybrid-layer-pattern *-*- --position-embedding-type rope --untie-embeddings-and-output-weights",
    # Under a loss of load balancing a token's gradient depends on which others are in its micro-batch, padding too.
    # Megatron cannot cut an optimizer's state anew for expert parallelism, so here it has none.
    "experts": "--num-layers 2 --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
    " --moe-router-load-balancing-type none --disable-bias-linear --position-embedding-type rope"
    " --optimizer sgd --sgd-momentum 0 --no-load-optim --lr 1",
    "mlp": "--hybrid-layer-pattern=---- --position-embedding-type none",
}


@pytest.fixture(scope="module")
def unpacked(corpus, tmp_path_factory):
    """Model -> one process over all documents, one by one; made when first asked for."""
    made: dict[str, Path] = {}

    def run(model: str) -> Path:
        if model not in made:
            made[model] = tmp_path_factory.mktemp("unpacked")
            flags = f"--micro-batch-size 8 --global-batch-size 8 --train-iters 5 --save-interval 2 {MODELS[model]}"
            train(corpus, made[model], corpus / "packs.jsonl", flags)
        return made[model]

    return run


def continue_packed(
    corpus: Path,
    start: Path,
    folder: Path,
    model: str,
    layout: str,
    nproc: int,
    script: Sequence[str | Path] = PROGRAM,
    data: str = "packs",
) -> str:
    """Steps 3 to 5 of an unpacked run, over packs. What its steps counted in samples is twice as much."""
    flags = f"--load {start} --ckpt-step 2 --override-opt_param-scheduler --train-iters 7 --exit-interval 5"
    flags += f" --global-batch-size {len(PACKS)} {layout} {MODELS[model]}"
    output = train(corpus, folder, corpus / data, flags, nproc, script)
    assert "WARNING: this run continues a checkpoint that was trained on data-" in output
    return output


def assert_same_training(reference: Path, folder: Path, steps=range(3, 6)) -> None:
    expected, got = load_scalars(reference / "tensorboard"), load_scalars(folder / "tensorboard")
    for key in COMPARED:
        for step in steps:
            torch.testing.assert_close(
                got[key][step], expected[key][step], rtol=RTOL, atol=1e-6, msg=lambda m, k=key, s=step: f"{k}, {s}: {m}"
            )
    saved, reference_saved = (load_checkpoint(run, steps[-1]) for run in (folder, reference))
    names = [name for name, value in reference_saved.items() if isinstance(value, torch.Tensor) and "rng" not in name]
    gradients = [name for name in names if name.endswith(".weight") and "exp_avg." in name]
    kept = any("exp_avg" in name for name in names)  # plain SGD keeps none
    assert len(gradients) >= 6 or not kept, "the averages of the gradients are compared too"
    for name in names:
        # Adam divides by the root of the second moment, so a weight whose gradient is rounding noise moves by up to
        # the learning rate in a random direction: the absolute part is 1 % of one step.
        torch.testing.assert_close(
            saved[name], reference_saved[name], rtol=RTOL, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


PIPELINE = "--micro-batch-size 1 --pipeline-model-parallel-size 2"
VIRTUAL = f"{PIPELINE} --num-layers-per-virtual-pipeline-stage 1"
LAYOUTS = [
    ("hybrid", 1, "--micro-batch-size 4"),
    ("gpt", 2, "--micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    ("gpt", 2, VIRTUAL),  # four micro-batches, one of them odd
    ("gpt", 4, PIPELINE),  # and data parallel
    ("gpt", 4, "--micro-batch-size 1"),  # data parallel: one rank has the odd pack alone
    ("experts", 4, "--micro-batch-size 1 --expert-model-parallel-size 2"),  # the same, over two pairs of ranks
]


def test_the_packs_are_what_the_tests_rest_on(corpus):
    store = PackedStore(corpus / "packs")
    packs = [store.pack(index) for index in range(len(store))]
    assert sorted(len(pack.starts) for pack in packs) == sorted(map(len, PACKS))
    assert sorted(int(pack.mask.sum()) for pack in packs)[:2] < [2, 10], "one trains a single token, the others more"
    assert all(pack.weights is not None and {0.5, 2} & set(pack.weights) for pack in packs if pack.mask.sum() > 1)


@pytest.mark.parametrize("context_parallel_size", [1, 2])
def test_kernels_are_told_the_longest_document_of_the_run(corpus, tmp_path, monkeypatch, context_parallel_size):
    """In each micro-batch of training and validation, however short its own documents and whatever the rank reads."""
    prefixes, tokenizer = {}, load_tokenizer(str(corpus / "tokenizer.model"), chat_template="chatml")
    for name, lengths in {"a": (5, 6, 7, 3), "b": (4, 9), "c": (13, 2), "d": (17,)}.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(records(5, [lengths])) + "\n")
        settings = PrepareSettings(paths=(str(file),), seq_length=SEQ_LENGTH, pad_multiple=4)
        prepare(settings, tokenizer, tmp_path / name, workers=1, progress=False)
        prefixes[name] = str(tmp_path / name)
    args = Namespace(
        seq_length=SEQ_LENGTH,
        seed=1,
        train_epochs=None,
        sft_loss=None,
        sft_normalization=["token"],
        sft_normalization_constant=None,
        context_parallel_size=context_parallel_size,
        mtp_num_layers=None,
        position_embedding_type="none",
    )

    def constants(valid, reads):
        monkeypatch.setattr(training_data, "stage_reads", lambda *_: reads)
        named = NamedData({prefixes["a"]: Fraction(1), prefixes["b"]: Fraction(2)}, valid, packed=True)
        data = TrainingData(args, tokenizer, named)
        train, sets = data.datasets(args, 6, None, None)
        samples = [train[index]["bounds"] for index in range(6)] + [each[0]["bounds"] for each in sets.values()]
        longest = data.limits.longest_document
        assert all(bounds.diff().min() >= 0 and bounds.diff().max() <= longest for bounds in samples), "padding, too"
        assert all(bounds[0] == 0 and bounds[-1] == SEQ_LENGTH for bounds in samples)
        made = [packed_sequence_parameters(bounds, args, longest) for bounds in samples]
        return {(each.max_seqlen_q, each.max_seqlen_kv, each.cu_seqlens_q.shape) for each in made}

    valid = {"x": [prefixes["c"]], "y": [prefixes["d"]]}
    for reads in ((True, False), (False, False), (False, True)):  # the first, a middle and the last pipeline stage
        rounded = [-(-longest // 4) * 4 if context_parallel_size == 2 else longest for longest in (17, 9)]
        cuts = [-(-SEQ_LENGTH // longest) for longest in rounded]
        assert constants(valid, reads) == {(rounded[0], rounded[0], (1 + 4 + cuts[0],))}
        assert constants({}, reads) == {(rounded[1], rounded[1], (1 + 4 + cuts[1],))}


@pytest.mark.parametrize(("model", "processes", "layout"), LAYOUTS)
def test_packs_train_like_their_documents(corpus, unpacked, tmp_path, model, processes, layout):
    compared = unpacked(model)
    continue_packed(corpus, compared, tmp_path, model, layout, processes)
    assert_same_training(compared, tmp_path)


def test_records_that_the_run_packs_train_like_their_documents(corpus, unpacked, tmp_path):
    layout = "--micro-batch-size 2 --sft-packing"
    output = continue_packed(corpus, unpacked("gpt"), tmp_path, "gpt", layout, 1, data="packs.jsonl")
    assert "best-fit decreasing" in output
    assert_same_training(unpacked("gpt"), tmp_path)


def test_a_middle_stage_without_the_mask_is_noticed(corpus, unpacked, tmp_path):
    compared = unpacked("gpt")
    continue_packed(corpus, compared, tmp_path, "gpt", VIRTUAL, 2, script=[HERE / "unmasked_train.py"])
    with pytest.raises(AssertionError, match="grad-norm"):
        assert_same_training(compared, tmp_path)


def test_a_single_trained_token_counts_the_same_over_context_and_data_parallel_ranks(corpus, tmp_path):
    """Two records in each step, of which one trains its last token alone: that is on one of four ranks, its neighbour
    under context parallelism has none. Without Transformer Engine only models without attention run so."""
    records = tmp_path / "two.jsonl"
    lines = (corpus / "packs.jsonl").read_text().splitlines()
    records.write_text("\n".join([lines[0], lines[-1]]) + "\n")
    flags = f"--global-batch-size 2 --train-iters 3 {MODELS['mlp']}"
    train(corpus, tmp_path / "one", records, f"{flags} --micro-batch-size 2")
    flags += " --micro-batch-size 1 --context-parallel-size 2"
    train(corpus, tmp_path / "four", records, flags, nproc=4)
    assert_same_training(tmp_path / "one", tmp_path / "four", range(1, 4))
    # As Megatron does by default: the mean of the ranks' means.
    train(corpus, tmp_path / "means", records, f"{flags} --no-calculate-per-token-loss", nproc=4)
    with pytest.raises(AssertionError, match="grad-norm, 1"):
        assert_same_training(tmp_path / "one", tmp_path / "means", range(1, 4))


def test_a_run_resumes_to_the_bit_and_on_fewer_ranks(corpus, tmp_path):
    # Epochs of 4 + 2 packs in batches of 2, and an evaluation that reads its four packs in two batches.
    data = f"{corpus / 'packs'} {corpus / 'others'}:0.5"
    flags = "--micro-batch-size 1 --global-batch-size 2 --train-epochs 2 --save-interval 2 --eval-interval 3"
    flags += f" --sft-valid-data {corpus / 'others'} {MODELS['gpt']}"
    whole, again, fewer = (tmp_path / name for name in ("whole", "again", "fewer"))
    output = train(corpus, whole, data, flags, nproc=2)
    assert "others: 4 packs, weight 0.5" in output and "2 epochs of 6 packs: 6 iterations" in output
    # From inside the first epoch on, to the bit.
    output = train(corpus, again, data, f"{flags} --load {whole} --ckpt-step 2", nproc=2)
    assert "continues a checkpoint that was trained on" not in output
    expected, got = load_scalars(whole / "tensorboard"), load_scalars(again / "tensorboard")
    for key in (*COMPARED, "lm loss validation"):
        assert got[key] and got[key] == {step: expected[key][step] for step in got[key]}, key
    assert sorted(got["grad-norm"]) == [3, 4, 5, 6] and 3 in got["lm loss validation"]
    assert differences(load_checkpoint(whole, 6), load_checkpoint(again, 6)) == []
    # From inside the second epoch on, on one rank instead of two.
    train(corpus, fewer, data, f"{flags} --load {whole} --ckpt-step 4", nproc=1)
    assert_same_training(whole, fewer, range(5, 7))
    # The two epochs trained every pack as often as its weight says.
    tokens = {name: _trained_tokens(corpus / name) for name in ("packs", "others")}
    assert sum(expected["trained tokens"].values()) == 2 * tokens["packs"] + tokens["others"]


def _trained_tokens(prefix: Path) -> int:
    store = PackedStore(prefix)
    return sum(int(store.pack(index).mask.sum()) for index in range(len(store)))


def test_every_step_resumes_with_every_data_parallel_size():
    """Megatron's sampler from each step on: no sample again, none left out, and each step has the same ones."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    batch, steps = 8, 5

    def step_samples(consumed: int, ranks: int) -> list[list[int]]:
        micro = batch // ranks // 2  # two micro-batches per rank and step
        rows = [list(MegatronPretrainingSampler(steps * batch, consumed, micro, rank, ranks)) for rank in range(ranks)]
        return [
            sorted(i for row in rows for part in row[2 * step : 2 * step + 2] for i in part)
            for step in range(steps - consumed // batch)
        ]

    whole = step_samples(0, 1)
    assert [i for step in whole for i in step] == list(range(steps * batch))
    for done in range(steps):
        for ranks in (1, 2, 4):
            assert step_samples(done * batch, ranks) == whole[done:]


def refused(corpus: Path, folder: Path, data: str, flags: str) -> str:
    ranks = 2 if "--context-parallel-size 2" in flags else 1
    with pytest.raises(AssertionError) as stopped:
        train(corpus, folder, data, f"--micro-batch-size 1 --global-batch-size 2 --train-iters 1 {flags}", nproc=ranks)
    return str(stopped.value)


@pytest.mark.parametrize(
    ("data", "flags", "reason"),
    [
        ("packs packs.jsonl", "", "a run trains on packs or on records"),
        ("packs", "--sft-valid-data {corpus}/packs.jsonl", "Prepare --sft-valid-data too"),
        ("packs", "--sft-truncation drop", "--sft-truncation has no effect on packs"),
        ("packs", "--sft-packing", "--sft-packing has no effect on packs"),
        ("packs.jsonl", "--sft-packing --context-parallel-size 2", "with packs needs Transformer Engine"),
        ("packs", "--mtp-num-layers 1", "--mtp-num-layers with packs needs Transformer Engine"),
        ("packs", "--context-parallel-size 2", "--context-parallel-size 2 with packs needs Transformer Engine"),
        ("packs", "--window-size 4,0", "sliding window"),
        ("packs", "--seq-length 16", "were prepared for another training"),
    ],
)
def test_what_would_train_wrongly_is_refused(corpus, tmp_path, data, flags, reason):
    data = " ".join(str(corpus / name) for name in data.split())
    assert reason in refused(corpus, tmp_path, data, f"{flags.format(corpus=corpus)} {MODELS['gpt']}")
