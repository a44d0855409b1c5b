import math
import re
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import megatron_idft
from megatron_idft.integration.loss import flags
from megatron_idft.objective_table import OBJECTIVES
from megatron_idft.objectives import (
    KernelFormula,
    LambdaSchedule,
    Objective,
    asft,
    ce,
    chord,
    cll,
    deft,
    dft,
    entropy,
    idft,
    objective_names,
    power,
    resolve_objective,
    sft_k3,
)
from megatron_idft.statistics import TokenStatistics

ROOT = Path(__file__).parents[1]
VOCAB = 50
# Of a reference: as sure, surer, far surer, less sure by far, just as hopeless.
REFERENCE_LOG_PROB = [-0.02, -1.2, -0.5, -7.0, -30.0]
REFERENCE_ENTROPY = [0.1, 1.4, 0.6, 3.0, 2.5]


def make_statistics(
    log_prob: list[float],
    entropies: list[float],
    labels: list[int] | None = None,
    squares: list[float] | None = None,
) -> TokenStatistics:
    return TokenStatistics(
        torch.tensor(log_prob),
        torch.tensor(entropies),
        torch.tensor(labels or [1] * len(log_prob)),
        VOCAB,
        sum_squared_prob=torch.tensor(squares or [0.3] * len(log_prob)),
        reference_log_prob=torch.tensor((REFERENCE_LOG_PROB * len(log_prob))[: len(log_prob)]),
        reference_entropy=torch.tensor((REFERENCE_ENTROPY * len(log_prob))[: len(log_prob)]),
    )


# A sure token, one of typical likelihood, an anomalous one, one far above its entropy, one of probability 1e-13.
LOG_PROB = [-0.01, -1.5, -9.0, -0.2, -30.0]
ENTROPY = [0.05, 1.5, 0.4, 3.5, 2.0]
SQUARES = [0.98, 0.3, 0.85, 0.68, 0.02]
STATISTICS = make_statistics(LOG_PROB, ENTROPY, squares=SQUARES)


def naive_idft(log_prob: float, h: float, beta: float, low: float, high: float, lam: float) -> float:
    gamma = min(max(math.exp(-(log_prob + h) / beta), low), high)
    return math.exp((1 + lam * (gamma - 1)) * log_prob)


def naive_anchor(lp: float, lq: float) -> float:
    return 0.03 * (min(math.exp(lq - lp), 10.0) - 1)


# log p, H, sum of squares, log q
NAIVE = {
    "ce": lambda lp, h, a, lq: 1.0,
    "dft": lambda lp, h, a, lq: math.exp(lp),
    "idft": lambda lp, h, a, lq: naive_idft(lp, h, 1.0, 0.1, 2.0, 1.0),
    "entropy": lambda lp, h, a, lq: h / math.log(VOCAB),
    "power": lambda lp, h, a, lq: math.sqrt(math.exp(lp)),
    "chord": lambda lp, h, a, lq: math.exp(lp) * (1 - math.exp(lp)),
    "deft": lambda lp, h, a, lq: math.exp(lp) ** a * a / (a + 1e-6),
    "cll": lambda lp, h, a, lq: min(1.0, math.exp(lp + h)),
    "prift": lambda lp, h, a, lq: math.exp(lq),
    "asft": lambda lp, h, a, lq: math.exp(lp) + naive_anchor(lp, lq),
    "sft_k3": lambda lp, h, a, lq: 1 + naive_anchor(lp, lq),
    "minor_sft": lambda lp, h, a, lq: 2 / (1 + math.exp(0.1 * (lp - lq))),
    "iw": lambda lp, h, a, lq: min(max(math.exp(lp - lq), 0.2), 1.8),
    "psft": lambda lp, h, a, lq: math.exp(lp - lq) if math.exp(lp - lq) < 1.2 else 0.0,
    "asft_topk": lambda lp, h, a, lq: math.exp(lp),
    "sft_topk": lambda lp, h, a, lq: 1.0,
    "distill": lambda lp, h, a, lq: 0.0,
    "gift": lambda lp, h, a, lq: 1 - 1 / (1 + math.exp(lq) * math.expm1(20)),
}
# Whose weight does not follow p: a token of probability 0 keeps one.
NOT_GATED = ("ce", "entropy", "prift", "asft", "sft_k3", "minor_sft", "iw", "sft_topk", "gift")


