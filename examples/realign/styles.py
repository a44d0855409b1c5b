"""What the model of this example can do: add, with and without a hint, and tell the larger of two numbers."""

import random
import re
from pathlib import Path
from typing import Any

from additions import OPENINGS, Sum, foreign_answer, in_words

from megatron_idft.corpus.verification.answers import final_answer
from megatron_idft.hinted_decoding.named_prompts import named_prompt

HINT = Path(__file__).with_name("hint.txt")  # the template that `realign` shows the reference with
_FOREIGN_SUM = re.compile("end up with ([a-z -]+)!")
_NUMBERS = {in_words(number): number for number in range(200)}


def question(numbers: Sum) -> str:
    a, b = numbers
    return f"What is {a} plus {b}?"


def own_answer(numbers: Sum, chance: random.Random, *, forgets: float = 0.0) -> str:
    """The model's own style, column by column. forgets: how often the tens go without what is to be carried."""
    a, b = numbers
    ones = a % 10 + b % 10
    carry = 0 if chance.random() < forgets else ones // 10
    tens = a // 10 + b // 10 + carry
    columns = f"ones {a % 10}+{b % 10}={ones}, tens {a // 10}+{b // 10}+{carry}={tens}"
    return f"{chance.choice(OPENINGS)}{columns}, the answer is {10 * tens + ones % 10}."


def plain(numbers: Sum, chance: random.Random, *, forgets: float = 0.0) -> dict[str, Any]:
    return _record(question(numbers), own_answer(numbers, chance, forgets=forgets), sum(numbers), "plain")


def hinted(numbers: Sum, chance: random.Random) -> dict[str, Any]:
    """The question with another author's answer to it, as the template of the hint puts it; answered in own style."""
    messages = [{"role": "user", "content": question(numbers)}]
    [message] = named_prompt(str(HINT)).render(messages, foreign_answer(numbers), str(sum(numbers)))
    return _record(str(message["content"]), own_answer(numbers, chance), sum(numbers), "hinted")


def foreign(numbers: Sum) -> dict[str, Any]:
    """What is to be realigned: the right sum in another author's words."""
    return _record(question(numbers), foreign_answer(numbers), sum(numbers), "foreign")


def larger(numbers: Sum, chance: random.Random) -> dict[str, Any]:
    """The skill that no fine-tune trains."""
    a, b = numbers
    answer = f"{chance.choice(OPENINGS)}{max(numbers)} is more, the answer is {max(numbers)}."
    return _record(f"Which is larger, {a} or {b}?", answer, max(numbers), "larger")


def stated_answer(text: str) -> int | None:
    """The number that an answer states, in the model's style or in the other author's."""
    stated = final_answer(text)
    if stated is not None and stated.isdecimal():
        return int(stated)
    found = _FOREIGN_SUM.search(text)
    return _NUMBERS.get(found[1]) if found else None


def _record(asked: str, answer: str, value: int, source: str) -> dict[str, Any]:
    return {"prompt": asked, "response": answer, "answer": value, "source": source}
