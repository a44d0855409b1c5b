"""Three steps of IDFT on real problems, by `train` at TP 3 and by transformers and torch; and the tuned model."""

from itertools import combinations

import pytest
import torch

from tests.checkpoint.test_round_trip import tensors
from tests.launch import forked
from tests.real.logits import assert_same_logits, megatron_logits
from tests.run_outputs import load_scalars
from tests.tiny_corpora import write_records

STEPS, BATCH, LENGTH, LR = 3, 2, 136, 1e-5
Sample = tuple[torch.Tensor, int]  # the ids of a conversation up to its end of turn, and the first that is trained


def sample(tokenizer, record) -> Sample:
    ids = tokenizer.apply_chat_template(record["messages"], return_dict=True)["input_ids"][:-1]  # but for the newline
    prompt = tokenizer.apply_chat_template(record["messages"][:1], add_generation_prompt=True, return_dict=True)
    assert ids[: len(prompt["input_ids"])] == prompt["input_ids"]
    return torch.tensor(ids), len(prompt["input_ids"])


def trained_tokens(batch: list[Sample]) -> int:
    return sum(len(ids) - start for ids, start in batch)


@pytest.fixture(scope="module")
def samples(tokenizer, records) -> list[tuple[dict, Sample]]:
    """Short records with their samples, of which each pair has another number of trained tokens."""
    found: list[tuple[dict, Sample]] = []
    for record in records:
        tried = [*found, (record, sample(tokenizer, record))]
        sums = [trained_tokens([a, b]) for (_, a), (_, b) in combinations(tried, BATCH)]
        if len(set(sums)) == len(sums) and len(tried[-1][1][0]) <= LENGTH:
            found = tried
        if len(found) == STEPS * BATCH:
            return found
    raise AssertionError(f"only {len(found)} records of at most {LENGTH} tokens fit together")


@pytest.fixture(scope="module")
def trained(verb, samples, tmp_path_factory):
    """The folder of an epoch over these records."""
    folder = tmp_path_factory.mktemp("training")
    write_records(folder / "data.jsonl", [record for record, _ in samples])
    flags = f"--sft-data {folder / 'data.jsonl'} --sft-cache {folder / 'cache'} --train-epochs 1 --seq-length {LENGTH}"
    flags += f" --micro-batch-size {BATCH} --global-batch-size {BATCH} --lr {LR} --lr-decay-style constant"
    flags += f" --sft-loss idft --tensorboard-dir {folder / 'tensorboard'}"
    flags += f" --save {folder / 'save'} --no-save-optim --no-save-rng --save-hf final"
    forked(verb("train", *flags.split(), "--tensor-model-parallel-size", 3), nproc=3)
    return folder


def idft_step(model, optimizer, batch: list[Sample]) -> tuple[float, float]:
    """(cross-entropy of a token, gradient norm) of a step with the loss as the paper writes it."""
    total = 0.0
    optimizer.zero_grad()
    for ids, start in batch:
        log_probs = model(ids[None]).logits[0, start - 1 : -1].double().log_softmax(-1)
        log_p = log_probs.gather(-1, ids[start:, None])[:, 0]
        with torch.no_grad():
            phi = log_p - (log_probs.exp() * log_probs).sum(-1)
            weight = (log_p * torch.exp(-phi).clamp(0.1, 2)).exp()
        (-(weight * log_p).sum() / trained_tokens(batch)).backward()
        total -= log_p.sum().item()
    gradients = [parameter.grad for parameter in model.parameters()]
    norm = sum(gradient.double().square().sum().item() for gradient in gradients) ** 0.5
    torch._foreach_mul_(gradients, min(1.0, 1.0 / norm))
    optimizer.step()
    return total / trained_tokens(batch), norm


def test_steps_are_those_of_transformers_and_adamw(trained, samples, model):
    scalars = load_scalars(trained / "tensorboard")
    by_size = {trained_tokens([a, b]): [a, b] for (_, a), (_, b) in combinations(samples, BATCH)}
    steps = sorted(scalars["trained tokens"])
    order = [by_size[int(scalars["trained tokens"][step])] for step in steps]
    assert len(steps) == STEPS and sum(map(trained_tokens, order)) == sum(trained_tokens([s]) for _, s in samples)
    model.get_input_embeddings().padding_idx = None  # the end of turn's: transformers would leave out its gradient
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    for step, batch in zip(steps, order, strict=True):
        loss, norm = idft_step(model, optimizer, batch)
        found, found_norm = scalars["lm loss"][step], scalars["grad-norm"][step]
        print(f"step {step}: loss {loss:.6f} {found - loss:+.1e}, gradient norm {norm:.5f} {found_norm - norm:+.1e}")
        assert found == pytest.approx(loss, abs=1e-5), f"step {step}"
        assert found_norm == pytest.approx(norm, rel=1e-4), f"step {step}"  # Megatron's is of fp32 sums of squares


def test_the_tuned_model_has_the_same_logits_in_transformers(trained, model_flags, samples, huggingface, tmp_path):
    """What `--save-hf` wrote, against the checkpoint beside it, in one process."""
    from transformers import AutoModelForCausalLM

    exported = trained / "save" / "hf" / f"iter_{STEPS:07d}"
    tokens = samples[0][1][0][None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(exported).eval()(tokens).logits
    got = megatron_logits(trained / "save", model_flags, tokens, tmp_path)
    assert_same_logits(got, expected, "tuned")

    before, after = tensors(huggingface), tensors(exported)
    assert before.keys() == after.keys()
    same = [name for name, value in after.items() if torch.equal(value, before[name])]
    assert not same, "every tensor was trained"
