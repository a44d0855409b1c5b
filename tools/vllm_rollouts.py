"""Answer the prompts of `megatron-idft realign prompts` with vLLM's offline API, in vLLM's own environment.

    python tools/vllm_rollouts.py prompts.jsonl --model DIR --stage own --output rollouts.jsonl
    python tools/vllm_rollouts.py prompts.jsonl --model DIR --stage analysis --output analyses.jsonl

The files are for `realign --rollouts rollouts.jsonl --analyses analyses.jsonl`, with the same flags as `realign
prompts`. Needs vLLM and the standard library, not megatron-idft. Sampling, stop tokens and lengths come from the file
of prompts. Each request has a seed of its own, from the file's seed, the record's id and the turn. Started again, it
goes on with the prompts that OUTPUT has no line for; a kill loses at most one batch.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STAGES = {"own": "rollouts", "analysis": "analyses"}
COMPARED_PROMPTS = 20  # whose text vLLM's tokenizer must turn into the same ids


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", type=Path, help="the file of `realign prompts`")
    add("--model", required=True, metavar="DIR", help="the Hugging Face folder of the model that is realigned")
    add("--stage", required=True, choices=STAGES, help="own: responses for --rollouts; analysis: for --analyses")
    add("--output", type=Path, required=True, metavar="FILE", help="a .jsonl; one that is there is continued")
    add("--samples", type=int, metavar="K", help="own responses to each prompt; default: --rollout-samples of the file")
    add("--batch", type=int, default=1024, metavar="N", help="prompts given to vLLM at a time; default 1024")
    add("--limit", type=int, metavar="N", help="answer only N more prompts")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs that hold the model together; default 1")
    add("--dtype", default="bfloat16", help="the precision that realign has; default bfloat16, for --bf16")
    add("--engine-args", type=json.loads, default={}, metavar="JSON",
        help='more arguments of vllm.LLM, such as \'{"gpu_memory_utilization": 0.8}\'')  # fmt: skip
    args = parser.parse_args()
    for name in ("samples", "batch", "limit", "tensor_parallel_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: pass a whole number from 1")
    if args.stage == "analysis" and (args.samples or 1) > 1:
        parser.error("--samples: a turn has one analysis")
    return args


def refuse(why: str) -> None:
    sys.exit(f"vllm_rollouts.py: error: {why}")


def read_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """The numbers and rows of a JSONL file."""
    try:
        with open(path, encoding="utf-8", errors="surrogatepass") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no object")
                yield number, row
    except (OSError, ValueError) as error:
        refuse(f"{path}: {error}; write it again")


def read_header(path: Path) -> Row:
    header = next(read_lines(path), (1, {}))[1]
    if header.get("realign_prompts") != 1:
        refuse(f"{path}: its first line is no header of `megatron-idft realign prompts`: pass the file that it wrote")
    return header


def read_prompts(path: Path, stage: str) -> Iterator[Row]:
    """The rows of a stage that have a prompt."""
    for number, row in read_lines(path):
        if number > 1 and row["stage"] == stage and "no_prompt" not in row:
            yield row


def key(row: Row) -> tuple[str, int]:
    return row["id"], row["turn"]


def read_done(output: Path, made: Row, samples: int) -> dict[tuple[str, int], str]:
    """The prompt_sha256 of every turn that `output` has a line for, without a last line that was cut by a kill."""
    if not output.exists():
        return {}
    with open(output, "rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
    done = {}
    for number, row in read_lines(output):
        for name, value in made.items():
            if row.get(name) != value:
                refuse(f"{output}, line {number}: its {name} is {row.get(name)}, now {value}: name another --output")
        if "responses" in row and len(row["responses"]) != samples:
            refuse(f"{output}, line {number}: {len(row['responses'])} samples, now {samples}: name another --output")
        done[key(row)] = row["prompt_sha256"]
    return done


def to_do(args: argparse.Namespace, done: dict[tuple[str, int], str]) -> Iterator[Row]:
    """The prompts that are not answered yet."""
    left = args.limit
    for row in read_prompts(args.prompts, args.stage):
        if key(row) in done:
            if done[key(row)] != row["prompt_sha256"]:
                refuse(f"{args.output} answers another prompt of record {row['id']}: name another --output")
        elif left is None or left > 0:
            left = None if left is None else left - 1
            yield row


def batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def seed_of(header: Row, row: Row) -> int:
    """31 bits; vLLM adds the number of the sample."""
    name = f"{header['seed']}/{row['id']}/{row['turn']}/{row['stage']}"
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:4], "big") >> 1


def check_tokenizer(llm: Any, args: argparse.Namespace) -> None:
    """Refuse a model whose tokenizer is not that of the prompts."""
    tokenizer = llm.get_tokenizer()
    for _, row in zip(range(COMPARED_PROMPTS), read_prompts(args.prompts, args.stage)):  # noqa: B905
        if list(tokenizer.encode(row["text"], add_special_tokens=False)) != row["token_ids"]:
            refuse(
                f"{args.model}: its tokenizer makes other ids of the prompt of record {row['id']} than {args.prompts}"
                " has: pass the model that `realign prompts` named, or write the prompts with this one's tokenizer"
            )


def answer(llm: Any, rows: list[Row], header: Row, sampling: Row, samples: int) -> list[list[Any]]:
    """vLLM's outputs for each row, in the order of the samples."""
    from vllm import SamplingParams

    wanted = [
        SamplingParams(
            n=samples if sampling["temperature"] else 1,  # vLLM decodes greedily once
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=sampling["top_k"],
            max_tokens=row["max_tokens"],
            stop_token_ids=row["stop_token_ids"],
            ignore_eos=True,  # the stop tokens are all listed
            seed=seed_of(header, row),
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
        )
        for row in rows
    ]
    done = llm.generate([{"prompt_token_ids": row["token_ids"]} for row in rows], wanted)
    outputs = [sorted(result.outputs, key=lambda output: output.index) for result in done]
    return outputs if sampling["temperature"] else [found * samples for found in outputs]


