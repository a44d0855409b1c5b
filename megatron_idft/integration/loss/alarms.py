"""Warnings of a training that runs away, from the metrics of its log intervals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

# Published by the authors of IDFT at the start of healthy runs: phi's mean between -0.25 and +0.11, its spread between
# 0.3 and 1.7. Their runs that collapsed reached -2.7 and 9.2, and -4.8 and 12.4 (arXiv 2602.12222, training logs in
# github.com/zhangmiaosen2000/Towards-On-Policy-SFT); a run with a broken chat template showed -8 and 6.5.
PHI_MEAN_ALARM = -2.0
PHI_STD_ALARM = 5.0

# A convention: nobody has published where anchored runs fail. Training raises log p of its own tokens, so their mean
# falls below the reference's only where the model un-learns. A token that went from q = 0.0001 to 0.5, as a foreign one
# may, has k3 = 7.5, one at q = 0.1 has 0.8: a mean of 2 means that a large part of the tokens has changed as much.
LOG_RATIO_ALARM = -0.5
K3_ALARM = 2.0

ALARM_INTERVALS = 100  # log intervals from one line about it to the next

# The weight multiplies the gradient: at 0.05 an end of turn teaches a twentieth of what it does under cross-entropy, so
# that 20 epochs would be needed for one. It is then a token that the model expects less than once in twenty times
# (DFT) or in five (IDFT at gamma 2), where the text ends. A convention: nobody has published where models fail to stop.
END_OF_TURN_ALARM = 0.05
# Some objectives give no weight to tokens that the model is sure of: it stops already, and nothing has to be learned.
END_OF_TURN_KNOWN = 0.5


class RunawayAlarm(ABC):
    """A warning that may hold for a whole training, repeated now and then.

    One line when it begins and one when it ends; while it lasts, or comes and goes, one in ALARM_INTERVALS. held: the
    intervals in which it held since it began, or since its last end was reported.
    """

    subject: str  # what runs away
    key: str  # a metric that is there wherever the alarm can tell

    def __init__(self) -> None:
        self.held = 0
        self._reported = False  # that it holds
        self._since_report = ALARM_INTERVALS

    @abstractmethod
    def warning(self, scalars: dict[str, float]) -> str | None:
        """What has run away and what to do, or None."""

    @abstractmethod
    def values(self, scalars: dict[str, float]) -> str:
        """The numbers in question."""

    def line(self, scalars: dict[str, float]) -> str | None:
        """For a person, of one log interval; None where there is nothing new to say."""
        if self.key not in scalars:
            return None
        warning = self.warning(scalars)
        self._since_report += 1
        if warning is None:
            return self._end(scalars) if self._reported else None
        self.held += 1
        if self._since_report < ALARM_INTERVALS:
            return None
        self._reported, self._since_report = True, 0
        if self.held == 1:
            return f"WARNING: {warning}"
        return f"WARNING: {self.subject} has run away in {self.held} log intervals by now: {self.values(scalars)}"

    def _end(self, scalars: dict[str, float]) -> str:
        held, self.held, self._reported, self._since_report = self.held, 0, False, 0
        return (
            f"> {self.subject} is back within its alarms: {self.values(scalars)}; it had run away in {held} log"
            " intervals"
        )


class PhiAlarm(RunawayAlarm):
    """The known failure of objectives that gate tokens."""

    subject, key = "phi", "ddt/phi mean"

    def warning(self, scalars: dict[str, float]) -> str | None:
        mean, std = scalars["ddt/phi mean"], scalars["ddt/phi std"]
        if mean > PHI_MEAN_ALARM and std < PHI_STD_ALARM:
            return None
        return (
            f"phi has run away: mean {mean:.2f} (alarm below {PHI_MEAN_ALARM}), spread {std:.2f} (alarm above"
            f" {PHI_STD_ALARM}). A falling loss does not contradict this: the model may be un-learning the tokens that"
            " the objective gives no weight. Check the chat template and the loss mask first; then lower the learning"
            " rate, raise --sft-loss-weight-floor, or use --sft-loss ce"
        )

    def values(self, scalars: dict[str, float]) -> str:
        return f"mean {scalars['ddt/phi mean']:.2f}, spread {scalars['ddt/phi std']:.2f}"


class ReferenceAlarm(RunawayAlarm):
    """A model that leaves its reference."""

    subject, key = "the distance to the reference", "reference/k3"

    def warning(self, scalars: dict[str, float]) -> str | None:
        mean, k3 = scalars["reference/log ratio mean"], scalars["reference/k3"]
        if mean > LOG_RATIO_ALARM and k3 < K3_ALARM:
            return None
        return (
            f"the distance to the reference has run away: mean of log p - log q {mean:.2f} (alarm below"
            f" {LOG_RATIO_ALARM}), k3 {k3:.2f} (alarm above {K3_ALARM}). If it is so from the first step on, the"
            " reference is not the model that training began with, or its log-probabilities are of other data: look at"
            " `prepare`'s report. Else lower the learning rate, or raise --anchor-coefficient where the objective has"
            " one"
        )

    def values(self, scalars: dict[str, float]) -> str:
        return f"mean of log p - log q {scalars['reference/log ratio mean']:.2f}, k3 {scalars['reference/k3']:.2f}"


def stopping_warning(scalars: dict[str, float]) -> str | None:
    """Whether the model may not learn to end its turns, in words, or None."""
    weight = scalars.get("sft weight end of turn")
    if weight is None or weight >= END_OF_TURN_ALARM:
        return None
    probability = math.exp(scalars["sft log p end of turn"])
    if probability >= END_OF_TURN_KNOWN:
        return None
    return (
        f"the ends of turns have a mean weight of {weight:.2g} (alarm below {END_OF_TURN_ALARM}): they are trained with"
        f" {weight:.2g} of cross-entropy's gradient, and the model expects them with a probability of"
        f" {probability:.2g} only, so it may not learn to stop. Add --sft-loss-exempt-tokens end-of-turn, which gives"
        " them weight 1"
    )
