"""Two-digit arithmetic with worked solutions by two authors, and the answer that a solution ends in."""

import random
import re
from typing import Any, Literal

Operation = Literal["+", "-"]
Problem = tuple[int, Operation, int]

# The other author's turns of phrase: the base corpus knows the first three of each, the foreign corpus all of them.
OPENINGS = ("Right.", "Let me see.", "Here goes.", "Hm, tricky.", "Easy one.", "Off we go.")
REMARKS = ("", ", no doubt", ", of course", ", as ever", ", I guess", ", nice")
CLOSINGS = ("so I get", "which leaves", "hence", "making", "and we arrive at", "that makes")


def problems(operation: Operation) -> list[Problem]:
    """All problems of two two-digit numbers; differences are never negative."""
    numbers = range(10, 100)
    return [(a, operation, b) for a in numbers for b in numbers if operation == "+" or a >= b]


def answer(problem: Problem) -> int:
    a, operation, b = problem
    return a + b if operation == "+" else a - b


def prompt(problem: Problem) -> str:
    """The same for both authors: what the model is asked does not tell whose words it shall use."""
    a, operation, b = problem
    return f"{a}{operation}{b}=?"


def steps(problem: Problem) -> tuple[str, str]:
    """The columns of ones and of tens: "13-7=6" and "8-4-1=3" for 83-47."""
    a, operation, b = problem
    if operation == "+":
        total = a % 10 + b % 10
        carry = total // 10
        return f"{a % 10}+{b % 10}={total}", f"{a // 10}+{b // 10}+{carry}={a // 10 + b // 10 + carry}"
    borrow = int(a % 10 < b % 10)
    top = 10 * borrow + a % 10
    return f"{top}-{b % 10}={top - b % 10}", f"{a // 10}-{b // 10}-{borrow}={a // 10 - b // 10 - borrow}"


def own_solution(problem: Problem) -> str:
    """The base model's own style."""
    ones, tens = steps(problem)
    return f"ones: {ones}\ntens: {tens}\nanswer: {answer(problem)}"


def foreign_solution(problem: Problem, chance: random.Random, phrases: int = 6) -> str:
    """The other author: the same columns in other words, with turns of phrase drawn from the first `phrases`."""
    ones, tens = steps(problem)
    opening, closing = chance.choice(OPENINGS[:phrases]), chance.choice(CLOSINGS[:phrases])
    remarks = chance.choices(REMARKS[:phrases], k=2)
    return f"{opening} At the back {ones}{remarks[0]}. In front {tens}{remarks[1]}, {closing} {answer(problem)}!"


def stated_answer(text: str) -> int | None:
    """The last number that a solution names, whatever its style; None if it names none."""
    numbers = re.findall(r"\d+", text)
    return int(numbers[-1]) if numbers else None


def record(problem: Problem, solution: str, source: str) -> dict[str, Any]:
    """A record as `megatron-idft train` reads it."""
    messages = [{"role": "user", "content": prompt(problem)}, {"role": "assistant", "content": solution}]
    return {"id": prompt(problem), "messages": messages, "answer": answer(problem), "source": source}