def line(row: Row, outputs: list[Any], made: Row) -> Row:
    """As `realign` reads it."""
    texts, ids = [output.text for output in outputs], [list(output.token_ids) for output in outputs]
    found: Row = {"responses": texts, "token_ids": ids}
    if row["stage"] == "analysis":
        found = {"analysis": texts[0], "token_ids": ids[0]}
    reasons = {"finish_reasons": [output.finish_reason for output in outputs]}
    asked = {name: row[name] for name in ("prompt_sha256", "template_sha256") if name in row}
    return {"id": row["id"], "turn": row["turn"]} | found | reasons | asked | made


def main() -> None:
    args = parse()
    header = read_header(args.prompts)
    sampling = header["sampling"][args.stage]
    samples = args.samples or sampling["samples"]
    made = {
        "tokenizer_fingerprint": header["tokenizer_fingerprint"],
        "sampling": {name: sampling[name] for name in ("temperature", "top_p", "top_k")},
        "model": Path(args.model).resolve().name,
    }
    done = read_done(args.output, made, samples)
    total = sum(1 for _ in to_do(args, done))
    print(f"> {len(done):,} prompts are answered, {total:,} to go", flush=True)
    if not total:
        return
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.open("a").close()
    except OSError as error:
        refuse(f"--output {args.output}: {error.strerror}: name a file that can be written")
    import vllm

    llm = vllm.LLM(
        model=args.model,
        dtype=args.dtype,
        max_model_len=header["seq_length"],
        tensor_parallel_size=args.tensor_parallel_size,
        **{"generation_config": "vllm"} | args.engine_args,
    )
    check_tokenizer(llm, args)
    written = 0
    made["engine"] = f"vllm {vllm.__version__}"
    with open(args.output, "a", encoding="utf-8", errors="surrogatepass") as file:
        for rows in batches(to_do(args, done), args.batch):
            for row, outputs in zip(rows, answer(llm, rows, header, sampling, samples), strict=True):
                file.write(json.dumps(line(row, outputs, made), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            written += len(rows)
            print(f"> {written:,} of {total:,} prompts answered", flush=True)
    print(f"> next: realign --{STAGES[args.stage]} {args.output}", flush=True)


if __name__ == "__main__":
    main()
