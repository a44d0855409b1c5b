"""Metrics: right under reruns, accumulation and data parallelism, and under the keys that dashboards hold."""

import math
from itertools import pairwise

import pytest
import torch

from megatron_idft import Reference, asft, idft, sft_topk, vocab_parallel_loss
from megatron_idft.integration.loss.alarms import PhiAlarm, ReferenceAlarm, stopping_warning
from megatron_idft.integration.loss.metrics import (
    GAMMA_EDGES,
    PHI_EDGES,
    WEIGHT_EDGES,
    LossMetrics,
    format_report,
)
from tests.ranks import run_ranks

VOCAB = 2000
CPU = torch.device("cpu")
KEYS = [
    "sft loss",
    "ddt/phi mean",
    "ddt/phi std",
    "ddt/phi below -1",
    "ddt/phi below -3",
    "ddt/phi below -5",
    "ddt/entropy",
    "idft/gamma mean",
    "idft/gamma at min",
    "idft/gamma at max",
    "idft/lambda",
    "sft weight mean",
    "sft weight end of turn",
    "sft log p end of turn",
    "trained tokens",
]
REFERENCE_KEYS = [
    "reference/log ratio mean",
    "reference/log ratio below -3",
    "reference/log ratio below -1",
    "reference/log ratio above 1",
    "reference/log ratio above 3",
    "reference/k3",
]


def micro_batch(seed: int, tokens: int = 40):
    generator = torch.Generator().manual_seed(seed)
    # Sharp rows reach phi's far tail and gamma's upper clamp; flat rows around a likely label reach the lower one.
    logits = torch.randn(tokens, VOCAB, generator=generator)
    logits[::2] *= 6
    labels = torch.randint(0, 12, (tokens,), generator=generator)
    logits[1::4, :] += 8 * torch.nn.functional.one_hot(labels[1::4], VOCAB)
    labels[torch.rand(tokens, generator=generator) < 0.3] = -100
    return logits, labels


def add(metrics: LossMetrics, seed: int, masked: bool = True, sources: torch.Tensor | None = None) -> None:
    logits, labels = micro_batch(seed)
    objective = idft()
    out = vocab_parallel_loss(logits, labels, objective)
    metrics.add(objective, labels, out, mask_of(labels) if masked else None, sources)


def mask_of(labels: torch.Tensor) -> torch.Tensor:
    """Weights of 1 and 2 for the trained tokens, and NaN, which must not be read, for the others."""
    return torch.where(labels >= 0, 1.0 + torch.arange(len(labels)) % 2, torch.nan)


def new_metrics() -> LossMetrics:
    return LossMetrics(CPU, end_of_turn_ids=(3, 4), gamma_limits=(0.1, 2.0), vocab_size=VOCAB)


def expected(seeds) -> dict[str, float]:
    """The metrics of the micro-batches `seeds`, written out in float64."""
    phi, entropy, gamma, weight, loss, end, end_log_prob = [], [], [], [], [], [], []
    for seed in seeds:
        logits, labels = micro_batch(seed)
        trained = labels >= 0
        log_probs = logits.double().log_softmax(-1)[trained]
        target = labels[trained]
        log_prob = log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        h = -(log_probs.exp() * log_probs).sum(-1)
        g = torch.exp(-(log_prob + h)).clamp(0.1, 2.0)
        w = torch.exp(g * log_prob)
        for values, new in ((phi, log_prob + h), (entropy, h), (gamma, g), (weight, w), (loss, -w * log_prob)):
            values.append(new)
        end.append(w[(target == 3) | (target == 4)])
        end_log_prob.append(log_prob[(target == 3) | (target == 4)])
    phi, entropy, gamma, weight, loss, end, end_log_prob = map(
        torch.cat, (phi, entropy, gamma, weight, loss, end, end_log_prob)
    )
    values = {
        "sft loss": loss.mean(),
        "ddt/phi mean": phi.mean(),
        "ddt/phi std": phi.std(unbiased=False),
        "ddt/entropy": entropy.mean(),
        "idft/gamma mean": gamma.mean(),
        "idft/gamma at min": (gamma <= 0.1).double().mean(),
        "idft/gamma at max": (gamma >= 2.0).double().mean(),
        "idft/lambda": torch.tensor(0.5),
        "sft weight mean": weight.mean(),
        "sft weight end of turn": end.mean(),
        "sft log p end of turn": end_log_prob.mean(),
        "trained tokens": torch.tensor(float(len(phi))),
    }
    for limit in (1, 3, 5):
        values[f"ddt/phi below -{limit}"] = (phi < -limit).double().mean()
    return {key: values[key].item() for key in KEYS}


