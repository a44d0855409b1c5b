"""The effect of the objective on the tokens of a step, summed on the device and reported at the log interval.

Two buffers make the numbers right whatever the trainer does. `begin_step` zeroes the step's sums at the start of
every forward-backward, because Megatron's rerun machine may repeat one; `commit_step` adds them to the interval once
the step stands; `report` reduces the interval with one packed all-reduce over the data- and context-parallel ranks.
Nothing here synchronises with the host except `report`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import batched

import torch
from torch import Tensor

from megatron_idft.loss import LossOutput
from megatron_idft.objectives import Objective
from megatron_idft.statistics import TokenStatistics

# Published by the authors of IDFT at the start of healthy runs: phi's mean between -0.25 and +0.11, its spread between
# 0.3 and 1.7. Their runs that collapsed reached -2.7 and 9.2, and -4.8 and 12.4 (arXiv 2602.12222, training logs in
# github.com/zhangmiaosen2000/Towards-On-Policy-SFT); a run with a broken chat template showed -8 and 6.5.
PHI_MEAN_ALARM = -2.0
PHI_STD_ALARM = 5.0
ALARM_INTERVALS = 100  # log intervals from one line about it to the next

# The weight multiplies the gradient: at 0.05 an end of turn teaches a twentieth of what it does under cross-entropy, so
# that 20 epochs would be needed for one. It is then a token that the model expects less than once in twenty times
# (DFT) or in five (IDFT at gamma 2), where the text ends. A convention: nobody has published where models fail to stop.
END_OF_TURN_ALARM = 0.05

PHI_THRESHOLDS = (-1.0, -3.0, -5.0)

# Inner edges; the first and the last bin are open, so the heavy negative tail of phi stays visible.
PHI_EDGES = tuple(-10.0 + 0.5 * index for index in range(27))  # -10 … 3
GAMMA_EDGES = tuple(0.1 * index for index in range(1, 21))  # 0.1 … 2
WEIGHT_EDGES = tuple(0.05 * index for index in range(1, 20))  # 0.05 … 0.95

_COUNTERS = ("micro_batches", "unmasked_micro_batches", "invalid_labels")
# Per token; summed over the trained tokens, and over those of each source.
_TOKEN_SUMS = (
    "tokens",
    "cross_entropy",
    "loss",
    "phi",
    "phi_squared",
    "phi_below_1",
    "phi_below_3",
    "phi_below_5",
    "entropy",
    "gamma",
    "gamma_at_min",
    "gamma_at_max",
    "weight",
    "end_of_turn_tokens",
    "end_of_turn_weight",
)
_HISTOGRAMS = {"ddt/phi": PHI_EDGES, "idft/gamma": GAMMA_EDGES, "sft weight": WEIGHT_EDGES}


@dataclass(frozen=True)
class MetricsReport:
    """One log interval or one evaluation, the same on every rank of the reduction.

    Attributes:
        lm_loss: cross-entropy per trained token, each weighted by its loss mask as in Megatron's line of that name;
            None without a trained token.
        scalars: metric key -> value, the keys as frozen in docs/metrics.md.
        by_source: name of a source -> the same keys, `lm loss` first, over that source's tokens; sources without a
            trained token are left out.
        histograms: metric key -> counts per bin; bin i lies between inner edges i-1 and i, the outer two are open.
        micro_batches: micro-batches whose loss went through the hook, over all ranks.
        unmasked_micro_batches: those that came without a loss mask and are left out of the other numbers.
        invalid_labels: labels at or above the true vocabulary size.
    """

    lm_loss: float | None
    scalars: dict[str, float]
    by_source: dict[str, dict[str, float]]
    histograms: dict[str, list[int]]
    micro_batches: int
    unmasked_micro_batches: int
    invalid_labels: int


@dataclass
class LossMetrics:
    """Sums over trained tokens, kept in float64 on the device.

    Args:
        device: where the loss is computed.
        end_of_turn_ids: token ids that end a turn, whose mean weight is reported on its own: DFT-like objectives are
            known to starve them until the model never stops.
        gamma_limits: (gamma_min, gamma_max) of IDFT, for the shares at either clamp; None for other objectives.
        vocab_size: the true vocabulary size; `install` fills it in.
        sources: names of the sources that `add` is given by number; empty keeps none apart.
    """

    device: torch.device
    end_of_turn_ids: tuple[int, ...] = ()
    gamma_limits: tuple[float, float] | None = None
    vocab_size: int = 0
    sources: tuple[str, ...] = ()
    _step: Tensor = field(init=False, repr=False)
    _interval: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        bins = [len(edges) + 1 for edges in _HISTOGRAMS.values()]
        self._parts = [len(_COUNTERS), (1 + len(self.sources)) * len(_TOKEN_SUMS), *bins]
        self._step = torch.zeros(sum(self._parts), dtype=torch.float64, device=self.device)
        self._interval = torch.zeros_like(self._step)
        self._edges = {
            key: torch.tensor(edges, dtype=torch.float32, device=self.device) for key, edges in _HISTOGRAMS.items()
        }
        self._end_of_turn = torch.tensor(self.end_of_turn_ids, dtype=torch.int64, device=self.device)
        self._source_numbers = torch.arange(len(self.sources), device=self.device)

    def begin_step(self) -> None:
        """Forget an unfinished or rejected forward-backward. In place, so a captured CUDA graph keeps its buffers."""
        self._step.zero_()

    def commit_step(self) -> None:
        """Count the finished step towards the interval."""
        self._interval += self._step

    @torch.no_grad()
    def add(
        self,
        objective: Objective,
        labels: Tensor,
        out: LossOutput,
        loss_mask: Tensor | None,
        sources: Tensor | None = None,
    ) -> None:
        """Add one micro-batch.

        Args:
            objective: the objective that was trained, asked for its gamma.
            labels: [...] int64, negative where untrained; the shape of `out`'s tensors.
            out: what `vocab_parallel_loss` returned for them.
            loss_mask: [...] what each token's cross-entropy weighs in `lm loss`. None: padding and prompts cannot be
                told from trained text, so only the count of micro-batches is kept.
            sources: [...] int64, the number of each token's source; None or a negative number: of none.
        """
        counters, sums, *bins = self._step.split(self._parts)
        counters[0] += 1
        if loss_mask is None:
            counters[1] += 1
            return
        counters[2] += out.invalid_labels
        trained = (labels >= 0) & (labels < self.vocab_size)
        statistics = TokenStatistics(out.log_prob, out.entropy, labels, self.vocab_size)
        phi = statistics.centered_log_likelihood
        ends_turn = torch.isin(labels, self._end_of_turn)
        columns = {
            "tokens": trained,
            "cross_entropy": -out.log_prob * loss_mask,
            "loss": -out.weight * out.log_prob,
            "phi": phi,
            "phi_squared": phi.double().square(),
            "phi_below_1": phi < PHI_THRESHOLDS[0],
            "phi_below_3": phi < PHI_THRESHOLDS[1],
            "phi_below_5": phi < PHI_THRESHOLDS[2],
            "entropy": out.entropy,
            "weight": out.weight,
            "end_of_turn_tokens": ends_turn,
            "end_of_turn_weight": torch.where(ends_turn, out.weight, 0),
        }
        histograms = {"ddt/phi": phi, "sft weight": out.weight}
        gamma, raw_gamma = objective.gamma(statistics), objective.raw_gamma(statistics)
        if gamma is not None:
            columns["gamma"] = histograms["idft/gamma"] = gamma
        if raw_gamma is not None and self.gamma_limits is not None:
            # The clamp acts on the raw gamma; the gamma that is used may be mixed towards 1 by lambda.
            gamma_min, gamma_max = self.gamma_limits
            columns |= {"gamma_at_min": raw_gamma <= gamma_min, "gamma_at_max": raw_gamma >= gamma_max}
        sums += self._token_sums(columns, trained, sources).reshape(-1)
        for part, key in zip(bins, _HISTOGRAMS, strict=True):
            if key in histograms:
                part += self._histogram(key, histograms[key], trained)

    def _token_sums(self, columns: dict[str, Tensor], trained: Tensor, sources: Tensor | None) -> Tensor:
        """[1 + sources, token sums] float64: over all trained tokens, then over each source's."""
        zero = torch.zeros_like(trained)
        values = torch.stack([columns.get(name, zero).reshape(-1).double() for name in _TOKEN_SUMS], dim=1)
        values = torch.where(trained.reshape(-1, 1), values, 0)
        sums = values.new_zeros(1 + len(self.sources), len(_TOKEN_SUMS))
        sums[0] = values.sum(dim=0)
        if sources is not None and self.sources:
            # A product rather than index_add_, whose order of float additions is not fixed on a GPU.
            sums[1:] = (sources.reshape(-1) == self._source_numbers[:, None]).double() @ values
        return sums

    def _histogram(self, key: str, values: Tensor, trained: Tensor) -> Tensor:
        edges = self._edges[key]
        bins = torch.bucketize(values.reshape(-1), edges, right=True)
        counts = torch.zeros(len(edges) + 1, dtype=torch.float64, device=self.device)
        return counts.index_add_(0, bins, trained.reshape(-1).to(torch.float64))

    def report(self, group: torch.distributed.ProcessGroup | None, gamma_lambda: float) -> MetricsReport:
        """Reduce the interval, start the next, and return its numbers.

        Args:
            group: the data- and context-parallel group; None for one process.
            gamma_lambda: lambda_t of the interval's last step.

        Collectives: one all-reduce (sum) over `group`. Synchronises with the host.
        """
        totals = self._interval.clone()
        self._interval.zero_()
        if group is not None and torch.distributed.get_world_size(group) > 1:
            torch.distributed.all_reduce(totals, group=group)
        counters, sums, *bins = (part.tolist() for part in totals.split(self._parts))
        groups = [dict(zip(_TOKEN_SUMS, row, strict=True)) for row in batched(sums, len(_TOKEN_SUMS))]
        with_gamma = self.gamma_limits is not None
        return MetricsReport(
            lm_loss=_lm_loss(groups[0]) if groups[0]["tokens"] else None,
            scalars=_scalars(groups[0], with_gamma, gamma_lambda),
            by_source={
                name: {"lm loss": _lm_loss(group)} | _scalars(group, with_gamma, gamma_lambda)
                for name, group in zip(self.sources, groups[1:], strict=True)
                if group["tokens"]
            },
            histograms={
                key: [round(count) for count in counts]
                for key, counts in zip(_HISTOGRAMS, bins, strict=True)
                if with_gamma or key != "idft/gamma"
            },
            **{name: round(count) for name, count in zip(_COUNTERS, counters, strict=True)},
        )