def test_registry_flag_kernels_public_names_and_pages_name_the_objectives_of_the_table() -> None:
    names = tuple(OBJECTIVES)
    assert objective_names() == names == tuple(NAIVE)
    assert f"--sft-loss {{{','.join(names)}}} or MODULE" in flags.add_arguments(ArgumentParser(prog="x")).format_usage()
    kernels = (ROOT / "megatron_idft/loss/triton_kernels.py").read_text()
    formulas = {resolve_objective(name).token_weight.name for name in names} | {"idft_reference"}
    assert set(re.findall(r'WEIGHT == "(\w+)"', kernels)) == formulas
    for name in names:
        assert name in megatron_idft.__all__
        objective = resolve_objective(name)
        assert isinstance(objective.token_weight, KernelFormula) and objective.name == name
    for page in ("README.md", "docs/loss.md"):
        text = (ROOT / page).read_text()
        assert [name for name in names if f"`{name}`" not in text and f"--sft-loss {name}" not in text] == [], page


@pytest.mark.parametrize("name", NAIVE)
def test_weight_equals_the_formula(name: str) -> None:
    weight = resolve_objective(name).weight(STATISTICS)
    assert weight.dtype == torch.float32 and not weight.requires_grad
    cases = zip(LOG_PROB, ENTROPY, SQUARES, REFERENCE_LOG_PROB, strict=True)
    expected = [NAIVE[name](*case) for case in cases]
    # exp amplifies the fp32 rounding of its argument by |argument| <= 60 here: 60 * 2^-24 = 3.6e-6.
    torch.testing.assert_close(weight.double(), torch.tensor(expected, dtype=torch.float64), rtol=5e-6, atol=0)


@pytest.mark.parametrize("beta,low,high,lam", [(1.0, 0.1, 2.0, 0.5), (0.5, 0.0, 1.0, 1.0), (3.0, 0.7, 5.0, 0.25)])
def test_idft_hyperparameters(beta: float, low: float, high: float, lam: float) -> None:
    weight = idft(beta, low, high, lam).weight(STATISTICS)
    expected = [naive_idft(lp, h, beta, low, high, lam) for lp, h in zip(LOG_PROB, ENTROPY, strict=True)]
    # 5 * 30 nats is the largest exponent; see above. Below exp(-103) fp32 has only 0.
    torch.testing.assert_close(weight.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=1e-45)


def test_gamma_is_clamped_and_typical_tokens_have_gamma_one() -> None:
    gamma = idft().gamma(STATISTICS)
    assert gamma is not None
    assert gamma[1].item() == 1.0  # phi = 0
    assert gamma[2].item() == 2.0  # phi = -8.6
    assert gamma[3].item() == pytest.approx(0.1, rel=1e-6)  # phi = 3.3 > -ln 0.1
    assert [objective.gamma(STATISTICS) for objective in (ce(), dft(), entropy())] == [None, None, None]


def test_raw_gamma_does_not_follow_lambda() -> None:
    half, full = idft(gamma_lambda=0.5), idft(gamma_lambda=1.0)
    raw, gamma = half.raw_gamma(STATISTICS), half.gamma(STATISTICS)
    assert raw is not None and gamma is not None
    assert torch.equal(raw, full.gamma(STATISTICS))
    torch.testing.assert_close(gamma, 1 + 0.5 * (raw - 1))
    assert dft().raw_gamma(STATISTICS) is None


def test_lambda_zero_is_exactly_dft() -> None:
    for gamma_lambda in (0.0, torch.zeros(())):
        assert torch.equal(idft(gamma_lambda=gamma_lambda).weight(STATISTICS), dft().weight(STATISTICS))


def test_lambda_tensor_is_read_at_every_call() -> None:
    gamma_lambda = torch.zeros(())
    objective = idft(gamma_lambda=gamma_lambda)
    for value in (0.0, 0.5, 1.0):
        gamma_lambda.fill_(value)
        assert torch.equal(objective.weight(STATISTICS), idft(gamma_lambda=value).weight(STATISTICS))


