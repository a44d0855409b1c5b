"""What rounding logits to bf16 does to entropy and phi over a training: SmolLM2-135M-Instruct on real problems, IDFT.

    python tools/benchmarks/drift.py --hf-model FOLDER --records-file FILE --json RESULT

FOLDER is that of examples/real_model/fetch.py, FILE of examples/real_model/problems.py. Trainings of 100 steps from the
same weights on the same records, one record a step, which differ in the output head only:

    anchor         fp32 logits of the bf16 hidden states and weight, kept whole, and their gradient in fp32
    reordered      the same, each product summed in the opposite order: how far trainings part by themselves
    materialised   the logits rounded to bf16, as Megatron's output layer hands them to any loss
    fused          vocab_parallel_linear_loss

Parameters, hidden states and arithmetic are bf16, the optimizer's copies and sums of gradients fp32.

Two comparisons, since they ask different things. *On the same weights*: at every step of the anchor's training the
statistics of all heads are taken of the very hidden states that it reached. That has no noise of its own, so it tells
every error of a head; a bias would show in the signed mean over the steps. *Between trainings*: every training's
weights, by fp32 logits, against the anchor's. That shows what an error does to a training, but trainings part by
themselves: only what exceeds the reordered one says anything.

Expected before the first run. Logits near 16 to 32 are rounded to steps of 1/8, so by s = 0.036 on average, each of its
own. To first order that cancels in means; to second order log p falls by s^2 / 2 (1 - sum p^2), 3e-4, and entropy by
about the same. A mean over 7,000 tokens with an error of 0.03 each is known to 4e-4. So: per token 0.02 to 0.03 of
difference, per step some 1e-3, and a signed mean over 100 steps that cannot be told from 0; the fused head 1e-6 in each
of the three. Trainings: no larger than the reordered one.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout needs no installation

from megatron_idft import LossOutput, vocab_parallel_linear_loss, vocab_parallel_loss

STEPS, LENGTH, HELD_OUT, LR = 100, 96, 20, 1e-5

# hidden [n, H], weight [V, H], labels [n] -> results; both tensors bf16
Head = Callable[[Tensor, Tensor, Tensor], LossOutput]


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.float() @ weight.float().t()


def anchor(hidden: Tensor, weight: Tensor, labels: Tensor) -> LossOutput:
    return vocab_parallel_loss(fp32_logits(hidden, weight), labels, overwrite_logits=True)


def reordered(hidden: Tensor, weight: Tensor, labels: Tensor) -> LossOutput:
    return vocab_parallel_loss(fp32_logits(hidden.flip(1), weight.flip(1)), labels, overwrite_logits=True)


def materialised(hidden: Tensor, weight: Tensor, labels: Tensor) -> LossOutput:
    return vocab_parallel_loss(fp32_logits(hidden, weight).bfloat16(), labels, overwrite_logits=True)


def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> LossOutput:
    return vocab_parallel_linear_loss(hidden, weight, labels, loss_scale=1 / len(labels))


HEADS: dict[str, Head] = {"anchor": anchor, "reordered": reordered, "materialised": materialised, "fused": fused}


class Sample(NamedTuple):
    """ids [n], and of the tokens after them those to be trained: `places` [m] in ids, `labels` [m]."""

    ids: Tensor
    places: Tensor
    labels: Tensor


def samples(tokenizer: Any, records: Sequence[dict[str, Any]], length: int) -> list[Sample]:
    """The last `length` tokens of each conversation, up to its end of turn; trained on the answer's."""
    found = []
    for record in records:
        ids = tokenizer.apply_chat_template(record["messages"], return_dict=True)["input_ids"][:-1]  # but the newline
        prompt = tokenizer.apply_chat_template(record["messages"][:1], add_generation_prompt=True, return_dict=True)
        cut = max(len(ids) - length, 0)
        places = torch.arange(max(len(prompt["input_ids"]) - cut - 1, 0), len(ids) - cut - 1)
        whole = torch.tensor(ids[cut:])
        found.append(Sample(whole[:-1], places, whole[places + 1]))
    return found


