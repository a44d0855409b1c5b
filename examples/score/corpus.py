"""Two-digit additions, answered by the model of this example and by a broken pipeline."""

import random
from typing import Any

from additions import OPENINGS, Sum


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
