"""What a model answers and how far it has gone from the base model: one JSON for each checkpoint.

    torchrun … examples/study/evaluate.py --hf-model DIR --sft-data PROBLEMS.jsonl … --output FOLDER [--cpu]
        [--trained FOLDER --steps 8 16 32 --last 32 --base FOLDER/0.json]

Without --base it is the base model, step 0, whose samples are kept: those of the chat prompts and, one each, of the
problems with samples. Trained models, checkpoints of a training or --hf-model itself, are measured on them: the mean of
log p_base - log p over tokens that the base model has drawn is an unbiased estimate of KL(base, model) per token.
Answers are decoded by the project's engine, greedily and, where --sampled names the split, at temperature 1;
reasoning-gym's own verifier compares the final answer that an answer states, or its last number. An answer that does
not end by itself is wrong. Before the last of the steps only the target and retention are asked, greedily: points of a
curve.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_idft.corpus.records import read_records
from megatron_idft.corpus.verification.answers import final_answer
from megatron_idft.files import write_atomically
from megatron_idft.integration.platform.hf_model import expand
from megatron_idft.integration.platform.start import prepare_process

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ROWS = 64  # answers decoded at once
BETWEEN = ("test",)  # splits that are asked before the last step, beside retention
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    from megatron_idft.integration.offline.score_arguments import add_score_arguments

    group = add_score_arguments(parser).add_argument_group("evaluation")
    group.add_argument("--trained", metavar="DIR", help="the --save of a training; default: --hf-model itself")
    group.add_argument("--steps", type=int, nargs="+", default=[0], help="checkpoints; without --trained its name")
    group.add_argument("--last", type=int, help="step with all questions; default: the last of --steps")
    group.add_argument("--base", metavar="FILE", help="what this program wrote of the base model; of others only")
    group.add_argument("--corpus", metavar="FILE", help="training records, of which phi is measured")
    group.add_argument("--corpus-records", type=int, default=32, help="how many of them; default: %(default)s")
    group.add_argument("--sampled", nargs="*", default=[], metavar="SPLIT", help="splits that are also sampled")
    group.add_argument("--samples", type=int, default=4, help="samples of each of their problems; default: %(default)s")
    group.add_argument("--chat-samples", type=int, default=2, help="the same of chat prompts; default: %(default)s")
    group.add_argument("--answer-tokens", type=int, default=96, help="longest answer; default: %(default)s")
    return parser


def stated(text: str) -> str:
    """The answer that a verifier of reasoning-gym is given: numbers, and words where an answer has no number."""
    answer = final_answer(text) or text
    numbers = NUMBER.findall(answer)
    return numbers[-1].replace(",", "") if numbers else answer.strip().strip(".*\"'")


def is_right(text: str, problem: Row) -> bool:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(problem["source"])(stated(text), problem) >= 1


def decode(
    engine: Any, tokenizer: Any, problems: Sequence[Row], args: argparse.Namespace, sampled: Sequence[str]
) -> list[Row]:
    """The answers to each problem: greedy ones first, then samples; chat prompts have samples only."""
    from megatron_idft.hinted_decoding.stages.conversation import encode
    from megatron_idft.inference.requests import DecodeSettings, Request, Sampling, Stopping

    stopping = Stopping(stop_ids(tokenizer), args.answer_tokens)
    requests, owners = [], {}
    for problem in problems:
        prompt = encode(tokenizer, tokenizer.template.render(problem["messages"], add_generation_prompt=True))
        kinds = [] if problem["split"] == "chat" else ["greedy"]
        count = args.chat_samples if problem["split"] == "chat" else args.samples * (problem["split"] in sampled)
        kinds += [f"sample {i}" for i in range(count)]
        for kind in kinds:
            settings = DecodeSettings(Sampling(0.0 if kind == "greedy" else 1.0), stopping)
            request = Request(f"{problem['id']} {kind}", prompt, seed=args.seed, settings=settings)
            requests.append(request)
            owners[request.id] = problem, kind
    found = {done.request.id: done for done in engine.decode(requests)}
    return [answer(found[request.id], *owners[request.id], tokenizer) for request in requests]


def answer(done: Any, problem: Row, kind: str, tokenizer: Any) -> Row:
    ended = done.finish_reason == "eos"
    text = tokenizer.decode(done.token_ids[: -1 if ended else None])
    row = {"problem": problem["id"], "split": problem["split"], "kind": kind, "tokens": len(done.token_ids)}
    row |= {"ended": ended, "text": text, "entropy": float(done.entropy.sum(dtype=np.float64))}
    if problem["split"] != "chat":
        row["right"] = bool(ended and is_right(text, problem))
    if kind == "sample 0" or problem["split"] == "chat":
        row |= {"prompt_ids": done.request.prompt.tolist(), "ids": done.token_ids.tolist()}
    return row


def stop_ids(tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    from megatron_idft.hinted_decoding.stages.conversation import encode

    turn = tokenizer.template.render([{"role": "user", "content": "?"}], add_generation_prompt=False)
    return {int(encode(tokenizer, turn.rstrip())[-1]), tokenizer.eos_id}


def scored(engine: Any, prompts: Sequence[Any], responses: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Each response's log_prob and entropy, fp32 [n]."""
    sequences = [np.concatenate([p, r]).astype(np.int64) for p, r in zip(prompts, responses, strict=True)]
    for (log_prob, entropy), prompt in zip(engine.score(sequences), prompts, strict=True):
        yield log_prob[len(prompt) - 1 :], entropy[len(prompt) - 1 :]


