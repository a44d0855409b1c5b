"""Two-digit additions, answered by the model of this example, by another author, and by a broken pipeline."""

import random
from typing import Any

Sum = tuple[int, int]

OPENINGS = ("", "Sure. ", "Let me see. ")  # the model's own style leaves one of them to chance
_TO_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
TO_TWENTY, TENS = _TO_TWENTY.split(), _TENS.split()


def prompt(numbers: Sum) -> str:
    a, b = numbers
    return f"Add {a} and {b}: first the ones, then the tens, then the sum."


def own_answer(numbers: Sum, chance: random.Random) -> str:
    """The model's own style."""
    a, b = numbers
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    return (
        f"{chance.choice(OPENINGS)}ones {a % 10}+{b % 10}={ones}, tens {a // 10}+{b // 10}+{carry}={tens}, sum {a + b}."
    )


def foreign_answer(numbers: Sum) -> str:
    """Another author: the same sum, as right, in words."""
    a, b = map(in_words, numbers)
    return f"If you put {a} and {b} together, you end up with {in_words(sum(numbers))}!"


def in_words(number: int) -> str:
    if number >= 100:
        rest = number % 100
        return "one hundred" + (f" {in_words(rest)}" if rest else "")
    if number < 20:
        return TO_TWENTY[number]
    return TENS[number // 10 - 2] + (f"-{TO_TWENTY[number % 10]}" if number % 10 else "")


def broken_records(sums: list[Sum], chance: random.Random) -> list[dict[str, Any]]:
    """What pipelines do to good answers: a third too long, so that they are cut, a third twice, a third with prompt."""
    third = len(sums) // 3
    records = []
    for number, numbers in enumerate(sums):
        answer = own_answer(numbers, chance)
        if number < third:
            answer = f"{answer} Once more: " * 4 + answer
        elif number < 2 * third:
            numbers = sums[third + (number - third) // 2]
            answer = own_answer(numbers, random.Random(sum(numbers)))  # the same each time
        else:
            answer = f"{prompt(numbers)} {answer}"
        records.append(record(numbers, answer, "broken", number))
    return records


def record(numbers: Sum, answer: str, source: str, number: int) -> dict[str, Any]:
    """A record as `megatron-idft` reads it."""
    return {"id": f"{source}-{number}", "prompt": prompt(numbers), "response": answer, "source": source}
