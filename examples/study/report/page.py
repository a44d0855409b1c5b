"""The page of a study, in Markdown, from its report.json alone."""

from collections.abc import Sequence
from typing import Any

NOTHING = "**A smoke run: sizes are tiny and the numbers mean nothing.**"
SIGN = {1: "more", -1: "less", 0: "equal"}


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    return "" if value is None else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def interval(found: list[float | None], sign: bool = False) -> str:
    """Value and 95 % interval."""
    value, low, high = found
    if low is None:
        return number(value, sign=sign)
    return f"{number(value, sign=sign)} [{number(low, sign=sign)}, {number(high, sign=sign)}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def claims_table(claims: Sequence[dict[str, Any]]) -> str:
    """Paper, prediction and result side by side; what was looked for later has no prediction."""
    rows = []
    for claim in claims:
        low, high = claim["expected"] or (None, None)
        rows.append(
            [
                f"{claim['id']} {claim['text']}",
                f"{claim['measure']}, {claim['difference']}, {claim['at']}",
                SIGN[claim["paper"]],
                f"{number(low, sign=True)} to {number(high, sign=True)}" if claim["expected"] else "seen later",
                claim["missing"] or interval(claim["found"], sign=True),
                str(claim["seeds"] or ""),
                claim["beside_paper"],
                claim["beside_prediction"] or "",
            ]
        )
    head = [
        "claim",
        "measured as",
        "paper",
        "we predicted",
        "found",
        "seeds",
        "beside the paper",
        "beside our prediction",
    ]
    return table(head, rows)


def arms_table(report: dict[str, Any]) -> str:
    """Each arm at the end of its training."""
    head = [
        "arm",
        "lr",
        "seeds",
        "target",
        "at temperature 1",
        "harder",
        "retention",
        "KL chat",
        "KL target",
        "ends",
        "tokens",
    ]
    head += ["phi before", "during", "after", "s"]
    base = report["base"]
    shared = ("target", "target at temperature 1", "harder", "retention")
    rows = [
        [
            "base",
            "",
            "",
            *(number(base[key]) for key in shared),
            "0",
            "0",
            number(base["ended"]),
            number(base["tokens"], 0),
        ]
    ]
    rows[0] += [""] * 4
    for arm in report["arms"]:
        last = arm["points"][-1]
        cells = [arm["arm"] + ("" if arm["chosen"] else " (not chosen)"), arm["rate"], str(len(arm["seeds"]))]
        cells += [interval(arm["target"]), *(number(last[key]) for key in shared[1:])]
        cells += [number(last["kl"]), number(last["kl_target"]), number(last["ended"]), number(last["tokens"], 0)]
        cells += [spread(arm["phi"][when]) for when in ("before", "during", "after")] + [number(sum(arm["seconds"]), 0)]
        rows.append(cells)
    return table(head, rows)


def spread(phi: list[float | None]) -> str:
    mean, std = phi
    return "" if mean is None else f"{number(mean, 2, sign=True)} ± {number(std, 2)}"


def equal_kl_table(report: dict[str, Any]) -> str:
    """Target and retention where each arm first is as far from the base model."""
    levels = report["equal_kl"]["levels"]
    head = ["arm", *(f"KL {number(level)}" for level in levels)]
    rows = [
        [arm, *(" / ".join(number(value) for value in values) if values else "not reached" for values in found)]
        for arm, found in report["equal_kl"]["arms"].items()
    ]
    return table(head, rows)


def where_table(texts: dict[str, Any], losses: Sequence[str] = ()) -> str:
    """Each kind of token of a text, and the weight and share of the gradient that it has under each loss."""
    if not texts:
        return "Not measured."
    losses = losses or list(next(iter(texts.values()))["losses"])
    rows = []
    for text, found in texts.items():
        for kind, numbers in found["kinds"].items():
            cells = [f"{text}: {kind}", number(numbers["share"], 2), number(numbers["cross_entropy"], 2)]
            cells += [number(numbers["phi"], 2, sign=True)]
            under = (found["losses"][loss][kind] for loss in losses)
            rows.append(cells + [f"{number(one['weight'], 2)} / {number(one['share'], 2)}" for one in under])
    return table(["tokens", "share", "cross-entropy", "phi", *losses], rows)


def page(report: dict[str, Any]) -> str:
    warning = f"{NOTHING}\n\n" if report["means_nothing"] else ""
    return f"""# Does it help? The study at size {report["size"]}

{warning}{claims_table(report["claims"] + report["seen_later"])}

Differences of shares of right answers (of nats per token for KL), with 95 % intervals by bootstrap over seeds and the
problems, which are the same for all arms. *agrees* beside the paper: the interval lies on its side of 0. *agrees*
beside our prediction: the value lies in the range, and the interval is at most twice as wide. *differs*: the interval
lies on the other side, or has nothing in common with the range. A single seed is not judged. At equal KL and at equal
accuracy `sft` is the fair rival: with the learning rate at which it ends as near to the base model as `idft` on the
same corpus.

![the target's accuracy against what was kept, and against the distance from the base model](study.svg)

## At the end of each training

{arms_table(report)}

*target*, *harder*, *retention*: greedy answers that are right and end by themselves. *phi*: mean ± spread of the
trained tokens under the base model, in the training's last quarter, and under the trained model. *s*: seconds of
training and evaluation per run.

## At the same distance from the base model

Target / retention where the KL of chat samples first reaches the value, straight between checkpoints.

{equal_kl_table(report)}

## Where each loss puts its weight

By kinds of trained tokens (`where.py`): their share of all, cross-entropy and phi under the model named; and of each
loss the mean weight w / the share of the sum of w (1 − p), half the L1 norm of the gradient on the logits. *before*:
the base model; *after*: the first seed's model, on the corpus that it was trained on.

{where_table(report["where"])}
"""