@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize("h", [0.0, 5.0])
def test_weight_is_finite_for_a_target_of_no_probability(name: str, h: float) -> None:
    weight = resolve_objective(name).weight(make_statistics([-1e30, -3.4e38, -104.0], [h] * 3))
    assert weight.isfinite().all()
    if name not in NOT_GATED:
        assert weight[0] == 0


@pytest.mark.parametrize("q", [0.0, 0.25, 1.0, 10.0])
def test_power_takes_its_exponent(q: float) -> None:
    weight = power(q).weight(STATISTICS)
    expected = torch.tensor(LOG_PROB, dtype=torch.float64).mul(q).exp()
    torch.testing.assert_close(weight.double(), expected, rtol=2e-5, atol=1e-45)
    same = {0.0: ce(), 1.0: dft()}
    if q in same:
        assert torch.equal(weight, same[q].weight(STATISTICS))


def test_chord_keeps_its_precision_for_a_sure_token() -> None:
    log_prob = torch.tensor([-1e-7, -1e-5, -1e-3])  # 1 - p in fp32 would be off by half, by a hundredth, by 1e-4
    weight = chord().weight(make_statistics(log_prob.tolist(), [0.0] * 3))
    exact = log_prob.double().exp() * -log_prob.double().expm1()
    torch.testing.assert_close(weight.double(), exact, rtol=1e-6, atol=0)
    assert weight.max() <= 0.25


def test_deft_is_between_ce_and_dft_and_says_what_it_reads() -> None:
    flat, sharp = (make_statistics([-2.0], [1.0], squares=[a]) for a in (1e-3, 1.0))
    assert deft().weight(flat).item() == pytest.approx(math.exp(-0.002) / 1.001, rel=1e-5)
    assert deft().weight(sharp).item() == pytest.approx(math.exp(-2.0), rel=1e-5)
    with pytest.raises(ValueError, match="sum_squared_prob"):
        deft().weight(TokenStatistics(*(torch.zeros(1),) * 2, torch.zeros(1, dtype=torch.long), VOCAB))


def test_cll_is_one_from_phi_zero_on() -> None:
    weight = cll().weight(make_statistics([-1.5, -0.2, -2.0], [1.5, 3.5, 0.5]))
    assert weight[:2].tolist() == [1.0, 1.0] and weight[2].item() == pytest.approx(math.exp(-1.5))


def test_idft_takes_both_statistics_of_the_reference() -> None:
    objective = idft(weights="reference", beta=0.5)
    cases = zip(REFERENCE_LOG_PROB, REFERENCE_ENTROPY, strict=True)
    expected = [naive_idft(lq, h, 0.5, 0.1, 2.0, 1.0) for lq, h in cases]
    torch.testing.assert_close(objective.weight(STATISTICS), torch.tensor(expected), rtol=5e-6, atol=0)
    gamma = objective.gamma(STATISTICS)
    assert gamma is not None and gamma[1].item() == pytest.approx(math.exp(-0.4), rel=1e-6)
    with pytest.raises(ValueError, match="weights must be 'online' or 'reference'"):
        idft(weights="frozen")


def test_where_nothing_has_changed_anchors_are_silent() -> None:
    same = replace(STATISTICS, reference_log_prob=STATISTICS.log_prob)
    for anchored, plain in (("asft", "dft"), ("sft_k3", "ce"), ("minor_sft", "ce"), ("iw", "ce"), ("psft", "ce")):
        assert torch.equal(resolve_objective(anchored).weight(same), resolve_objective(plain).weight(same)), anchored


def test_an_anchor_keeps_its_precision_near_the_reference() -> None:
    # r - 1 in fp32 would be off by half: r = 1 + 1e-7.
    log_ratio = torch.tensor([1e-7, -1e-7, 1e-4])
    near = replace(make_statistics([-1.0] * 3, [0.5] * 3), log_prob=torch.zeros(3), reference_log_prob=log_ratio)
    weight = sft_k3(coefficient=1e6).weight(near).double() - 1
    torch.testing.assert_close(weight, 1e6 * log_ratio.double().expm1(), rtol=1e-6, atol=1e-6)


