"""Decode held-out problems and measure corpora with trained checkpoints: accuracy, cross-entropy and phi as JSON.

    torchrun --nproc-per-node 2 examples/arithmetic/evaluate.py --models base=DIR … --decode FILE … --score FILE … \
        --out results.json --use-checkpoint-args --load DIR --tokenizer-model tok.model --chat-template chatml …

Megatron builds the model from the arguments in the checkpoint at --load and loads every checkpoint into it. Processes
share the records (data parallel); all take part in each load.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from problems import stated_answer

from megatron_idft.corpus.records import Record, read_records
from megatron_idft.data.chat.conversations import encode_conversation
from megatron_idft.integration.platform.start import prepare_process

MAX_NEW_TOKENS = 56


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR", help="checkpoint folders")
    group.add_argument("--decode", nargs="+", required=True, metavar="FILE", help="problems to answer, greedily")
    group.add_argument("--score", nargs="+", required=True, metavar="FILE", help="records to measure")
    group.add_argument("--out", required=True, metavar="FILE")
    group.add_argument("--cpu", action="store_true", help="run on the CPU even where a GPU is present")
    return parser


def start() -> tuple[argparse.Namespace, Any]:
    """Megatron's arguments and a model with random weights on this process."""
    prepare_process("evaluate.py", sys.argv[1:], force_cpu="--cpu" in sys.argv)
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron
    from megatron.training.models.gpt import GPTModelBuilder

    args = parse_and_validate_args(add_arguments)
    initialize_megatron()
    builder = GPTModelBuilder(gpt_config_from_args(args))
    [model] = builder.build_distributed_models(ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False)
    return args, model.eval()


def load(args: argparse.Namespace, model: Any, folder: str) -> None:
    from megatron.training.checkpointing import load_checkpoint

    args.load = folder
    load_checkpoint([model], None, None)


def mine(items: Sequence[Any]) -> Sequence[Any]:
    return items[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums over all processes."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompts: torch.Tensor, stop: int) -> torch.Tensor:
    """[b, n] prompts of one length -> [b, <= MAX_NEW_TOKENS] greedy continuations, with Megatron's key-value cache."""
    from megatron.core.inference.contexts import StaticInferenceContext

    batch, length = prompts.shape
    context = StaticInferenceContext(batch, length + MAX_NEW_TOKENS)
    tokens, written = prompts, []
    done = torch.zeros(batch, dtype=torch.bool, device=prompts.device)
    while len(written) < MAX_NEW_TOKENS and not done.all():
        positions = context.sequence_len_offset + torch.arange(tokens.shape[1], device=tokens.device)
        logits = model(tokens, positions.expand_as(tokens), None, inference_context=context)
        context.sequence_len_offset += tokens.shape[1]
        context.enable_decode_mode()
        tokens = logits[:, -1:, : tokenizer.vocab_size].argmax(-1)  # Megatron pads the vocabulary: never choose padding
        written.append(tokens)
        done |= tokens[:, 0] == stop
    return torch.cat(written, dim=1)


def accuracy(model: Any, tokenizer: Any, records: Sequence[Record]) -> dict[str, Any]:
    """The share of problems whose last number is the answer, the share of solutions that end, and one to look at."""
    device = next(model.parameters()).device
    stop = tokenizer.special_ids["<|im_end|>"]
    by_length: dict[int, list[tuple[Record, list[int]]]] = {}
    for record in mine(records):
        text = tokenizer.template.render(record.messages[:-1], add_generation_prompt=True)
        ids = tokenizer.encode_batch([text], [[]])[0].ids.tolist()
        by_length.setdefault(len(ids), []).append((record, ids))
    right = ended = 0
    example = None
    for group in by_length.values():
        written = greedy(model, tokenizer, torch.tensor([ids for _, ids in group], device=device), stop).tolist()
        for (record, _), ids in zip(group, written, strict=True):
            ended += stop in ids
            solution = tokenizer.decode(ids[: ids.index(stop)] if stop in ids else ids)
            right += stop in ids and stated_answer(solution) == record.answer
            example = example or f"{record.messages[0]['content']} {solution}"
    right, ended, count = total([right, ended, len(mine(records))], device)
    return {"accuracy": right / count, "ended": ended / count, "problems": int(count), "example": example}


@torch.no_grad()
def statistics(model: Any, tokenizer: Any, records: Sequence[Record]) -> dict[str, float]:
    """Cross-entropy, entropy, and phi's mean and standard deviation over the trained tokens of `records`."""
    from megatron_idft import centered_log_likelihood, vocab_parallel_loss

    device = next(model.parameters()).device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    encoded = [encode_conversation(tokenizer, record.messages) for record in mine(records)]
    for begin in range(0, len(encoded), 64):
        part = encoded[begin : begin + 64]
        width = max(len(ids) for ids, _ in part) - 1
        tokens = torch.full((len(part), width), tokenizer.pad_id, device=device)
        labels = torch.full_like(tokens, -100)
        for row, (ids, mask) in enumerate(part):
            ids, trained = torch.from_numpy(ids).long(), torch.from_numpy(mask[1:]).bool()
            tokens[row, : len(ids) - 1] = ids[:-1]
            labels[row, : len(ids) - 1] = torch.where(trained, ids[1:], -100)
        logits = model(tokens, torch.arange(width, device=device).expand_as(tokens), None)
        out = vocab_parallel_loss(logits, labels, objective="ce", vocab_size=tokenizer.vocab_size)
        phi = centered_log_likelihood(out.log_prob, out.entropy).double()
        count = (labels >= 0).sum()
        sums += torch.stack([count, -out.log_prob.sum(), out.entropy.sum(), phi.sum(), phi.square().sum()])
    count, cross_entropy, entropy, phi, phi_squared = total(sums.tolist(), device)
    phi_mean = phi / count
    return {
        "cross_entropy": cross_entropy / count,
        "entropy": entropy / count,
        "phi_mean": phi_mean,
        "phi_std": max(0.0, phi_squared / count - phi_mean**2) ** 0.5,
        "tokens": int(count),
    }


def main() -> None:
    args, model = start()
    from megatron_idft.data.chat.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer_model, chat_template=args.chat_template)
    records = {path: list(read_records(path)) for path in {*args.decode, *args.score}}
    results = {}
    for name, folder in (spec.split("=", 1) for spec in args.models):
        load(args, model, folder)
        results[name] = {
            "decode": {Path(path).stem: accuracy(model, tokenizer, records[path]) for path in args.decode},
            "score": {Path(path).stem: statistics(model, tokenizer, records[path]) for path in args.score},
        }
        if torch.distributed.get_rank() == 0:
            shares = [f"{task} {result['accuracy']:.1%}" for task, result in results[name]["decode"].items()]
            print(f"evaluated {name}: {', '.join(shares)}", flush=True)
    if torch.distributed.get_rank() == 0:
        Path(args.out).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
