"""Where losses put their weight, and their gradient: `python where.py OUT NAME=PACKS … --tokenizer-model DIR`.

PACKS were made by `prepare` with the reference of a `score`, so what stands beside each token is what that model says
of it: the base model before training, or a trained one. Kinds of an answer's tokens:

    first       the first one, which settles whether steps are written at all
    words       all that is no number
    copied      digits of a number that the question or the answer has had before
    calculated  digits of any other number
    end         what ends the turn

Of a loss, `weight` is the mean of its token weight w in a kind; `share` is the kind's share of the sum of w (1 - p):
half the L1 norm of the gradient on the token's logits, w (softmax - onehot).
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.data.packed.store import PackedStore
from megatron_idft.files import write_atomically
from megatron_idft.objectives import resolve_objective
from megatron_idft.statistics import TokenStatistics

KINDS = ("first", "words", "copied", "calculated", "end")
LOSSES = ("ce", "dft", "idft", "entropy", "chord", "cll")
NUMBER = re.compile(r"\d+")


def kinds(question: str, pieces: Sequence[str]) -> list[str]:
    """The kind of each token of an answer, which is `pieces`, the last one being what ends it."""
    text = "".join(pieces[:-1])
    known = set(NUMBER.findall(question))
    letters = ["words"] * len(text)
    for number in NUMBER.finditer(text):
        kind = "copied" if number[0] in known else "calculated"
        known.add(number[0])
        letters[number.start() : number.end()] = [kind] * len(number[0])
    found, begin = [], 0
    for piece in pieces[:-1]:
        inside = [kind for kind in letters[begin : begin + len(piece)] if kind != "words"]
        found.append(inside[0] if inside else "words")
        begin += len(piece)
    return ["first", *found[1:], "end"]


def tokens(packs: Path, tokenizer: Any) -> Iterator[tuple[str, float, float]]:
    """Kind, log_prob and entropy of each trained token; every document is a question and one answer."""
    store = PackedStore(packs)
    for number in range(len(store)):
        pack = store.pack(number)
        for part in pack.documents():
            trained = np.flatnonzero(pack.mask[part])
            ids = pack.ids[part]
            question = tokenizer.decode(ids[: trained[0]].tolist())
            pieces = [tokenizer.decode([token]) for token in ids[trained].tolist()]
            columns = (pack.reference[name][part][trained].tolist() for name in ("log_prob", "entropy"))
            yield from zip(kinds(question, pieces), *columns, strict=True)


def measured(packs: Path, tokenizer: Any) -> dict[str, Any]:
    """The numbers of every kind, and each loss's."""
    rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for kind, log_prob, entropy in tokens(packs, tokenizer):
        rows[kind].append((log_prob, entropy))
    total = sum(map(len, rows.values()))
    result: dict[str, Any] = {"tokens": total, "kinds": {}, "losses": {name: {} for name in LOSSES}}
    pulls: dict[str, dict[str, float]] = {name: {} for name in LOSSES}
    for kind in KINDS:
        values = torch.tensor(rows[kind] or [(0.0, 0.0)], dtype=torch.float64)
        log_prob, entropy = values.unbind(1)
        result["kinds"][kind] = {
            "share": len(rows[kind]) / total,
            "cross_entropy": -log_prob.mean().item(),
            "phi": (log_prob + entropy).mean().item(),
        }
        for name in LOSSES:
            weight = weights(name, log_prob, entropy, tokenizer.vocab_size)
            result["losses"][name][kind] = {"weight": weight.mean().item()}
            pulls[name][kind] = (weight * (1 - log_prob.exp())).sum().item() if rows[kind] else 0.0
    for name, pull in pulls.items():
        for kind in KINDS:
            result["losses"][name][kind]["share"] = pull[kind] / sum(pull.values())
    return result


def weights(loss: str, log_prob: torch.Tensor, entropy: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[n], as the objective gives them."""
    labels = torch.zeros(len(log_prob), dtype=torch.int64)
    return resolve_objective(loss).weight(TokenStatistics(log_prob, entropy, labels, vocab_size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("packs", nargs="+", metavar="NAME=PACKS", help="what to call them, and their prefix")
    parser.add_argument("--tokenizer-model", required=True, metavar="DIR")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer_model)
    found = {}
    for one in args.packs:
        name, separator, packs = one.partition("=")
        if not separator:
            parser.error(f"{one!r} is no NAME=PACKS")
        found[name] = measured(Path(packs), tokenizer)
    write_atomically(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