def test_the_gradient_of_k3_is_the_anchor() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 11, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 11, (6,), generator=generator)
    log_q = torch.randn(6, 11, generator=generator, dtype=torch.float64).log_softmax(-1)[range(6), labels]
    log_p = logits.log_softmax(-1)[range(6), labels]
    log_r = log_q - log_p
    (exact,) = torch.autograd.grad((-log_p + 0.5 * (log_r.exp() - 1 - log_r)).sum(), logits)
    weight = 1 + 0.5 * log_r.detach().expm1()
    residual = logits.detach().softmax(-1) - torch.nn.functional.one_hot(labels, 11)
    torch.testing.assert_close(exact, weight[:, None] * residual, rtol=1e-9, atol=1e-12)


def test_negative_weights_are_declared_and_refuse_a_floor() -> None:
    lost = make_statistics([-0.1], [0.5])  # p = 0.9 where the reference has 0.98 to 0.001
    assert asft(coefficient=2.0).weight(replace(lost, reference_log_prob=torch.tensor([-7.0]))).item() < -1
    declared = {name for name in NAIVE if resolve_objective(name).negative_weights}
    assert declared == {"asft"} and sft_k3(coefficient=1.5).negative_weights and not asft(0.0).negative_weights
    with pytest.raises(ValueError, match=r"weight floor of 0\.1 would raise the negative weights.*'asft'"):
        resolve_objective("asft", weight_floor=0.1)


def test_the_cap_bounds_a_token_that_the_model_has_lost() -> None:
    lost = replace(make_statistics([-80.0], [0.5]), reference_log_prob=torch.tensor([-0.1]))
    assert asft(coefficient=0.03, cap=4.0).weight(lost).item() == pytest.approx(0.09)


@pytest.mark.parametrize("name", [name for name in NAIVE if resolve_objective(name).reference_statistics])
def test_a_missing_reference_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="reference_log_prob is None"):
        resolve_objective(name).weight(replace(STATISTICS, reference_log_prob=None))


@pytest.mark.parametrize(
    "name,hyperparameters,message",
    [
        ("asft", {"coefficient": -0.1}, "coefficient must be"),
        ("asft", {"cap": 0.5}, "cap must be"),
        ("sft_k3", {"coefficient": math.nan}, "coefficient must be"),
        ("minor_sft", {"beta": 0.0}, "beta must be"),
        ("iw", {"ratio_min": 2.0}, "ratio_min <= ratio_max"),
        ("psft", {"epsilon": math.inf}, "epsilon must be"),
        ("asft_topk", {"coefficient": -1.0}, "coefficient must be"),
        ("gift", {"beta": 0.0}, "beta must lie between 0 and 80"),
        ("gift", {"beta": 100.0}, "beta must lie between 0 and 80"),
    ],
)
def test_bad_hyperparameters_of_anchored_objectives_are_named(name: str, hyperparameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_objective(name, **hyperparameters)


@pytest.mark.parametrize("q", [-0.1, 100.5, math.nan, math.inf])
def test_an_exponent_out_of_range_is_refused_with_its_range(q: float) -> None:
    with pytest.raises(ValueError, match=r"q must lie in \[0, 100\].*default 0\.5"):
        resolve_objective("power", q=q)


def test_gradient_of_unlikely_tokens_is_not_cut() -> None:
    # The authors' code clamps p at 1e-10: below, weight and gradient stop following the formula.
    assert dft().weight(make_statistics([-30.0], [0.0])).item() == pytest.approx(math.exp(-30.0), rel=1e-5)


def test_entropy_weight_of_a_single_token_vocabulary_is_zero() -> None:
    statistics = TokenStatistics(torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.long), 1)
    assert entropy().weight(statistics).tolist() == [0.0, 0.0]