def test_keys_are_frozen_and_values_right_over_accumulated_micro_batches_and_steps():
    metrics = new_metrics()
    for step in ((1, 2), (3, 4)):
        metrics.begin_step()
        for seed in step:
            add(metrics, seed)
        metrics.commit_step()
    report = metrics.report(None, gamma_lambda=0.5)
    want = expected([1, 2, 3, 4])
    assert list(report.scalars) == KEYS
    assert all(0 < want[f"idft/gamma at {end}"] < 1 for end in ("min", "max")), "the case must reach both clamps"
    for key in KEYS:
        assert math.isclose(report.scalars[key], want[key], rel_tol=1e-5, abs_tol=1e-6), key
    assert report.micro_batches == 4
    assert metrics.report(None, 1.0).scalars == {"trained tokens": 0.0}, "the next interval starts empty"


def test_sources_have_the_same_metrics_over_their_own_tokens():
    metrics = LossMetrics(
        CPU, end_of_turn_ids=(3, 4), gamma_limits=(0.1, 2.0), vocab_size=VOCAB, sources=("one", "none", "two")
    )
    # Whole micro-batches of a source each, as one odd token of another, and one of no source, in between.
    for seed, number in ((1, 0), (2, 2), (3, 0)):
        sources = torch.full((40,), number)
        if seed == 3:
            trained = (micro_batch(3)[1] >= 0).nonzero().flatten()
            sources[trained[0]], sources[trained[1]] = 2, -1
        add(metrics, seed, sources=sources)
    metrics.commit_step()
    report = metrics.report(None, 0.5)
    assert list(report.by_source) == ["one", "two"], "a source without a token in the interval is left out"
    assert all(list(values) == ["lm loss", *KEYS] for values in report.by_source.values())
    total = report.scalars["trained tokens"]
    shares = [values["trained tokens"] for values in report.by_source.values()]
    assert sum(shares) == total - 1 and shares[1] == expected([2])["trained tokens"] + 1
    # The first alone, without the two odd tokens.
    alone = new_metrics()
    add(alone, 1)
    logits, labels = micro_batch(3)
    labels[trained[:2]] = -100
    alone.add(idft(), labels, vocab_parallel_loss(logits, labels, "idft"), mask_of(micro_batch(3)[1]))
    alone.commit_step()
    want = alone.report(None, 0.5)
    assert report.by_source["one"] == pytest.approx({"lm loss": want.lm_loss} | want.scalars, rel=1e-12)


def test_lm_loss_weighs_tokens_by_their_mask_and_divides_by_their_number():
    metrics = new_metrics()
    for seed in (1, 2):
        add(metrics, seed)
    metrics.commit_step()
    losses, tokens = 0.0, 0
    for seed in (1, 2):
        logits, labels = micro_batch(seed)
        losses += float(
            torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
            @ mask_of(labels).nan_to_num().double()
        )
        tokens += int((labels >= 0).sum())
    assert metrics.report(None, 1.0).lm_loss == pytest.approx(losses / tokens, rel=1e-6)


def test_other_objectives_report_no_gamma():
    metrics = LossMetrics(CPU, end_of_turn_ids=(3, 4), vocab_size=VOCAB)
    logits, labels = micro_batch(1)
    metrics.add(idft(), labels, vocab_parallel_loss(logits, labels, "dft"), mask_of(labels))
    metrics.commit_step()
    report = metrics.report(None, 1.0)
    assert [key for key in KEYS if not key.startswith("idft/")] == list(report.scalars)
    assert "idft/gamma" not in report.histograms


def test_a_repeated_forward_backward_is_counted_once():
    metrics = new_metrics()
    for _ in range(3):  # the rerun machine rejects two
        metrics.begin_step()
        add(metrics, 1)
    metrics.commit_step()
    assert metrics.report(None, 1.0).scalars["trained tokens"] == expected([1])["trained tokens"]


def test_without_a_mask_nothing_but_the_count_is_kept():
    metrics = new_metrics()
    add(metrics, 1, masked=False)
    metrics.commit_step()
    report = metrics.report(None, 1.0)
    assert (report.micro_batches, report.unmasked_micro_batches) == (1, 1)
    assert report.scalars == {"trained tokens": 0.0}