def distance(engine: Any, samples: Sequence[Row]) -> list[Row]:
    """The base model's samples under this model: sums over tokens of log p, phi and its square."""
    prompts, responses = [row["prompt_ids"] for row in samples], [row["ids"] for row in samples]
    return [
        {key: row[key] for key in ("problem", "split", "kind", "tokens")} | sums(log_prob, entropy)
        for row, (log_prob, entropy) in zip(samples, scored(engine, prompts, responses), strict=True)
    ]


def sums(log_prob: Any, entropy: Any) -> Row:
    log_prob, phi = log_prob.astype(np.float64), (log_prob + entropy).astype(np.float64)
    return {"log_prob": log_prob.sum(), "phi": phi.sum(), "phi_squared": np.square(phi).sum()}


def corpus(engine: Any, tokenizer: Any, args: argparse.Namespace) -> list[Row]:
    """The same sums over the trained tokens of records."""
    from megatron_idft.data.chat.conversations import encode_conversation

    prompts, responses = [], []
    for _, record in zip(range(args.corpus_records), read_records(args.corpus), strict=False):
        ids, mask = encode_conversation(tokenizer, record.messages)
        begin = int(np.flatnonzero(mask)[0])
        end = int(np.flatnonzero(mask)[-1]) + 1
        prompts.append(ids[:begin])
        responses.append(ids[begin:end])
    return [
        {"tokens": len(log_prob)} | sums(log_prob, entropy) for log_prob, entropy in scored(engine, prompts, responses)
    ]


def load(args: argparse.Namespace, model: Sequence[Any], step: int) -> None:
    """A checkpoint of the training into the model."""
    from megatron.training.checkpointing import load_checkpoint

    args.load, args.ckpt_step, args.pretrained_checkpoint = args.trained, step, None
    load_checkpoint(list(model), None, None)


def is_asked(problem: Row, base: Sequence[Row], last: bool) -> bool:
    """Whether a trained model is asked: not the chat prompts, and of retention only what the base model has right."""
    if not problem["split"].startswith("retention"):
        return problem["split"] != "chat" and (last or problem["split"] in BETWEEN)
    return any(row["problem"] == problem["id"] and row["right"] for row in base if row["split"] == problem["split"])


def measure(args: argparse.Namespace, model: Sequence[Any], tokenizer: Any, problems: Sequence[Row], step: int) -> Row:
    """All numbers of one checkpoint."""
    from megatron_idft.inference.engine import DecodeEngine

    began = time.monotonic()
    engine = DecodeEngine(model, args.sft_loss_vocab_size, max_positions=args.seq_length, max_rows=ROWS)
    base = json.loads(Path(args.base).read_text(encoding="utf-8"))["answers"] if args.base else []
    last = step == (args.last or args.steps[-1])
    wanted = [problem for problem in problems if not args.base or is_asked(problem, base, last)]
    answers = decode(engine, tokenizer, wanted, args, args.sampled if last else [])
    kept = [row for row in answers if "ids" in row]
    if args.base:
        kept = [row for row in base if "ids" in row]
        for row in answers:
            row.pop("ids", None), row.pop("prompt_ids", None)
    result = {"step": step, "answers": answers, "base_samples": distance(engine, kept)}
    if args.corpus and last:
        result["corpus"] = corpus(engine, tokenizer, args)
    engine.close()
    return result | {"seconds": time.monotonic() - began}


def main() -> None:
    prepare_process("evaluate.py", expand(sys.argv[1:]), force_cpu="--cpu" in sys.argv)
    from megatron_idft.data.chat.tokenizer import load_tokenizer
    from megatron_idft.integration.offline import program

    args = program.parse(add_arguments, ("samples", "chat_samples", "answer_tokens"))
    tokenizer = load_tokenizer(args.tokenizer_model, chat_template=args.chat_template)
    model = program.load_model(args)
    problems = [json.loads(line) for path in args.sft_data for line in Path(path).read_text("utf-8").splitlines()]
    Path(args.output).mkdir(parents=True, exist_ok=True)
    for step in args.steps:
        path = Path(args.output) / f"{step}.json"
        if path.exists():
            continue
        if args.trained:
            load(args, model, step)
        result = measure(args, model, tokenizer, problems, step)
        write_atomically(path, json.dumps(result, separators=(",", ":")) + "\n")
        test = [row["right"] for row in result["answers"] if row["split"] == "test" and row["kind"] == "greedy"]
        print(f"step {step}: {sum(test)} of {len(test)} right, {result['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