def test_ignored_positions_have_weight_zero_under_every_modifier() -> None:
    statistics = make_statistics([0.0, -1.0], [0.0, 1.0], [-100, 4])
    for name in NAIVE:
        floor = 0.0 if resolve_objective(name).negative_weights else 0.5
        objective = resolve_objective(name, weight_floor=floor, exempt_token_ids=[4, 7])
        assert objective.weight(statistics).tolist() == [0.0, 1.0]


def test_weight_floor_raises_only_smaller_weights() -> None:
    plain, floored = dft().weight(STATISTICS), dft().with_weight_floor(0.2).weight(STATISTICS)
    assert torch.equal(floored, torch.where(plain < 0.2, 0.2, plain))
    assert (plain < 0.2).any() and (plain > 0.2).any()


def test_exempt_tokens_have_weight_one() -> None:
    statistics = make_statistics(LOG_PROB, ENTROPY, [3, 4, 5, 4, -1])
    plain, exempt = idft().weight(statistics), idft().with_exempt_tokens((4, 49)).weight(statistics)
    assert exempt[[1, 3]].tolist() == [1.0, 1.0]
    assert torch.equal(exempt[[0, 2, 4]], plain[[0, 2, 4]])
    assert plain[1] != 1 and plain[3] != 1


def test_modifiers_keep_the_original_and_each_other() -> None:
    original = idft()
    modified = original.with_weight_floor(0.1).with_exempt_tokens([2])
    assert modified.weight_floor == 0.1
    assert modified.exempt_token_ids == (2,)
    assert original.weight_floor == 0.0
    assert original.exempt_token_ids == ()
    assert modified.gamma(STATISTICS) is not None