def _lm_loss(sums: dict[str, float]) -> float:
    return sums["cross_entropy"] / sums["tokens"]


def _scalars(sums: dict[str, float], with_gamma: bool, gamma_lambda: float) -> dict[str, float]:
    tokens = sums["tokens"]
    if not tokens:
        return {"trained tokens": 0.0}

    def mean(name: str) -> float:
        return sums[name] / tokens

    scalars = {
        "sft loss": mean("loss"),
        "ddt/phi mean": mean("phi"),
        "ddt/phi std": math.sqrt(max(0.0, mean("phi_squared") - mean("phi") ** 2)),
        "ddt/phi below -1": mean("phi_below_1"),
        "ddt/phi below -3": mean("phi_below_3"),
        "ddt/phi below -5": mean("phi_below_5"),
        "ddt/entropy": mean("entropy"),
    }
    if with_gamma:
        scalars |= {
            "idft/gamma mean": mean("gamma"),
            "idft/gamma at min": mean("gamma_at_min"),
            "idft/gamma at max": mean("gamma_at_max"),
            "idft/lambda": gamma_lambda,
        }
    scalars["sft weight mean"] = mean("weight")
    if sums["end_of_turn_tokens"]:
        scalars["sft weight end of turn"] = sums["end_of_turn_weight"] / sums["end_of_turn_tokens"]
    scalars["trained tokens"] = tokens
    return scalars


