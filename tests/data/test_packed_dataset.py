"""Packs -> samples, and the order of blends: exact, a pure function of seed and position, lazy."""

import json
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_idft.data.packed.dataset import PackedDataset, PackLimits, RepeatedRounds
from megatron_idft.data.packed.epochs import Blend, BlendedEpochs, prepared_prefixes
from megatron_idft.data.packed.store import FORMAT, PackedStore, write_index
from megatron_idft.data.reference.columns import ReferenceColumns
from megatron_idft.errors import InputError

PAD = 99


@dataclass
class Pack:
    ids: np.ndarray
    mask: np.ndarray
    weights: np.ndarray | None
    starts: np.ndarray
    sources: np.ndarray
    reference: dict[str, np.ndarray]


class Reader:
    """Packs in memory, counting what is asked for."""

    def __init__(self, packs):
        self.packs, self.asked = packs, Counter()

    def __len__(self):
        return len(self.packs)

    def pack(self, index):
        self.asked[index] += 1
        return self.packs[index]


def pack(*documents, weights=None, reference=None):
    """Documents as lists of (id, trained)."""
    tokens = [token for document in documents for token in document]
    starts = np.cumsum([0, *(len(document) for document in documents)])[:-1]
    return Pack(
        ids=np.array([id for id, _ in tokens], dtype=np.int32),
        mask=np.array([trained for _, trained in tokens], dtype=np.uint8),
        weights=None if weights is None else np.array(weights, dtype=np.float32),
        starts=starts.astype(np.int32),
        sources=np.arange(len(documents), dtype=np.int32),
        reference=reference or {},
    )


# A trained first token cannot come out of `prepare`; here it stands so that a label across a border would show.
A = [(1, 0), (2, 1), (3, 1)]
B = [(4, 1), (5, 0), (6, 1), (7, 1)]
C = [(8, 1), (9, 1)]


def sample(packed, **settings):
    length = settings.pop("seq_length", 9)
    return {k: v.tolist() for k, v in PackedDataset({"p": Reader([packed])}, length, PAD, **settings)[0].items()}


def test_every_document_is_a_sample_of_its_own():
    got = sample(pack(A, B, C))
    assert got["bounds"] == [0, 2, 5, 6, 9, 9, 9, 9, 9, 9]
    assert got["tokens"] == [1, 2, 4, 5, 6, 8, PAD, PAD, PAD]
    assert got["position_ids"] == [0, 1, 0, 1, 2, 0, 0, 1, 2]
    assert got["labels"] == [2, 3, -100, 6, 7, 9, -100, -100, -100]
    assert got["loss_mask"] == [1, 1, 0, 1, 1, 1, 0, 0, 0]


def test_a_full_pack_has_no_padding():
    got = sample(pack(A, B, C), seq_length=6)
    assert got["bounds"] == [0, 2, 5, 6, 6, 6, 6] and got["tokens"] == [1, 2, 4, 5, 6, 8]


