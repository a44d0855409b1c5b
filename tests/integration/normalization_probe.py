"""A step's loss and gradient by every normalization over DP 2 x CP 2, through the dataset, `get_batch` and `loss_func`.

The ranks add up as Megatron does: gradients of all micro-batches and ranks, divided by the sum of what `loss_func`
counts. In the place of a model stands a table: the loss of a token is theta[label], scaled by its position. Packs are
cut over context-parallel ranks by the documented formula of Transformer Engine's kernel. Rank 0 prints, for each kind
of data and each case, how far loss and gradient are from the documents' own, in float64.
"""

import json
import random
from argparse import Namespace
from types import SimpleNamespace

import torch
from megatron.core import mpu, utils
from megatron.training import global_vars

from megatron_idft.data.packed.dataset import PackedDataset, PackLimits
from megatron_idft.integration.training.batches import get_batch, loss_func
from megatron_idft.integration.training.normalization import Normalization
from tests.data.test_packed_dataset import Reader, pack
from tests.te.kernels import thd_get_partitioned_indices

SEQ_LENGTH, VOCAB, CONSTANT, AVERAGE = 64, 40, 48, 7
RNG = random.Random(7)
LENGTHS = [(20, 9, 3), (50,), (17, 21), (2, 2, 30, 7), (33, 12)]  # tokens; the padding of each document comes on top


def document(length):
    """(id, weight) of each token: a prompt, then trained tokens with others in between; of one every 4th, its last."""
    prompt = RNG.randrange(length - 1) if RNG.randrange(4) else length - 2
    weights = [0] * (prompt + 1) + [RNG.choice((1, 1, 0.5, 2, 0, -1)) for _ in range(length - prompt - 2)] + [1]
    return [(RNG.randrange(VOCAB), weight) for weight in weights]


def packed(documents):
    weights = [weight for each in documents for _, weight in each]
    return pack(*([(id, int(weight != 0)) for id, weight in each] for each in documents), weights=weights)


PACKS = [[document(length) for length in lengths] for lengths in LENGTHS]
DOCUMENTS = [each for packs in PACKS for each in packs]


def expected(mode, samples):
    """Loss and gradient over theta [VOCAB], from the documents."""
    totals = []
    for each in DOCUMENTS:
        gradient = torch.zeros(VOCAB, dtype=torch.float64)
        for position, (id, weight) in enumerate(each[1:]):
            gradient[id] += weight * (1 + position / 7)
        totals.append((gradient, sum(weight != 0 for _, weight in each[1:])))
    if mode == "sample":
        gradient = sum(gradient / trained for gradient, trained in totals) / len(totals)
    else:
        trained = sum(trained for _, trained in totals)
        gradient = sum(gradient for gradient, _ in totals) / (trained if mode == "token" else samples * CONSTANT)
    return gradient @ theta_values().double(), gradient


def theta_values():
    return torch.linspace(0.5, 3, VOCAB)


def once_per_rank(loss, divisor, normalization, conversation_tokens):
    """Counts a conversation on every rank that has trained tokens of it."""
    trained = conversation_tokens[conversation_tokens != 0].abs()
    begins = (trained.diff(prepend=trained.new_zeros(1)) != 0).sum().int()
    return loss, begins * normalization.tokens


def mean_of_micro_batches(loss, divisor, normalization, conversation_tokens):
    """Each micro-batch of each rank counts the same, as with Megatron's defaults."""
    return loss / divisor.clamp(min=1), torch.ones_like(divisor)


FAULTS = (once_per_rank, mean_of_micro_batches)


def step(dataset, micro_batch_size, normalization, fault=None):
    """Loss and gradient of one step over all samples, in the order of Megatron's sampler, and its number of samples."""
    theta = theta_values().requires_grad_()
    total, count = torch.zeros(()), torch.zeros((), dtype=torch.int32)
    data = [dataset[index] for index in range(len(dataset))]
    while len(data) % (2 * micro_batch_size) or len(data) < 6:  # the last batch, filled up
        data.append(dataset.untrained_sample())
    for begin in range(mpu.get_data_parallel_rank() * micro_batch_size, len(data), 2 * micro_batch_size):
        rows = data[begin : begin + micro_batch_size]
        collated = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        limits = dataset.limits if dataset.bounds else None
        batch = get_batch(iter([collated]), None, micro_batch_size, limits=limits, sources=True, conversations=True)
        labels, mask = batch["labels"], batch["loss_mask"]
        assert labels.shape == batch["sources"].shape == batch["conversation_tokens"].shape
        assert labels.shape == (micro_batch_size, SEQ_LENGTH // 2)
        output = torch.where(labels >= 0, theta[labels.clamp(min=0)] * (1 + batch["position_ids"] / 7), 0)
        counts = batch["conversation_tokens"]
        loss, divisor, logged = loss_func(mask, output, normalization=normalization, conversation_tokens=counts)
        assert divisor.dtype == torch.int32 and logged["lm loss"][1] == (mask != 0).sum()
        if fault is not None:
            loss, divisor = fault(loss, divisor, normalization, counts)
        loss.backward()
        total, count = total + loss.detach(), count + divisor
    for tensor in (total, count, theta.grad):
        torch.distributed.all_reduce(tensor)
    return total / count, theta.grad / count, len(data)


def distance(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


def main():
    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel(context_parallel_size=2)
    utils.tex = SimpleNamespace(thd_get_partitioned_indices=thd_get_partitioned_indices)
    global_vars._GLOBAL_ARGS = Namespace(
        seq_length=SEQ_LENGTH,
        transformer_impl="transformer_engine",
        hybrid_layer_pattern=None,
        context_parallel_size=2,
        mtp_num_layers=None,
        position_embedding_type="rope",
        apply_rope_fusion=True,
        check_for_nan_in_loss_and_grad=False,
    )
    of_packs = [packed(each) for each in PACKS]
    of_documents = [packed([each]) for each in DOCUMENTS]
    common = {"conversations": True, "multiple_of": 4}
    kinds = {
        "packs": (of_packs, 1, {"limits": PackLimits(4, 52)}),
        "records": (of_documents, 2, {"bounds": False, "multiple_of": 1}),
    }
    found = {}
    for kind, (packs, micro_batch_size, settings) in kinds.items():
        most = max(len(each.sources) for each in packs)
        dataset = PackedDataset({"p": Reader(packs)}, SEQ_LENGTH, 0, sources=[list(range(most))], **common | settings)
        for mode, tokens in {"token": 1, "sample": AVERAGE, "constant": CONSTANT}.items():
            for fault in (None, *FAULTS) if mode == "sample" else (None,):
                loss, gradient, samples = step(dataset, micro_batch_size, Normalization(mode, tokens), fault)
                wanted_loss, wanted_gradient = expected(mode, samples)
                name = f"{kind}, {mode}" + (f", {fault.__name__}" if fault else "")
                found[name] = [distance(loss, wanted_loss), distance(gradient, wanted_gradient)]
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
