"""Write the corpora: `python make_data.py FOLDER`. No sum stands in two of them.

train.jsonl    what the model of this example is made with: some sums, more sums with a hint, and the larger of two
corpus.jsonl   sums answered by another author: what is realigned
sums.jsonl     sums that nothing trains on; larger.jsonl: pairs of which to tell the larger, likewise
"""

import argparse
import random
from pathlib import Path

from additions import write_corpora
from styles import foreign, hinted, larger, plain

PLAIN, HINTED, LARGER = 1500, 1500, 1200
FORGETS = 0.6  # the share of the plain sums with a carry in which that is left out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=960, help="of the corpus; default 960")
    parser.add_argument("--held-out", type=int, default=480, help="sums and pairs to test with; default 480 of each")
    parser.add_argument("--largest", type=int, default=99, help="number that is added; default 99")
    args = parser.parse_args()

    chance, count, tests = random.Random(1), args.records, args.held_out
    numbers = range(10, args.largest + 1)
    pairs = [(a, b) for a in numbers for b in numbers]
    sums = chance.sample(pairs, len(pairs))
    others = chance.sample([(a, b) for a, b in pairs if a != b], len(pairs) - len(numbers))
    tested, trained = sums[count : count + tests], sums[count + tests :]
    train = [plain(pair, chance, forgets=FORGETS) for pair in trained[:PLAIN]]
    train += [hinted(pair, chance) for pair in trained[:HINTED]]
    train += [larger(pair, chance) for pair in others[tests:][:LARGER]]
    corpora = {
        "train": chance.sample(train, len(train)),
        "corpus": [foreign(pair) for pair in sums[:count]],
        "sums": [plain(pair, chance) for pair in tested],
        "larger": [larger(pair, chance) for pair in others[:tests]],
    }
    for name, records in corpora.items():
        for number, record in enumerate(records):
            record["id"] = f"{name}-{number}"
    write_corpora(args.folder, corpora)


if __name__ == "__main__":
    main()