def test_padding_is_cut_into_documents_no_longer_than_the_longest():
    limits = PackLimits(most_documents=3, longest_document=3)
    got = sample(pack(A, B), seq_length=13, limits=limits)
    assert got["bounds"] == [0, 2, 5, 8, 11, 13, 13, 13, 13]
    assert got["position_ids"] == [0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert sample(pack(A, B, C), seq_length=6, limits=limits)["bounds"] == [0, 2, 5, 6, 6, 6]
    padding = PackedDataset({"p": Reader([pack(A)])}, 7, PAD, limits=limits).untrained_sample()
    assert padding["bounds"].tolist() == [0, 3, 6, 7, 7, 7, 7]


def test_weights_scale_the_mask_where_it_is_trained():
    got = sample(pack(A, C, weights=[9, 0.5, 2, 9, 0.25]))
    assert got["loss_mask"] == [0.5, 2, 0.25, 0, 0, 0, 0, 0, 0]


def test_context_parallelism_pads_each_document():
    got = sample(pack(A, B, C), seq_length=16, multiple_of=4)
    assert got["bounds"][:5] == [0, 4, 8, 12, 16]
    assert got["tokens"] == [1, 2, PAD, PAD, 4, 5, 6, PAD, 8, *[PAD] * 7]
    assert got["labels"] == [2, 3, -100, -100, -100, 6, 7, -100, 9, *[-100] * 7]
    assert got["position_ids"] == [0, 1, 2, 3] * 4


def test_what_a_stage_does_not_need_is_not_read():
    class Untouchable(np.ndarray):
        def __getitem__(self, key):
            raise AssertionError("was read")

    whole = pack(A, B)
    for field in ("ids", "mask"):
        setattr(whole, field, getattr(whole, field).view(Untouchable))
    assert sample(whole, inputs=False, labels=False) == {"bounds": [0, 2, 5, 9, 9, 9, 9, 9, 9, 9]}
    with pytest.raises(AssertionError, match="was read"):
        sample(whole, inputs=True, labels=False)
    whole.ids = pack(A, B).ids
    assert set(sample(whole, inputs=True, labels=False)) == {"bounds", "tokens", "position_ids"}
    with pytest.raises(AssertionError, match="was read"):
        sample(whole, inputs=False, labels=True)


def test_labels_come_with_the_sources_of_their_documents():
    stores = {"p": Reader([pack(A, B)]), "q": Reader([pack(C, A)])}
    data = PackedDataset(stores, 12, PAD, multiple_of=4, sources=[[7, 5], [5, 0]])
    assert data[0]["sources"].tolist() == [7] * 4 + [5] * 4 + [-1] * 4
    assert data[1]["sources"].tolist() == [5] * 4 + [0] * 4 + [-1] * 4
    assert data.untrained_sample()["sources"].tolist() == [-1] * 12
    assert "sources" not in PackedDataset(stores, 12, PAD, labels=False, sources=[[7, 5], [5, 0]])[0]


def test_labels_come_with_what_a_reference_model_said_of_them():
    half = lambda rows: np.array(rows, dtype=np.float16)  # noqa: E731
    ids = np.arange(21, dtype=np.int32).reshape(7, 3)
    columns = {"log_prob": half([9, -1, -2, 9, 9, -5, -6]), "entropy": half(range(7))}
    columns |= {"top_ids": ids, "top_log_prob": half(-ids)}
    stores = {"p": Reader([pack(A, B, reference=columns)])}
    got = PackedDataset(stores, 9, PAD, multiple_of=3, reference=ReferenceColumns(entropy=True, top_k=2))[0]
    assert got["labels"].tolist() == [2, 3, -100, -100, 6, 7, -100, -100, -100]
    assert got["reference_log_prob"].tolist() == [-1, -2, 0, 0, -5, -6, 0, 0, 0]
    assert got["reference_entropy"].tolist() == [1, 2, 0, 0, 5, 6, 0, 0, 0]
    assert got["reference_top_ids"].tolist() == [[3, 4], [6, 7], [0, 0], [0, 0], [15, 16], [18, 19], *[[0, 0]] * 3]
    assert got["reference_top_log_prob"].tolist() == (-got["reference_top_ids"]).tolist()
    dtypes = {key: str(value.dtype) for key, value in got.items() if key.startswith("reference")}
    assert set(dtypes.values()) == {"torch.float32", "torch.int32"} and dtypes["reference_top_ids"] == "torch.int32"
    plain = PackedDataset(stores, 9, PAD, reference=ReferenceColumns())
    assert {key for key in plain[0] if key.startswith("reference")} == {"reference_log_prob"}
    rounds = RepeatedRounds([(plain, 2)], 4)
    assert not rounds[3]["reference_log_prob"].any() and rounds[0]["reference_log_prob"].any()
    for asked in ({}, {"reference": ReferenceColumns(), "labels": False}):
        assert not {key for key in PackedDataset(stores, 9, PAD, **asked)[0] if key.startswith("reference")}


def test_labels_come_with_the_trained_tokens_of_their_conversations_each_marked_once():
    untrained = [(1, 1), (2, 0)]  # but for its first token, which is no label
    packed = pack(A, untrained, B, C, weights=[0, 0.5, 2, 0, 0, 0, 0, 1, 1, 0, 1])
    data = PackedDataset({"p": Reader([packed])}, 16, PAD, multiple_of=4, conversations=True)
    counts = data[0]["conversation_tokens"]
    assert counts.tolist() == [-2, 2, 0, 0, 0, 0, 0, 0, 0, -2, 2, 0, -1, 0, 0, 0]
    assert counts.dtype == torch.int32 and torch.equal(counts != 0, data[0]["loss_mask"] > 0)
    assert not data.untrained_sample()["conversation_tokens"].any()
    unpacked = PackedDataset({"p": Reader([pack(B)])}, 9, PAD, bounds=False, conversations=True)
    assert unpacked[0]["conversation_tokens"].tolist() == [0, -2, 2, 0, 0, 0, 0, 0, 0]
    for settings in ({}, {"conversations": True, "labels": False}):
        assert "conversation_tokens" not in sample(packed, seq_length=16, **settings)


def test_a_pack_that_is_too_long_is_named():
    dataset = PackedDataset({"a": Reader([pack(A)]), "b": Reader([pack(A), pack(A, B, C)])}, 5, PAD)
    assert len(dataset) == 3 and dataset[1]["tokens"].tolist() == [1, 2, PAD, PAD, PAD]
    with pytest.raises(InputError, match=r"b: pack 1 takes 6 positions .* more than --seq-length 5"):
        dataset[2]
    with pytest.raises(InputError, match=r"a multiple of 8, .* --pad-multiple 8"):
        PackedDataset({"a": Reader([pack(A)])}, 6, PAD, multiple_of=8)[0]
    with pytest.raises(IndexError):
        dataset[3]


def test_the_untrained_sample_is_one_document_of_padding():
    got = {k: v.tolist() for k, v in PackedDataset({"p": Reader([pack(A)])}, 4, PAD).untrained_sample().items()}
    assert got["bounds"] == [0, 4, 4, 4, 4] and got["tokens"] == [PAD] * 4 and not any(got["loss_mask"])
    assert got["labels"] == [-100] * 4 and got["position_ids"] == [0, 1, 2, 3]


def visits(blend, start, end):
    return Counter(blend.pack(index)[1] for index in range(start, end))


def test_each_epoch_visits_each_pack_as_often_as_its_weight_says():
    sizes, weights = [5, 7, 4], [Fraction(1), Fraction(2), Fraction("0.3")]
    blend = Blend(sizes, weights, seed=3)
    seen = Counter()
    for epoch in range(10):
        start, end = blend.samples_before(epoch), blend.samples_before(epoch + 1)
        here = visits(blend, start, end)
        assert [here[number] for number in range(12)] == [1] * 5 + [2] * 7
        assert {blend.pack(start)[0], blend.pack(end - 1)[0]} == {epoch}
        seen += here
        for number in range(12, 16):  # 0.3 of the visits: as even as whole visits allow
            assert seen[number] in (3 * (epoch + 1) // 10, -(-3 * (epoch + 1) // 10))
    assert [seen[number] for number in range(12, 16)] == [3] * 4
    assert blend.samples_before(10) == 10 * 5 + 20 * 7 + 3 * 4


def test_weights_are_exact_decimals():
    # In binary floating point 3 * 0.1 * 10 is 3.0000000000000004 and 0.7 * 10 * 3 is 20.999999999999996.
    assert Blend([10], [Fraction("0.7")], seed=1).samples_before(3) == 21


def test_the_order_is_a_function_of_seed_and_position():
    def order(seed, indices):
        blend = Blend([40, 9], [Fraction(1), Fraction("1.5")], seed)
        return [blend.pack(index) for index in indices]

    whole = order(1, range(150))
    assert order(1, range(77, 150)) == whole[77:]
    assert order(1, reversed(range(150))) == whole[::-1]
    assert order(2, range(150)) != whole
    assert [p for e, p in whole if e == 0] != [p for e, p in whole if e == 1], "each epoch has its own order"
    first = [pack for epoch, pack in whole if epoch == 0]
    assert first != sorted(first) and max(map(first.index, range(40))) > 40, "the sources are mixed"


def test_the_order_is_the_same_in_every_release():
    blend = Blend([4, 3], [Fraction(1), Fraction(1)], seed=1234)
    assert [blend.pack(index)[1] for index in range(14)] == PINNED


PINNED = [2, 3, 0, 6, 1, 5, 4, 0, 6, 4, 5, 3, 2, 1]


def test_epochs_end_in_untrained_samples_and_nothing_is_read_before_it_is_asked_for():
    readers = {"a": Reader([pack(A)] * 3), "b": Reader([pack(B)] * 2)}
    epochs = BlendedEpochs(PackedDataset(readers, 6, PAD), [Fraction(1), Fraction(2)], 5, num_samples=16, num_epochs=2)
    assert len(epochs) == 16 and not readers["a"].asked and not readers["b"].asked
    samples = [epochs[index] for index in range(16)]
    assert [bool(s["loss_mask"].any()) for s in samples] == [True] * 14 + [False] * 2
    assert readers["a"].asked == {0: 2, 1: 2, 2: 2} and readers["b"].asked == {0: 4, 1: 4}
    for index in (-1, 16):
        with pytest.raises(IndexError):
            epochs[index]


def test_of_a_large_store_only_what_is_trained_is_read(tmp_path):
    """10^8 tokens in sparse files: which pages a process holds of a mapped file stands in /proc/self/smaps."""
    packs, length = 25_000, 4000
    prefix, tokens = tmp_path / "large", packs * length
    with open(f"{prefix}.idx", "wb") as index:
        write_index(index.write, np.full(packs, length))
    np.arange(packs + 1, dtype=np.int64).tofile(f"{prefix}.packs.bin")
    sizes = {".bin": 4 * tokens, ".mask.bin": tokens, ".starts.bin": 4 * packs, ".sources.bin": 4 * packs}
    for suffix, size in (sizes | {".records.bin": 16 * packs}).items():
        with open(f"{prefix}{suffix}", "wb") as file:
            file.truncate(size)
    meta = {"kind": "megatron-idft packs", "format": FORMAT, "packs": packs, "documents": packs, "tokens": tokens}
    (tmp_path / "large.json").write_text(json.dumps(meta | {"weighted": False}))
    epochs = BlendedEpochs(PackedDataset({"large": PackedStore(prefix)}, length, PAD), [Fraction(1)], 1, packs)
    assert len(epochs) == packs and _held(prefix) == 0
    assert epochs[12_345]["tokens"].shape == (length,)
    assert 0 < _held(prefix) < sum(sizes.values()) / 100


def _held(prefix):
    """Bytes of the files with this prefix that are mapped and read."""
    held, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            ours = str(prefix) in line
        elif ours and line.startswith("Rss:"):
            held += 1024 * int(line.split()[1])
    return held


def test_prepared_data_is_known_by_its_description(tmp_path):
    for name in ("a", "b", "c:1"):
        (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / "d.jsonl").write_text("")
    a, b, c, d = (str(tmp_path / name) for name in ("a", "b", "c:1", "d.jsonl"))
    assert prepared_prefixes([d]) is None and prepared_prefixes([]) is None
    assert prepared_prefixes([a, f"{b}:0.1", f"{c}:3"]) == {a: 1, b: Fraction(1, 10), c: 3}
    assert prepared_prefixes([c]) == {c: 1}
    with pytest.raises(InputError, match=r"d\.jsonl is not: a run trains on packs or on records"):
        prepared_prefixes([a, d])
    with pytest.raises(InputError, match="named twice"):
        prepared_prefixes([a, f"{a}:2"])
    for weight in ("0", "-1", "much", "nan", "1/0", ""):
        with pytest.raises(InputError, match="is no weight"):
            prepared_prefixes([f"{a}:{weight}"])
