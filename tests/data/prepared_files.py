"""A corpus of small conversations, and what `prepare` wrote of one."""

import json
import random

from megatron_idft.data.packed.pack_settings import PrepareSettings
from megatron_idft.data.packed.records import tokenize_records

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
    """The bytes of everything that was written; the report without its own name."""
    found = {
        path.name[len(prefix.name) :]: path.read_bytes()
        for path in prefix.parent.glob(prefix.name + ".*")
        if path.is_file()
    }
    text = found[".report.txt"].replace(f"{prefix.name}.errors".encode(), b"PREFIX.errors")
    _, _, found[".report.txt"] = text.partition(b"\n")
    return found


def unpacked(paths, seq_length, **options):
    """Settings for one document to a pack."""
    return PrepareSettings(tuple(map(str, paths)), seq_length, packing=False, **options)


def tokenized(tokenizer, cache_dir, *paths, seq_length=64, **options):
    """Records tokenized into a cache, or opened there."""
    return tokenize_records(unpacked(paths, seq_length, **options), tokenizer, cache_dir, progress=False)
