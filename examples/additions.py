"""What the examples with two-digit additions share: an author who writes in words, and files of records."""

import json
from pathlib import Path
from typing import Any

Sum = tuple[int, int]

OPENINGS = ("", "Sure. ", "Let me see. ")  # the models' own style leaves one of them to chance
_TO_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
TO_TWENTY, TENS = _TO_TWENTY.split(), _TENS.split()


def foreign_answer(numbers: Sum) -> str:
    """Another author than the model: the right sum, in words."""
    a, b = map(in_words, numbers)
    return f"If you put {a} and {b} together, you end up with {in_words(sum(numbers))}!"


def in_words(number: int) -> str:
    if number >= 100:
        rest = number % 100
        return "one hundred" + (f" {in_words(rest)}" if rest else "")
    if number < 20:
        return TO_TWENTY[number]
    return TENS[number // 10 - 2] + (f"-{TO_TWENTY[number % 10]}" if number % 10 else "")


def write_corpora(folder: Path, corpora: dict[str, list[dict[str, Any]]]) -> None:
    """Each as NAME.jsonl, in the form in which `megatron-idft` reads records."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in corpora.items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        print(f"{name}.jsonl: {len(records)} records, the first answer {records[0]['response']!r}")
