"""Write the corpora: `python make_data.py FOLDER [--records 240]`.

train.jsonl    additions in the model's own style: what the model of this example is made with
corpus.jsonl   other additions, from three sources: what is scored
"""

import argparse
import random
from pathlib import Path

from additions import foreign_answer, write_corpora
from corpus import broken_records, own_answer, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=240, help="of each source; default 240")
    args = parser.parse_args()

    chance = random.Random(1)
    sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    chance.shuffle(sums)
    held_out, trained = sums[: 2 * args.records], sums[2 * args.records :]
    answered, broken = held_out[: args.records], held_out[args.records :]
    corpora = {
        "train": [record(s, own_answer(s, chance), "train", i) for i, s in enumerate(trained)],
        # Own and foreign answer the same sums: they differ in style alone.
        "corpus": [record(s, own_answer(s, chance), "own", i) for i, s in enumerate(answered)]
        + [record(s, foreign_answer(s), "foreign", i) for i, s in enumerate(answered)]
        + broken_records(broken, chance),
    }
    write_corpora(args.folder, corpora)


if __name__ == "__main__":
    main()