def health_warning(scalars: dict[str, float]) -> str | None:
    """The method's known failure, in words, or None. Thresholds and their source stand at the top of this module."""
    mean, std = scalars.get("ddt/phi mean"), scalars.get("ddt/phi std")
    if mean is None or std is None or (mean > PHI_MEAN_ALARM and std < PHI_STD_ALARM):
        return None
    return (
        f"phi has run away: mean {mean:.2f} (alarm below {PHI_MEAN_ALARM}), spread {std:.2f} (alarm above"
        f" {PHI_STD_ALARM}). A falling loss does not contradict this: the model may be un-learning the tokens that the"
        " objective gives no weight. Check the chat template and the loss mask first; then lower the learning rate,"
        " raise --sft-loss-weight-floor, or use --sft-loss ce"
    )


class PhiAlarm:
    """Repeats `health_warning`, which may hold for a whole training, now and then.

    One line when it begins and one when it ends; while it lasts, or comes and goes, one in ALARM_INTERVALS. held: the
    intervals in which it held since it began, or since its last end was reported.
    """

    def __init__(self) -> None:
        self.held = 0
        self._reported = False  # that it holds
        self._since_report = ALARM_INTERVALS

    def line(self, scalars: dict[str, float]) -> str | None:
        """For a person, of one log interval; None where there is nothing new to say."""
        if "ddt/phi mean" not in scalars:
            return None
        warning = health_warning(scalars)
        self._since_report += 1
        if warning is None:
            return self._end(scalars) if self._reported else None
        self.held += 1
        if self._since_report < ALARM_INTERVALS:
            return None
        self._reported, self._since_report = True, 0
        if self.held == 1:
            return f"WARNING: {warning}"
        return f"WARNING: phi has run away in {self.held} log intervals by now: {_mean_and_spread(scalars)}"

    def _end(self, scalars: dict[str, float]) -> str:
        held, self.held, self._reported, self._since_report = self.held, 0, False, 0
        return f"> phi is back within its alarms: {_mean_and_spread(scalars)}; it had run away in {held} log intervals"


def _mean_and_spread(scalars: dict[str, float]) -> str:
    return f"mean {scalars['ddt/phi mean']:.2f}, spread {scalars['ddt/phi std']:.2f}"


def stopping_warning(scalars: dict[str, float]) -> str | None:
    """Whether the model may not learn to end its turns, in words, or None."""
    weight = scalars.get("sft weight end of turn")
    if weight is None or weight >= END_OF_TURN_ALARM:
        return None
    return (
        f"the ends of turns have a mean weight of {weight:.2g} (alarm below {END_OF_TURN_ALARM}): they are trained with"
        f" {weight:.2g} of cross-entropy's gradient, so the model may not learn to stop. Where it does not stop by"
        " itself already, add --sft-loss-exempt-tokens end-of-turn, which gives them weight 1"
    )


def format_report(head: str, scalars: dict[str, float]) -> str:
    """One console line. Megatron's own line drops values below zero, which phi's mean usually is."""
    fields = " | ".join(
        f"{key}: {int(value):d}" if key == "trained tokens" else f"{key}: {value:.6E}" for key, value in scalars.items()
    )
    return f" sft {head} | {fields} |"
