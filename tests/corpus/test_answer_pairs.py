"""Pairs of answers by kind: what is not the same is never right, in either order, with math-verify and without.

Replies are in the forms that models give: the last sentence counts where the reference is a number.
"""

import json
from pathlib import Path

import pytest

from megatron_idft.corpus.verification.verifier import Verifier

FOLDER = Path(__file__).parent / "verdicts"

WITHOUT = "megatron_idft.corpus.verification.verifier.find_spec"


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


SAID = read("said_the_same.jsonl")
PAIRS = read("pairs.jsonl")  # reference and candidate, each an answer, or a whole response; outcome as it should be

REPLIES = read("replies.jsonl")  # formula: only math-verify can decide; one_way: it says nothing of the other order


def in_a_box(answer: str) -> str:
    return answer if "\\boxed" in answer else rf"\boxed{{{answer}}}"


def in_both_orders(pairs: list[dict]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    there, back = [], []
    for pair in pairs:
        given = pair.get("response") or pair.get("candidate", "")
        there.append((given if "response" in pair or "same" in pair else in_a_box(given), pair["reference"]))
        whole = "response" in pair or not given.startswith("\\boxed{")
        back.append((in_a_box(pair["reference"]), given if whole else given[len("\\boxed{") : -1]))
    return there, back


@pytest.fixture(scope="module")
def verifier():
    """One pair of processes for all tests."""
    with Verifier(timeout_seconds=60) as verifier:
        yield verifier


@pytest.fixture(scope="module")
def verdicts(verifier):
    """Of all pairs, in both orders."""
    there, back = in_both_orders(SAID + PAIRS)
    found = verifier.verify(there + back)
    return found[: len(there)], found[len(there) :]


def test_there_are_enough_of_each_outcome():
    for outcome in ("right", "wrong", "unknown"):
        assert sum(pair["outcome"] == outcome for pair in PAIRS) >= 120
    assert len(SAID) == 75 and len({pair["kind"] for pair in PAIRS}) >= 20


def test_only_what_says_the_same_is_right(verdicts):
    for found in verdicts:
        for pair, verification in zip(SAID, found, strict=False):
            assert (verification.verdict == "right") == pair["same"], (pair, verification)


@pytest.mark.parametrize("kind", sorted({pair["kind"] for pair in PAIRS}))
def test_pairs_of(kind, verdicts):
    for back, found in enumerate(verdicts):
        for pair, verification in zip(PAIRS, found[len(SAID) :], strict=True):
            if pair["kind"] != kind:
                continue
            if back and "response" in pair and pair["outcome"] != "right":  # as a reference, it may have no answer
                assert verification.verdict != "right", (pair, verification)
            else:
                assert verification.verdict == pair["outcome"], (pair, verification)


def test_without_math_verify_fewer_are_right_and_none_wrongly(monkeypatch):
    monkeypatch.setattr(WITHOUT, lambda name: None)
    same = [pair["same"] for pair in SAID] + [pair["outcome"] == "right" for pair in PAIRS]
    there, back = in_both_orders(SAID + PAIRS)
    with Verifier() as verifier:
        for items in (there, back):
            right = [verification.verdict == "right" for verification in verifier.verify(items)]
            assert all(truth for found, truth in zip(right, same, strict=True) if found)
            assert sum(right) > 120
        assert not verifier._pool._processes


def check_replies(verifier, *, formulas: bool) -> None:
    there = [(reply, (reply["response"], reply["reference"])) for reply in REPLIES]
    symmetric = [reply for reply in REPLIES if "one_way" not in reply]
    back = [(reply, (f"The answer is {reply['reference']}", reply["response"])) for reply in symmetric]
    found = verifier.verify([item for _, item in there + back])
    for (reply, item), verification in zip(there + back, found, strict=True):
        possible = {reply["verdict"]} if formulas or "formula" not in reply else {reply["verdict"], "unknown"}
        assert verification.verdict in possible, (item, reply["why"], verification)


def test_replies(verifier):
    check_replies(verifier, formulas=True)


def test_replies_without_math_verify(monkeypatch):
    monkeypatch.setattr(WITHOUT, lambda name: None)
    with Verifier() as verifier:
        check_replies(verifier, formulas=False)
        assert not verifier._pool._processes


def test_there_are_enough_replies():
    assert len({(reply["response"], reply["reference"]) for reply in REPLIES}) == len(REPLIES) > 200
    for verdict in ("right", "wrong", "unknown"):
        assert sum(reply["verdict"] == verdict for reply in REPLIES) >= 40
    assert sum("formula" in reply for reply in REPLIES) < 20
    assert sum("one_way" not in reply for reply in REPLIES) > 120
