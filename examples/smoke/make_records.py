"""Write FOLDER/train.jsonl and FOLDER/valid.jsonl: counting, which any model learns within a few steps."""

import json
import random
import sys
from pathlib import Path


def record(rng: random.Random) -> dict[str, str]:
    first, step = rng.randrange(50), rng.randrange(1, 5)
    numbers = ", ".join(str(first + step * i) for i in range(8))
    return {"prompt": f"Count from {first} in steps of {step}.", "response": f"{numbers}."}


def main() -> None:
    folder, rng = Path(sys.argv[1]), random.Random(1)
    for name, size in (("train", 512), ("valid", 16)):
        lines = [json.dumps(record(rng)) + "\n" for _ in range(size)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