class Training:
    """A model in bf16, the optimizer's fp32 copies of its parameters, and steps on one sample each.

    Args:
        folder: of the model.
        layers: how many of the uppermost are trained, with the output layer; None: everything. Then the layers below,
            and what the embedding hands them, stay out of the backward pass.
        arithmetic: of the layers. bf16 is very slow on processors without instructions for it; fp32 computes with the
            same bf16 parameters, and hands on bf16 hidden states.
    """

    def __init__(self, folder: Path, layers: int | None = None, arithmetic: torch.dtype = torch.bfloat16) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(arithmetic)
        self.model.get_input_embeddings().padding_idx = None  # the end of turn's: its gradient would be left out
        self.whole = layers is None
        for layer in [] if layers is None else self.model.model.layers[:-layers]:
            layer.requires_grad_(False)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.copies = [torch.nn.Parameter(parameter.detach().float().clone()) for parameter in self.parameters]
        groups = [
            {"params": [copy for copy in self.copies if copy.ndim > 1], "weight_decay": 0.01},
            {"params": [copy for copy in self.copies if copy.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)

    def head_inputs(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Hidden states [m, H] of the trained places, and the output layer's weight [V, H], both bf16."""
        embedded = self.model.get_input_embeddings()(sample.ids[None])
        hidden = self.model.model(inputs_embeds=embedded if self.whole else embedded.detach()).last_hidden_state
        return hidden[0, sample.places].bfloat16(), self.model.lm_head.weight.bfloat16()

    def step(self, results: LossOutput) -> None:
        """Backward and the optimizer's step."""
        results.loss.mean().backward()
        for copy, parameter in zip(self.copies, self.parameters, strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.copies, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for copy, parameter in zip(self.copies, self.parameters, strict=True):
                parameter.copy_(copy.bfloat16())


def means(results: LossOutput) -> dict[str, float]:
    """Of entropy and phi over the tokens."""
    entropy, log_prob = results.entropy.detach().double(), results.log_prob.detach().double()
    return {"entropy": entropy.mean().item(), "phi": (entropy + log_prob).mean().item()}


def call(head: Head, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[LossOutput, Tensor]:
    """Results, and the gradient of the hidden states."""
    leaf = hidden.detach().requires_grad_()
    results = head(leaf, weight.detach(), labels)
    results.loss.mean().backward()
    assert leaf.grad is not None
    return results, leaf.grad


def difference(found: LossOutput, expected: LossOutput) -> dict[str, float]:
    """Of "entropy" and "phi", the difference of the means over tokens; with " rms", the root mean square of theirs."""
    figures = {}
    entropy, log_prob = (
        getattr(found, name).detach().double() - getattr(expected, name).detach().double()
        for name in ("entropy", "log_prob")
    )
    for name, values in (("entropy", entropy), ("phi", entropy + log_prob)):
        figures |= {name: values.mean().item(), f"{name} rms": values.square().mean().sqrt().item()}
    return figures


def gradient_difference(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Norm of the difference over the expected norm, and the difference's part along the expected one, with a sign."""
    error, norm = found.double() - expected.double(), expected.double().norm()
    along = (error * expected.double()).sum() / norm.square()
    return {"gradient error": (error.norm() / norm).item(), "gradient along": along.item()}


def compare(heads: dict[str, Head], hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """Each head against the anchor on the same hidden states and weight."""
    expected, gradient = call(anchor, hidden, weight, labels)
    found = {name: call(head, hidden, weight, labels) for name, head in heads.items()}
    return {
        name: difference(results, expected) | gradient_difference(other, gradient)
        for name, (results, other) in found.items()
    }


def train(folder: Path, name: str, found: Sequence[Sample], held_out: Sequence[Sample]) -> dict[str, Any]:
    """One training. Of every step the means by fp32 logits, and in the anchor's training `compare` of the others.

    And the means of the samples held out, by fp32 logits, at the end.
    """
    training, begun = Training(folder), time.monotonic()
    result: dict[str, Any] = {"means": [], "compared": [], "held_out": []}
    others = {other: head for other, head in HEADS.items() if other != "anchor"}
    for number, sample in enumerate(found, 1):
        hidden, weight = training.head_inputs(sample)
        with torch.no_grad():
            result["means"].append(means(anchor(hidden, weight, sample.labels)))
        if name == "anchor":
            result["compared"].append(compare(others, hidden, weight, sample.labels))
        training.step(HEADS[name](hidden, weight, sample.labels))
        if number % 20 == 0:
            print(f"{name}: {number} steps, {time.monotonic() - begun:.0f} s", flush=True)
    with torch.no_grad():
        result["held_out"] = [means(anchor(*training.head_inputs(one), one.labels)) for one in held_out]
    return result | {"seconds": round(time.monotonic() - begun, 1)}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean with its standard error over the steps, and root mean square."""
    return {
        "mean": statistics.fmean(values),
        "standard_error": statistics.stdev(values) / len(values) ** 0.5,
        "rms": statistics.fmean(value * value for value in values) ** 0.5,
    }


def same_weights(compared: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """head -> figure of `compare` -> its summary over the steps."""
    return {
        name: {figure: summary([step[name][figure] for step in compared]) for figure in figures}
        for name, figures in compared[0].items()
    }


def trainings_apart(trainings: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """training -> "steps entropy" … "held out phi" -> summary of its differences from the anchor's training."""
    return {
        name: {
            f"{place.replace('_', ' ')} {of}": summary(
                [one[of] - other[of] for one, other in zip(run[place], trainings["anchor"][place], strict=True)]
            )
            for place in ("means", "held_out")
            for of in ("entropy", "phi")
        }
        for name, run in trainings.items()
        if name != "anchor"
    }


def show(title: str, found: dict[str, dict[str, dict[str, float]]]) -> None:
    print(f"\n{title}: mean over the steps, its standard error, root mean square")
    for name, figures in found.items():
        for figure, value in figures.items():
            numbers = f"{value['mean']:+10.1e} +- {value['standard_error']:.1e}{value['rms']:10.1e}"
            print(f"  {name:14}{figure:18}{numbers}")


def main() -> None:
    from real_model import surroundings
    from transformers import AutoTokenizer

    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    records = [json.loads(line) for line in options.records_file.read_text(encoding="utf-8").splitlines()]
    records.sort(key=lambda record: sum(len(message["content"]) for message in record["messages"]))
    if len(records) < options.steps + HELD_OUT:
        raise SystemExit(f"--records-file: {len(records)} records, {options.steps + HELD_OUT} are read")
    found = samples(AutoTokenizer.from_pretrained(options.hf_model), records[: options.steps + HELD_OUT], LENGTH)
    trained, held_out = found[: options.steps], found[options.steps :]
    trainings = {name: train(options.hf_model, name, trained, held_out) for name in HEADS}
    result = {
        "benchmark": "drift",
        **surroundings(options),
        "steps": options.steps,
        "trained_tokens": sum(len(sample.labels) for sample in trained),
        "learning_rate": LR,
        "same_weights": same_weights(trainings["anchor"]["compared"]),
        "trainings_apart": trainings_apart(trainings),
        "seconds": {name: training["seconds"] for name, training in trainings.items()},
    }
    print(f"{result['steps']} steps, {result['trained_tokens']} trained tokens")
    show("On the same weights, against fp32 logits", result["same_weights"])
    show("Between trainings, against the anchor's", result["trainings_apart"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-model", type=Path, required=True)
    parser.add_argument("--records-file", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
