"""Samples of one record each, padded; shuffles; rounds of evaluation."""

import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from megatron_idft.data.chat.conversations import encode_conversation
from megatron_idft.data.packed.dataset import PackedDataset, RepeatedRounds
from megatron_idft.data.packed.epochs import BlendedEpochs
from megatron_idft.data.packed.packing import permutation
from megatron_idft.errors import InputError
from tests.data.prepared_files import tokenized

CONVERSATIONS = [
    [{"role": role, "content": f"{text} {i}"} for role, text in (("user", "hello"), ("assistant", "world")) * turns]
    for i, turns in enumerate([1, 2, 1, 3, 1])
]  # fmt: skip


def dataset_of(tokenizer, folder, seq_length, padded_to=None, **options):
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in CONVERSATIONS))
    store = tokenized(tokenizer, folder / "cache", file, seq_length=seq_length)
    return PackedDataset({"": store}, padded_to or seq_length, tokenizer.pad_id, bounds=False, **options)


def test_samples_are_what_get_batch_expects(tokenizer, tmp_path):
    data = dataset_of(tokenizer, tmp_path, 128)
    assert len(data) == len(CONVERSATIONS)
    for i, messages in enumerate(CONVERSATIONS):
        ids, mask = encode_conversation(tokenizer, messages)
        sample = data[i]
        assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
            "tokens": (torch.int64, (128,)),
            "labels": (torch.int64, (128,)),
            "loss_mask": (torch.float32, (128,)),
            "position_ids": (torch.int64, (128,)),
        }
        n = len(ids) - 1
        for at in range(128):
            trained = at < n and mask[at + 1]
            assert sample["tokens"][at] == (ids[at] if at < n else tokenizer.pad_id)
            assert sample["labels"][at] == (ids[at + 1] if trained else -100)
            assert sample["loss_mask"][at] == float(trained)
            assert sample["position_ids"][at] == at
        last = int(sample["loss_mask"].nonzero().max())
        assert sample["labels"][last] == tokenizer.special_ids["<|im_end|>"]


def test_a_cut_record_fills_the_sample(tokenizer, tmp_path):
    data = dataset_of(tokenizer, tmp_path, 24)
    ids, mask = encode_conversation(tokenizer, CONVERSATIONS[3])
    assert len(ids) > 25
    assert data[3]["tokens"].tolist() == ids[:24].tolist()
    assert data[3]["labels"].tolist() == [int(i) if m else -100 for i, m in zip(ids[1:25], mask[1:25], strict=True)]


def test_longer_records_than_samples_are_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match="more than --seq-length 16"):
        dataset_of(tokenizer, tmp_path, 64, padded_to=16)[3]
    assert dataset_of(tokenizer, tmp_path, 64, padded_to=96)[0]["tokens"].shape == (96,)


def test_loader_workers_and_copies_read_the_same(tokenizer, tmp_path):
    data = dataset_of(tokenizer, tmp_path, 64)
    stacked = torch.stack([data[i]["tokens"] for i in range(5)])
    assert torch.equal(next(iter(DataLoader(data, batch_size=5, num_workers=1)))["tokens"], stacked)
    copy = pickle.dumps(data)
    assert len(copy) < 2000 and torch.equal(pickle.loads(copy)[4]["tokens"], stacked[4])


def test_the_order_is_frozen():
    """A run may be resumed years later: these numbers must never change."""
    assert permutation(8, seed=1234, stream=0).tolist() == [7, 3, 0, 1, 4, 2, 5, 6]
    assert permutation(8, seed=1234, stream=1).tolist() == [0, 5, 6, 4, 2, 1, 7, 3]


def test_the_order_is_a_fair_shuffle():
    positions = np.array([permutation(10, seed, epoch).argmin() for seed in range(40) for epoch in range(50)])
    assert np.abs(np.bincount(positions, minlength=10) - 200).max() < 5 * np.sqrt(200)


def test_a_last_batch_is_filled_up_with_samples_that_train_nothing(tokenizer, tmp_path):
    data = dataset_of(tokenizer, tmp_path, 64)
    samples = BlendedEpochs(data, [Fraction(1)], seed=3, num_samples=12, num_epochs=2)
    drawn = [samples.pack_number(i) for i in range(12)]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5)) and drawn[10:] == [None, None]
    filler = samples[11]
    assert not filler["loss_mask"].any() and (filler["labels"] == -100).all()
    assert (filler["tokens"] == tokenizer.pad_id).all()
    assert {key: value.dtype for key, value in filler.items()} == {key: v.dtype for key, v in data[0].items()}


@pytest.mark.parametrize(("round_size", "num_samples"), [(8, 16), (5, 10), (3, 7), (8, 1)])
def test_every_round_reads_the_same_records_each_once(tokenizer, tmp_path, round_size, num_samples):
    """A round longer than the data, exactly as long, shorter, and a request for less than one round."""
    data = dataset_of(tokenizer, tmp_path, 64)
    rounds = RepeatedRounds([(data, round_size)], num_samples)
    assert len(rounds) >= num_samples and len(rounds) % round_size == 0
    for start in range(0, len(rounds), round_size):
        seen = [rounds[start + i] for i in range(round_size)]
        for i, sample in enumerate(seen):
            if i < len(data):
                assert torch.equal(sample["tokens"], data[i]["tokens"]) and sample["loss_mask"].any()
            else:
                assert not sample["loss_mask"].any()
    with pytest.raises(IndexError):
        rounds[len(rounds)]


def test_a_round_reads_its_sets_one_after_the_other(tokenizer, tmp_path):
    (tmp_path / "other").mkdir()
    data = dataset_of(tokenizer, tmp_path, 64, sources=[[3]])
    short = dataset_of(tokenizer, tmp_path / "other", 32, padded_to=64, sources=[[4]])
    rounds = RepeatedRounds([(data, 4), (short, 6)], num_samples=11)
    assert len(rounds) == 20
    for start in (0, 10):
        for at, (dataset, index) in enumerate([*((data, i) for i in range(4)), *((short, i) for i in range(5))]):
            assert torch.equal(rounds[start + at]["tokens"], dataset[index]["tokens"])
        assert [int(rounds[start + at]["sources"][0]) for at in range(10)] == [3] * 4 + [4] * 5 + [-1]
        assert not rounds[start + 9]["loss_mask"].any()