def test_histograms_count_every_trained_token_and_keep_the_tails():
    metrics = new_metrics()
    add(metrics, 1)
    metrics.commit_step()
    histograms = metrics.report(None, 1.0).histograms
    logits, labels = micro_batch(1)
    out = vocab_parallel_loss(logits, labels)
    phi = (out.log_prob + out.entropy)[labels >= 0]
    counts = histograms["ddt/phi"]
    assert sum(counts) == len(phi) and counts[0] == (phi < PHI_EDGES[0]).sum() > 0
    for index, (low, high) in enumerate(pairwise(PHI_EDGES)):
        assert counts[index + 1] == ((phi >= low) & (phi < high)).sum()
    gamma = torch.exp(-phi).clamp(0.1, 2.0)
    assert histograms["idft/gamma"][-1] == (gamma == 2.0).sum() > 0, "the upper clamp has a bin of its own"
    assert histograms["idft/gamma"][1] >= (gamma == 0.1).sum() > 0 and histograms["idft/gamma"][0] == 0
    assert [len(histograms[key]) for key in ("ddt/phi", "idft/gamma", "sft weight")] == [
        len(edges) + 1 for edges in (PHI_EDGES, GAMMA_EDGES, WEIGHT_EDGES)
    ]


def _rank_report() -> tuple[dict[str, float], int]:
    collectives = []
    all_reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *args, **kwargs: (collectives.append(1), all_reduce(*args, **kwargs))[1]
    metrics = new_metrics()
    add(metrics, seed=torch.distributed.get_rank() + 1)
    metrics.commit_step()
    return metrics.report(torch.distributed.group.WORLD, 0.5).scalars, len(collectives)


def test_data_parallel_ranks_agree_with_one_process_in_one_all_reduce():
    results = run_ranks(_rank_report, 2)
    want = expected([1, 2])
    for scalars, collectives in results:
        assert collectives == 1
        for key in KEYS:
            assert math.isclose(scalars[key], want[key], rel_tol=1e-5, abs_tol=1e-6), key


def test_a_negative_mean_reaches_the_console():
    line = format_report("iteration 10/100", {"ddt/phi mean": -0.25, "trained tokens": 12.0})
    assert "ddt/phi mean: -2.500000E-01" in line and "trained tokens: 12 |" in line


@pytest.mark.parametrize(
    ("mean", "std", "alarm"),
    # The published starts of healthy runs, and of those that collapsed (sources in alarms.py).
    [(-0.243, 1.69, False), (0.107, 0.31, False), (-2.69, 9.17, True), (-4.84, 12.4, True), (-0.5, 6.0, True)],
)
def test_the_alarm_rings_for_collapsed_runs_only(mean, std, alarm):
    warning = PhiAlarm().warning({"ddt/phi mean": mean, "ddt/phi std": std})
    assert bool(warning) == alarm
    assert warning is None or "--sft-loss-weight-floor" in warning


def test_a_lasting_alarm_is_told_when_it_begins_now_and_then_and_when_it_ends():
    away, healthy = {"ddt/phi mean": -3.0, "ddt/phi std": 1.0}, {"ddt/phi mean": -0.1, "ddt/phi std": 1.0}

    def told(intervals):
        alarm = PhiAlarm()
        lines = [alarm.line(scalars) for scalars in intervals]
        return {number: line for number, line in enumerate(lines) if line is not None}

    lasting = told([healthy, *[away] * 250, {}, healthy, healthy, away])
    assert list(lasting) == [1, 101, 201, 252]
    assert "--sft-loss-weight-floor" in lasting[1] and "in 101 log intervals by now: mean -3.00" in lasting[101]
    assert lasting[252] == (
        "> phi is back within its alarms: mean -0.10, spread 1.00; it had run away in 250 log intervals"
    )
    assert len(told([away, healthy] * 300)) < 16, "one that comes and goes"
    assert told([healthy, {}] * 3) == {}


def test_small_weights_at_the_end_of_turn_are_pointed_out_with_the_flag():
    def warning(weight: float, probability: float) -> str | None:
        scalars = {"sft weight end of turn": weight, "sft log p end of turn": math.log(probability)}
        return stopping_warning(scalars)

    assert warning(0.06, 0.1) is None and stopping_warning({}) is None
    assert "--sft-loss-exempt-tokens end-of-turn" in (warning(0.04, 0.1) or "")
    assert warning(0.01, 0.99) is None, "chord and entropy give no weight to what the model already does"


