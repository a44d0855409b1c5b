"""The table of named objectives. `--sft-loss`, its help and docs/loss.md are made from it.

It is apart from objectives/, which has a function of each name and imports torch: `--help` comes at once.
"""

from collections.abc import Mapping
from typing import NamedTuple


class NamedObjective(NamedTuple):
    """What a reader has to know of an objective.

    Attributes:
        weight: of a token, with p its probability, H the entropy in nats and phi = log p + H; q the probability under
            the reference and r = q / p.
        purpose: what it is for.
        paper: on arXiv, or None.
    """

    weight: str
    purpose: str
    paper: str | None


class ObjectiveFlag(NamedTuple):
    """A flag of `train` and `run` that sets a hyper-parameter of objectives.

    Attributes:
        hyperparameters: name of an objective that has it -> its name there.
        default: of the flag, as the objectives have it.
        help: without the objectives' names and the default.
        choices: the words it takes; empty: a number.
    """

    hyperparameters: Mapping[str, str]
    default: float | str
    help: str
    choices: tuple[str, ...] = ()


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
    "prift": NamedObjective(
        "q",
        "`dft` with a weight that training cannot move: what the reference finds likely is learned",
        "2606.09396",
    ),
    "asft": NamedObjective(
        "p + c (min(r, cap) - 1)",
        "`dft` held to the reference against forgetting; a token that is likelier than there by far is un-learned",
        "2509.23753",
    ),
    "sft_k3": NamedObjective("1 + c (min(r, cap) - 1)", "`ce` held to the reference in the same way", None),
    "minor_sft": NamedObjective(
        "2 sigmoid(-beta log(p / q))",
        "`ce` that lets go of tokens which have become likelier than under the reference",
        "2408.10642",
    ),
    "iw": NamedObjective(
        "clamp(p / q, min, max)",
        "`ce` that reinforces what training has already moved, within bounds",
        "2507.12856",
    ),
    "psft": NamedObjective(
        "p / q where p / q < 1 + epsilon, else 0",
        "a trust region: each token is learned until it is 1 + epsilon times as likely as under the reference",
        "2508.17784",
    ),
    "asft_topk": NamedObjective(
        "p, and k KL(q, p) over the reference's top K",
        "`dft` held to the reference's distribution, not only to its probability of the label",
        "2509.23753",
    ),
    "sft_topk": NamedObjective(
        "1, and k KL(q, p) over the reference's top K", "`ce` held to the reference in the same way", None
    ),
    "distill": NamedObjective(
        "0, and KL(q, p) over the reference's top K",
        "learns the reference's distribution at the tokens of the data: offline (self-)distillation",
        "2601.19897",
    ),
    "gift": NamedObjective(
        "1 - t, and t KL(q, p) over the reference's top K, t = 1 / (1 + q (exp(beta) - 1))",
        "the label where the reference allows it, else the reference",
        None,
    ),
}

# By the name of the argument: --idft-beta is idft_beta.
OBJECTIVE_FLAGS = {
    "idft_beta": ObjectiveFlag(
        {"idft": "beta"}, 1.0, "temperature of gamma; larger values pull gamma towards 1, where IDFT is DFT"
    ),
    "idft_gamma_min": ObjectiveFlag(
        {"idft": "gamma_min"}, 0.1, "lower clamp of gamma, reached by tokens likelier than the distribution's average"
    ),
    "idft_gamma_max": ObjectiveFlag(
        {"idft": "gamma_max"}, 2.0, "upper clamp of gamma, reached by tokens far from the model's distribution"
    ),
    "idft_weights": ObjectiveFlag(
        {"idft": "weights"},
        "online",
        "whose p and phi make the weight. online: the model that is trained. reference: the reference model, from data"
        " with its log-probabilities and entropies; nobody has published a measurement",
        ("online", "reference"),
    ),
    "power_q": ObjectiveFlag(
        {"power": "q"},
        0.5,
        "exponent q of the weight p^q, 0 to 100. 0 is ce, 1 is dft; the larger q, the less a token counts that the"
        " model finds improbable",
    ),
    "anchor_coefficient": ObjectiveFlag(
        {"asft": "coefficient", "sft_k3": "coefficient"},
        0.03,
        "coefficient c of the distance to the reference. 0 is the objective without its anchor",
    ),
    "anchor_cap": ObjectiveFlag(
        {"asft": "cap", "sft_k3": "cap"},
        10.0,
        "largest r = q / p that counts, from 1: r has no bound where the model has lost a token of the reference",
    ),
    "anchor_kl_coefficient": ObjectiveFlag(
        {"asft_topk": "coefficient", "sft_topk": "coefficient"},
        0.1,
        "coefficient k of the KL divergence to the reference. 0 is the objective without its anchor",
    ),
    "gift_beta": ObjectiveFlag(
        {"gift": "beta"}, 20.0, "how far the target leans from the reference (near 0) to the label (20)"
    ),
    "minor_sft_beta": ObjectiveFlag({"minor_sft": "beta"}, 0.1, "how soon the weight of a learned token falls"),
    "iw_min": ObjectiveFlag({"iw": "ratio_min"}, 0.2, "smallest weight, of tokens that have become far less likely"),
    "iw_max": ObjectiveFlag({"iw": "ratio_max"}, 1.8, "largest weight, of tokens that have become far likelier"),
    "psft_epsilon": ObjectiveFlag(
        {"psft": "epsilon"}, 0.2, "how far a token's probability may rise above the reference's, as a share of it"
    ),
}
