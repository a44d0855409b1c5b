"""What models answer to held-out questions, through transformers alone: `python ask.py NAME=FOLDER … --data FILE`."""

import argparse
import json
import os
import textwrap
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a folder that lacks a file must not become a request

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def answer(folder: str, questions: list[str], max_new_tokens: int) -> list[str]:
    """The greedy replies of the model in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    replies = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            tokens = model.generate(
                **prompt,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        replies.append(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return replies


def show(title: str, text: str) -> None:
    """An indented paragraph."""
    print(textwrap.indent(f"{title}: {text.strip()}", " " * 8), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="Hugging Face folders")
    parser.add_argument("--data", type=Path, required=True, help="records with messages and answer")
    parser.add_argument("--limit", type=int, default=1, help="number of questions; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="the replies as JSON")
    args = parser.parse_args()
    logging.disable_progress_bar()
    with open(args.data, encoding="utf-8") as file:
        records: list[dict[str, Any]] = [json.loads(line) for _, line in zip(range(args.limit), file, strict=False)]
    questions = [record["messages"][0]["content"] for record in records]
    replies = {}
    for model in args.models:
        name, _, folder = model.partition("=")
        replies[name] = answer(folder, questions, args.max_new_tokens)
    for i, record in enumerate(records):
        show(f"question, whose answer is {record['answer']}", questions[i])
        for name, texts in replies.items():
            show(f"{name} model", texts[i])
    args.out.write_text(json.dumps({"questions": questions, "replies": replies}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