def test_a_reference_adds_its_keys_and_negative_weights_theirs():
    metrics = LossMetrics(CPU, end_of_turn_ids=(3, 4), vocab_size=VOCAB, reference=True, negative_weights=True)
    logits, labels = micro_batch(1)
    trained = labels >= 0
    exact = logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    log_q = (exact - torch.linspace(-6, 6, len(labels)).double()).clamp(max=-1e-3)
    reference = Reference(torch.where(trained, log_q, torch.nan).float())
    objective = asft(coefficient=0.5)
    out = vocab_parallel_loss(logits, labels, objective, reference=reference)
    metrics.add(objective, labels, out, mask_of(labels), reference=reference)
    metrics.commit_step()
    report = metrics.report(None, 1.0)
    keys = [key for key in KEYS if not key.startswith("idft/")]
    at = keys.index("sft weight mean")
    assert list(report.scalars) == [*keys[:at], *REFERENCE_KEYS, keys[at], "sft weight negative", *keys[at + 1 :]]
    ratio = (exact - log_q)[trained]
    weight = exact[trained].exp() + 0.5 * ((-ratio).exp().clamp(max=10) - 1)
    want = {
        "reference/log ratio mean": ratio.mean(),
        **{f"reference/log ratio below -{limit}": (ratio < -limit).double().mean() for limit in (1, 3)},
        **{f"reference/log ratio above {limit}": (ratio > limit).double().mean() for limit in (1, 3)},
        "reference/k3": ((-ratio).exp() - 1 + ratio).mean(),
        "sft weight mean": weight.mean(),
        "sft weight negative": (weight < 0).double().mean(),
    }
    for key, value in want.items():
        assert report.scalars[key] == pytest.approx(value.item(), rel=1e-5), key
    assert all(0 < report.scalars[key] < 1 for key in want if "below" in key or "above" in key or "negative" in key)
    histogram = report.histograms["sft weight"]
    assert histogram[0] == (weight < 0).sum() > 0 and sum(histogram) == trained.sum()


def test_a_kl_term_counts_in_the_loss_and_has_a_key():
    metrics = LossMetrics(CPU, vocab_size=VOCAB, reference=True, reference_kl=True)
    logits, labels = micro_batch(1)
    top_log_prob, top_ids = (logits + torch.randn(logits.shape)).log_softmax(-1).topk(4)
    reference = Reference(torch.full(labels.shape, -2.0), None, top_ids, top_log_prob)
    objective = sft_topk(coefficient=0.7)
    out = vocab_parallel_loss(logits, labels, objective, reference=reference)
    metrics.add(objective, labels, out, mask_of(labels), reference=reference)
    metrics.commit_step()
    scalars = metrics.report(None, 1.0).scalars
    kl = out.reference_kl[labels >= 0].double().mean()
    assert 0.1 < kl == pytest.approx(scalars["reference/kl"], rel=1e-6)
    assert scalars["sft loss"] == pytest.approx(out.loss[labels >= 0].double().mean().item(), rel=1e-6)


def test_one_lost_token_does_not_outweigh_its_interval_in_k3():
    metrics = LossMetrics(CPU, vocab_size=VOCAB, reference=True)
    logits, labels = torch.zeros(2, VOCAB), torch.tensor([0, 1])
    logits[0, 5] = 100.0
    reference = Reference(torch.tensor([-0.01, -math.log(VOCAB)]))
    metrics.add(idft(), labels, vocab_parallel_loss(logits, labels), torch.ones(2), reference=reference)
    metrics.commit_step()
    assert metrics.report(None, 1.0).scalars["reference/k3"] == pytest.approx((math.exp(10) - 11) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("mean", "k3", "alarm"), [(0.0, 0.0, False), (1.0, 1.2, False), (-0.6, 0.3, True), (0.1, 2.5, True)]
)
def test_the_distance_to_the_reference_has_its_own_alarm(mean, k3, alarm):
    scalars = {"reference/log ratio mean": mean, "reference/k3": k3}
    line = ReferenceAlarm().line(scalars)
    assert bool(line) == alarm and (line is None or "--anchor-coefficient" in line)
    assert ReferenceAlarm().line({"ddt/phi mean": 0.0}) is None
