"""Answers of Hugging Face folders: `python evaluate.py --models NAME=DIR … --data FILE … --out FILE.json`.

Greedy ones and some sampled at temperature 1; by transformers, so that nothing of what is compared judges itself.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from styles import stated_answer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_idft.corpus.records import Record, read_records

MAX_NEW_TOKENS = 64


def right_answers(model: Any, tokenizer: Any, records: list[Record], temperature: float) -> tuple[int, str]:
    """How many records are answered right, and the first answer. temperature: 0 is greedy."""
    prompts = [
        tokenizer.apply_chat_template(record.messages[:-1], add_generation_prompt=True, tokenize=False)
        for record in records
    ]
    chosen = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    torch.manual_seed(1)
    texts: list[str] = []
    for begin in range(0, len(records), 240):
        batch = tokenizer(prompts[begin : begin + 240], return_tensors="pt", padding=True, padding_side="left")
        written = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, **chosen)
        texts += tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [stated_answer(text) == record.answer for text, record in zip(texts, records, strict=True)]
    return sum(right), texts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--data", nargs="+", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name, folder in (spec.split("=", 1) for spec in args.models):
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        results[name] = {}
        for path in args.data:
            records = list(read_records(path))
            for title, temperature in (("greedy", 0.0), ("sampled", 1.0)):
                right, first = right_answers(model, tokenizer, records, temperature)
                results[name][f"{path.stem} {title}"] = {"right": right, "records": len(records), "first": first}
                print(f"{name}: {right} of {len(records)} {path.stem} {title}, the first {first!r}", flush=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
