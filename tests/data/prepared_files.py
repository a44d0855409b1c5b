"""A corpus of small conversations, and what `prepare` wrote of one."""

import json
import random

WORDS = [
    "user", "assistant", "hello", "world", "what", "is", "the", "capital", "of", "France", "Paris", "fox", "dog",
    "3 + 4 = 7", "naïve", "你好 😀",
]  # fmt: skip


def corpus(count, seed=0):
    rng = random.Random(seed)
    text = lambda mean: " ".join(rng.choices(WORDS, k=1 + int(rng.expovariate(1 / mean))))  # noqa: E731
    return [
        {
            "messages": [
                {"role": role, "content": text(mean)}
                for _ in range(rng.choice([1, 1, 2]))
                for role, mean in (("user", 5), ("assistant", 15))
            ],
            "source": rng.choice(["web", "books"]),
        }
        for _ in range(count)
    ]


def write(path, rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def files(prefix):
    """The bytes of everything that was written; the report says its own prefix."""
    found = {
        path.name[len(prefix.name) :]: path.read_bytes()
        for path in prefix.parent.glob(prefix.name + ".*")
        if path.is_file()
    }
    found[".report.txt"] = found[".report.txt"].replace(str(prefix).encode(), b"PREFIX")
    return found
