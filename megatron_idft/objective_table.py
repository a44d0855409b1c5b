"""The table of named objectives. `--sft-loss`, its help and docs/loss.md are made from it.

It is apart from objectives.py, which has a function of each name and imports torch: `--help` comes at once.
"""

from typing import NamedTuple


class NamedObjective(NamedTuple):
    """What a reader has to know of an objective.

    Attributes:
        weight: of a token, with p its probability, H the entropy in nats and phi = log p + H.
        purpose: what it is for.
        paper: on arXiv, or None.
    """

    weight: str
    purpose: str
    paper: str | None


OBJECTIVES = {
    "ce": NamedObjective("1", "plain supervised fine-tuning: every token counts the same", None),
    "dft": NamedObjective(
        "p", "learns what the model finds likely, and little of what it finds improbable", "2508.05629"
    ),
    "idft": NamedObjective(
        "p^gamma', gamma' = 1 + lambda (gamma - 1), gamma = clamp(exp(-phi / beta), min, max)",
        "`dft` that also sees how certain the model is: an improbable token weighs least where the model is sure",
        "2602.12222",
    ),
    "entropy": NamedObjective(
        "H / ln V",
        "learns where the model is uncertain, whatever the token, and leaves alone what it is sure of",
        "2601.02151",
    ),
    "power": NamedObjective(
        "p^q",
        "a dial: q = 0 is `ce`, q = 1 is `dft`; the larger q, the more the model's own prior counts",
        "2510.00526",
    ),
    "chord": NamedObjective(
        "p (1 - p)",
        "learns tokens about which the model is undecided; improbable and certain ones hardly count",
        "2508.11408",
    ),
    "deft": NamedObjective(
        "p^a a / (a + 1e-6), a = sum of p_v^2 over the vocabulary",
        "near `ce` where the distribution is flat, near `dft` where it is sharp, with no number to choose",
        "2602.11424",
    ),
    "cll": NamedObjective(
        "min(1, exp(phi))",
        "`ce` for every token that is at least as likely as the average one there; less only below that",
        "2608.26735",
    ),
}
