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
from megatron_idft.statistics import Reference, TokenStatistics

PHI_THRESHOLDS = (-1.0, -3.0, -5.0)

# Inner edges; the first and the last bin are open, so the heavy negative tail of phi stays visible.
PHI_EDGES = tuple(-10.0 + 0.5 * index for index in range(27))  # -10 … 3
GAMMA_EDGES = tuple(0.1 * index for index in range(1, 21))  # 0.1 … 2
WEIGHT_EDGES = tuple(0.05 * index for index in range(41))  # 0 … 2; the first bin holds the negative ones

# of log(q / p) in k3: one token that the model has lost would otherwise be the mean of its interval.
K3_LARGEST_LOG = 10.0

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
    "negative_weights",
    "end_of_turn_tokens",
    "end_of_turn_weight",
    "end_of_turn_log_prob",
)
# And these with a reference.
_REFERENCE_SUMS = (
    "log_ratio",
    "log_ratio_below_3",
    "log_ratio_below_1",
    "log_ratio_above_1",
    "log_ratio_above_3",
    "k3",
    "reference_kl",
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
        reference: whether `add` is given what a reference model said.
        reference_kl: whether the objective has a KL term, which needs a reference.
        negative_weights: whether the objective's weights may be negative.
    """

    device: torch.device
    end_of_turn_ids: tuple[int, ...] = ()
    gamma_limits: tuple[float, float] | None = None
    vocab_size: int = 0
    sources: tuple[str, ...] = ()
    reference: bool = False
    reference_kl: bool = False
    negative_weights: bool = False
    _step: Tensor = field(init=False, repr=False)
    _interval: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        bins = [len(edges) + 1 for edges in _HISTOGRAMS.values()]
        self._names = _TOKEN_SUMS + (_REFERENCE_SUMS if self.reference else ())
        self._parts = [len(_COUNTERS), (1 + len(self.sources)) * len(self._names), *bins]
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
        reference: Reference | None = None,
    ) -> None:
        """Add one micro-batch.

        Args:
            objective: the objective that was trained, asked for its gamma.
            labels: [...] int64, negative where untrained; the shape of `out`'s tensors.
            out: what `vocab_parallel_loss` returned for them.
            loss_mask: [...] what each token's cross-entropy weighs in `lm loss`. None: padding and prompts cannot be
                told from trained text, so only the count of micro-batches is kept.
            sources: [...] int64, the number of each token's source; None or a negative number: of none.
            reference: [...] what the reference model said of the labels; read only where `self.reference` says so.
        """
        counters, sums, *bins = self._step.split(self._parts)
        counters[0] += 1
        if loss_mask is None:
            counters[1] += 1
            return
        counters[2] += out.invalid_labels
        trained = (labels >= 0) & (labels < self.vocab_size)
        statistics = TokenStatistics(
            out.log_prob,
            out.entropy,
            labels,
            self.vocab_size,
            reference_log_prob=None if reference is None else reference.log_prob,
            reference_entropy=None if reference is None else reference.entropy,
        )
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
            "negative_weights": out.weight < 0,
            "end_of_turn_tokens": ends_turn,
            "end_of_turn_weight": torch.where(ends_turn, out.weight, 0),
            "end_of_turn_log_prob": torch.where(ends_turn, out.log_prob, 0),
        }
        if self.reference and reference is not None:
            columns |= _against_reference(out.log_prob - reference.log_prob.float())
        if out.reference_kl is not None:
            columns["reference_kl"] = out.reference_kl
            columns["loss"] = columns["loss"] + objective.reference_kl_coefficient(statistics) * out.reference_kl
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
        values = torch.stack([columns.get(name, zero).reshape(-1).double() for name in self._names], dim=1)
        values = torch.where(trained.reshape(-1, 1), values, 0)
        sums = values.new_zeros(1 + len(self.sources), len(self._names))
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
        groups = [dict(zip(self._names, row, strict=True)) for row in batched(sums, len(self._names))]
        with_gamma = self.gamma_limits is not None
        return MetricsReport(
            lm_loss=_lm_loss(groups[0]) if groups[0]["tokens"] else None,
            scalars=self._scalars(groups[0], gamma_lambda),
            by_source={
                name: {"lm loss": _lm_loss(group)} | self._scalars(group, gamma_lambda)
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

    def _scalars(self, sums: dict[str, float], gamma_lambda: float) -> dict[str, float]:
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
        if self.gamma_limits is not None:
            scalars |= {
                "idft/gamma mean": mean("gamma"),
                "idft/gamma at min": mean("gamma_at_min"),
                "idft/gamma at max": mean("gamma_at_max"),
                "idft/lambda": gamma_lambda,
            }
        if self.reference:
            scalars |= {
                "reference/log ratio mean": mean("log_ratio"),
                "reference/log ratio below -3": mean("log_ratio_below_3"),
                "reference/log ratio below -1": mean("log_ratio_below_1"),
                "reference/log ratio above 1": mean("log_ratio_above_1"),
                "reference/log ratio above 3": mean("log_ratio_above_3"),
                "reference/k3": mean("k3"),
            }
        if self.reference_kl:
            scalars["reference/kl"] = mean("reference_kl")
        scalars["sft weight mean"] = mean("weight")
        if self.negative_weights:
            scalars["sft weight negative"] = mean("negative_weights")
        if ends := sums["end_of_turn_tokens"]:
            scalars["sft weight end of turn"] = sums["end_of_turn_weight"] / ends
            scalars["sft log p end of turn"] = sums["end_of_turn_log_prob"] / ends
        scalars["trained tokens"] = tokens
        return scalars


def _lm_loss(sums: dict[str, float]) -> float:
    return sums["cross_entropy"] / sums["tokens"]


def _against_reference(log_ratio: Tensor) -> dict[str, Tensor]:
    """Columns of log(p / q) [...]. k3 = q / p - 1 - log(q / p) >= 0, 0 only where both agree."""
    capped = (-log_ratio).double().clamp(max=K3_LARGEST_LOG)
    return {
        "log_ratio": log_ratio,
        "log_ratio_below_3": log_ratio < -3,
        "log_ratio_below_1": log_ratio < -1,
        "log_ratio_above_1": log_ratio > 1,
        "log_ratio_above_3": log_ratio > 3,
        "k3": capped.expm1() - capped,
    }


def format_report(head: str, scalars: dict[str, float]) -> str:
    """One console line. Megatron's own line drops values below zero, which phi's mean usually is."""
    fields = " | ".join(
        f"{key}: {int(value):d}" if key == "trained tokens" else f"{key}: {value:.6E}" for key, value in scalars.items()
    )
    return f" sft {head} | {fields} |"