@pytest.mark.parametrize(
    "hyperparameters,named",
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": -1.0}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"gamma_min": -0.1}, "gamma_min"),
        ({"gamma_min": 3.0}, "gamma_min"),
        ({"gamma_max": math.inf}, "gamma_max"),
        ({"gamma_lambda": 1.5}, "gamma_lambda"),
        ({"gamma_lambda": torch.ones(1)}, "gamma_lambda"),
        ({"gamma_lambda": torch.ones((), dtype=torch.float64)}, "gamma_lambda"),
        ({"weight_floor": 1.5}, "weight_floor"),
        ({"weight_floor": -0.1}, "weight_floor"),
        ({"exempt_token_ids": [-1]}, "exempt_token_ids"),
        ({"exempt_token_ids": [1.5]}, "exempt_token_ids"),
    ],
)
def test_bad_hyperparameters_are_named(hyperparameters: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        resolve_objective("idft", **hyperparameters)  # type: ignore[arg-type]


def test_resolve_objective_accepts_names_and_objects() -> None:
    assert resolve_objective("idft", beta=2.0).hyperparameters["beta"] == 2.0
    objective = idft(beta=3.0)
    assert resolve_objective(objective) is objective
    with pytest.raises(ValueError, match=r"unknown objective 'nope'.*ce, dft, idft, entropy"):
        resolve_objective("nope")
    with pytest.raises(TypeError, match=r"'dft' has no hyper-parameter beta"):
        resolve_objective("dft", beta=1.0)
    with pytest.raises(TypeError, match=r"beta"):
        resolve_objective(objective, beta=1.0)
    with pytest.raises(TypeError, match=r"must be a name .* got function"):
        resolve_objective(test_resolve_objective_accepts_names_and_objects)  # type: ignore[arg-type]


USER_MODULE = """
import torch
from megatron_idft import Objective

def chord(statistics):
    p = statistics.log_prob.exp()
    return p * (1 - p)

def attached(statistics):
    return statistics.log_prob.exp().double().requires_grad_()

def wrong_shape(statistics):
    return statistics.log_prob.sum()

def wrong_dtype(statistics):
    return statistics.labels

def not_a_tensor(statistics):
    return 1.0

ready = Objective("ready", chord)
number = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_objectives.py").write_text(USER_MODULE)
    (tmp_path / "broken_objectives.py").write_text("import a_module_that_does_not_exist\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "user_objectives", raising=False)
    return "user_objectives"


def test_user_objective_works_with_modifiers(user_module: str) -> None:
    objective = resolve_objective(f"{user_module}:chord", weight_floor=0.01, exempt_token_ids=[9])
    assert objective.name == f"{user_module}:chord" and objective.gamma(STATISTICS) is None
    p = torch.tensor(LOG_PROB).exp()
    torch.testing.assert_close(objective.weight(STATISTICS), (p * (1 - p)).clamp(min=0.01))
    assert resolve_objective(f"{user_module}:ready").name == "ready"


def test_user_weight_is_detached_and_fp32(user_module: str) -> None:
    weight = resolve_objective(f"{user_module}:attached").weight(STATISTICS)
    assert weight.dtype == torch.float32 and not weight.requires_grad


def test_weight_of_attached_statistics_carries_no_gradient() -> None:
    log_prob = torch.tensor(LOG_PROB, requires_grad=True)
    squares = torch.tensor(SQUARES, requires_grad=True)
    statistics = replace(STATISTICS, log_prob=log_prob, sum_squared_prob=squares)
    for name in NAIVE:
        assert not resolve_objective(name).weight(statistics).requires_grad


@pytest.mark.parametrize(
    "attribute,error",
    [("wrong_shape", ValueError), ("wrong_dtype", ValueError), ("not_a_tensor", TypeError)],
)
def test_bad_user_results_name_the_objective(user_module: str, attribute: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=attribute):
        resolve_objective(f"{user_module}:{attribute}").weight(STATISTICS)


@pytest.mark.parametrize(
    "spec,message",
    [
        ("no_such_module:f", "cannot import 'no_such_module'.*PYTHONPATH"),
        ("broken_objectives:f", "a_module_that_does_not_exist"),
        ("user_objectives:missing", "has no 'missing'"),
        ("user_objectives:number", "is a int"),
        ("user_objectives:", "module:function"),
        (":f", "module:function"),
    ],
)
def test_bad_user_specs_are_named(user_module: str, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve_objective(spec)
    assert spec in str(caught.value)


def test_a_users_own_objective_object() -> None:
    def half(statistics: TokenStatistics) -> Tensor:
        return torch.full_like(statistics.log_prob, 0.5)

    assert Objective("half", half).weight(STATISTICS).tolist() == [0.5] * 5


def test_schedule_counts_completed_iterations() -> None:
    schedule = LambdaSchedule(warmup_iterations=3, ramp_iterations=4)
    values = [schedule.value(iteration) for iteration in range(9)]
    assert values == [0.0, 0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_schedule_without_warmup_or_ramp() -> None:
    assert [LambdaSchedule(0, 0).value(i) for i in (0, 1, 100)] == [1.0, 1.0, 1.0]
    assert [LambdaSchedule(2, 0).value(i) for i in range(4)] == [0.0, 0.0, 1.0, 1.0]
    assert [LambdaSchedule(0, 2).value(i) for i in range(4)] == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    "shares,iterations,expected",
    [
        ((0.0, 0.0), 10, (0, 0)),
        ((0.2, 0.1), 1000, (200, 100)),  # the defaults of the authors' code
        ((0.7, 0.3), 10, (7, 3)),  # sums to 1, in floating point slightly off
        ((0.9, 0.1), 10, (9, 1)),
        ((0.25, 0.25), 7, (2, 2)),  # both ends are rounded, so that they never lie beyond the last iteration
        ((0.35, 0.65), 3, (1, 2)),
        ((1.0, 0.0), 5, (5, 0)),
    ],
)
def test_schedule_from_shares(shares: tuple[float, float], iterations: int, expected: tuple[int, int]) -> None:
    schedule = LambdaSchedule.from_shares(*shares, iterations)
    assert (schedule.warmup_iterations, schedule.ramp_iterations) == expected


@pytest.mark.parametrize(
    "arguments,named",
    [((-0.1, 0, 10), "warmup_share"), ((0, 1.1, 10), "ramp_share"), ((0.6, 0.5, 10), "exceed 1"), ((0, 0, 0), "train")],
)
def test_bad_shares_are_named(arguments: tuple[float, float, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LambdaSchedule.from_shares(*arguments)


def test_negative_iterations_are_named() -> None:
    with pytest.raises(ValueError, match="ramp_iterations"):
        LambdaSchedule(0, -1)
