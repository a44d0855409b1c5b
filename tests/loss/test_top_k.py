"""The KL divergence to a reference's most probable tokens, beside the weighted cross-entropy."""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed
from torch import Tensor

from megatron_idft import Objective, Reference, asft_topk, distill, gift, sft_topk, vocab_parallel_loss
from megatron_idft.loss import reference as reference_backend
from megatron_idft.loss.top_k import LEAST_MASS
from tests.loss.engines import Engine, interpreted
from tests.loss.intermediate import as_intermediate, bits
from tests.loss.test_compile import compiled
from tests.loss.test_reference import LargestTensor
from tests.loss.test_tensor_parallel import Collectives
from tests.loss.test_vocab_parallel_loss import DTYPES
from tests.ranks import run_ranks

OBJECTIVES: dict[str, Objective] = {
    "asft_topk": asft_topk(),
    "sft_topk, strong": sft_topk(coefficient=3.0),
    "distill": distill(),
    "gift": gift(beta=2.0),
}


class Case(NamedTuple):
    logits: Tensor
    labels: Tensor
    upstream: Tensor
    reference: Reference
    vocab_size: int


def make_case(
    shape: tuple[int, ...], padded: int, vocab: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Case:
    """Labels within and outside the reference's top K; at ignored positions everything is poison."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, padded, generator=generator) * 2
    logits[..., vocab:] = 30.0
    of_reference = (logits[..., :vocab] + torch.randn(*shape, vocab, generator=generator)).log_softmax(-1)
    top_log_prob, top_ids = of_reference.topk(k)
    labels = torch.randint(0, vocab, shape, generator=generator)
    labels = torch.where(torch.rand(shape, generator=generator) < 0.5, top_ids[..., k // 2], labels)
    labels = torch.where(torch.rand(shape, generator=generator) < 0.25, -100, labels)
    log_prob = of_reference.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ignored = (labels < 0).unsqueeze(-1)
    reference = Reference(
        log_prob=torch.where(labels < 0, torch.nan, log_prob),
        top_ids=torch.where(ignored, torch.tensor([-5, 10**9] * k)[:k], top_ids),
        top_log_prob=torch.where(ignored, torch.nan, top_log_prob),
    )
    logits = torch.where(ignored, torch.nan, logits).to(dtype)
    return Case(logits, labels, torch.rand(shape, generator=generator) + 0.5, reference, vocab)


def expected(case: Case, objective: Objective) -> dict[str, Tensor]:
    """In float64, by autograd over the written-out loss, with weight and coefficient frozen."""
    trained = case.labels >= 0
    each = trained.unsqueeze(-1)
    z = torch.where(each, case.logits.double()[..., : case.vocab_size], 0.0).requires_grad_()
    labels = case.labels.clamp(min=0).unsqueeze(-1)
    log_p = z.log_softmax(-1)
    lp = log_p.gather(-1, labels).squeeze(-1)
    lq = torch.where(trained, case.reference.log_prob.double(), 0.0)
    coefficient = {"asft_topk": 0.1, "sft_topk": 3.0, "distill": 1.0, "gift": 1 / (1 + lq.exp() * math.expm1(2.0))}
    c = coefficient[objective.name]
    weight = {"asft_topk": lp.exp(), "sft_topk": 1.0, "distill": 0.0, "gift": 1 - c}[objective.name]
    weight = torch.as_tensor(weight, dtype=torch.float64).detach().expand(lp.shape)
    top = torch.where(each, case.reference.top_ids, 0).long()
    lq_top = torch.where(each, case.reference.top_log_prob.double(), 0.0)
    lp_top = log_p.gather(-1, top)
    q, p = lq_top.exp(), lp_top.exp()
    rest_q, rest_p = ((1 - mass.sum(-1)).clamp(min=LEAST_MASS) for mass in (q, p))
    kl = (q * (lq_top - lp_top)).sum(-1) + rest_q * (rest_q.log() - rest_p.log())
    loss = torch.where(trained, -weight * lp + c * kl, 0.0)
    (grad,) = torch.autograd.grad((case.upstream.double() * loss).sum(), z)
    padded = torch.zeros(case.logits.shape, dtype=torch.float64)
    padded[..., : case.vocab_size] = grad
    # 1 - sum p_k is good to 3e-7, which Q / P passes on to the row.
    slack = torch.where(trained, torch.as_tensor(c) * rest_q / rest_p * 3e-7, 0.0).unsqueeze(-1)
    values = {"loss": loss, "reference_kl": torch.where(trained, kl, 0.0), "weight": torch.where(trained, weight, 0.0)}
    return {**{name: value.detach() for name, value in values.items()}, "grad": padded, "slack": slack.detach()}


def assert_matches(actual: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name in ("loss", "reference_kl", "weight"):
        torch.testing.assert_close(actual[name].double(), want[name], rtol=2e-5, atol=3e-6, msg=lambda m, n=name: n + m)
    grad = actual["grad"].double()
    half_ulp = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[actual["grad"].dtype]
    allowed = (half_ulp + 1e-5) * want["grad"].abs() + 1e-6 + want["slack"]
    allowed = allowed + (2**-25 if actual["grad"].dtype == torch.float16 else 0)
    excess = (grad - want["grad"]).abs() - allowed
    assert (excess <= 0).all(), f"gradient off by {excess.nan_to_num(torch.inf).max():.3g} more than allowed"


def run(engine: Engine, case: Case, objective: Objective, **settings: Any) -> dict[str, Tensor]:
    """Outputs and gradient, the same bits where the gradient overwrites the logits."""
    reference = Reference(*(None if value is None else engine.place(value) for value in case.reference))
    labels, upstream = engine.place(case.labels), engine.place(case.upstream)
    settings |= {"reference": reference, "vocab_size": case.vocab_size, "backend": engine.backend}
    found = []
    for overwrite in (False, True):
        leaf = engine.place(case.logits).requires_grad_()
        logits = as_intermediate(leaf) if overwrite else leaf
        out = vocab_parallel_loss(logits, labels, objective, overwrite_logits=overwrite, **settings)
        (grad,) = torch.autograd.grad(out.loss, logits, upstream)
        found.append({**out._asdict(), "grad": grad})
    copying, overwriting = found
    assert all(torch.equal(bits(value), bits(overwriting[name])) for name, value in copying.items())
    return {name: value.detach().cpu() for name, value in copying.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("k,vocab,dtype", [(1, 40, torch.float32), (3, 97, torch.bfloat16), (20, 1021, torch.float16)])
def test_values_and_gradient(engine: Engine, name: str, k: int, vocab: int, dtype: torch.dtype) -> None:
    case = make_case((5, 3), vocab + 7, vocab, k, dtype)
    assert (case.labels.unsqueeze(-1) == case.reference.top_ids).any(), "a label among the K"
    assert_matches(run(engine, case, OBJECTIVES[name]), expected(case, OBJECTIVES[name]))


def _turned(value: Tensor | None) -> Tensor | None:
    """The same values with the first two dimensions in memory the other way round, as Megatron's are."""
    return None if value is None else value.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatrons_layout(engine: Engine, dtype: torch.dtype) -> None:
    case = make_case((4, 3), 48, 41, 4, dtype)
    turned = Case(*(_turned(value) for value in case[:3]), Reference(*map(_turned, case.reference)), 41)
    plain = run(engine, case, asft_topk())
    for field, value in run(engine, turned, asft_topk()).items():
        assert torch.equal(bits(value), bits(plain[field])), field


def test_all_tokens_of_the_reference_give_the_whole_divergence(engine: Engine) -> None:
    case = make_case((6,), 30, 30, 30)
    trained = case.labels >= 0
    log_q = torch.empty(6, 30).scatter_(1, case.reference.top_ids.clamp(0, 29), case.reference.top_log_prob)
    z = case.logits[trained].double().requires_grad_()
    log_p = z.log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_p, log_q[trained].double(), log_target=True, reduction="none").sum(-1)
    (grad,) = torch.autograd.grad((case.upstream[trained] * kl).sum(), z)
    actual = run(engine, case, distill())
    torch.testing.assert_close(actual["reference_kl"][trained].double(), kl.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual["grad"][trained].double(), grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 4.0, 20.0])
def test_gift_is_cross_entropy_to_the_tilted_reference(engine: Engine, beta: float) -> None:
    case = make_case((6,), 30, 30, 30)
    trained = case.labels >= 0
    log_q = torch.empty(6, 30).scatter_(1, case.reference.top_ids.clamp(0, 29), case.reference.top_log_prob)[trained]
    target = (log_q.double() + beta * torch.nn.functional.one_hot(case.labels[trained], 30)).softmax(-1)
    z = case.logits[trained].double().requires_grad_()
    (grad,) = torch.autograd.grad((case.upstream[trained] * -(target * z.log_softmax(-1)).sum(-1)).sum(), z)
    torch.testing.assert_close(run(engine, case, gift(beta))["grad"][trained].double(), grad, rtol=2e-5, atol=1e-6)


def test_where_model_and_reference_agree_nothing_pulls(engine: Engine) -> None:
    case = make_case((6,), 50, 50, 5)
    log_p = case.logits.log_softmax(-1)
    top_log_prob, top_ids = log_p.nan_to_num(0.0).topk(5)
    agreeing = case._replace(reference=Reference(case.reference.log_prob, None, top_ids, top_log_prob))
    actual = run(engine, agreeing, distill())
    assert actual["grad"].abs().max() < 1e-6 and actual["reference_kl"].abs().max() < 1e-6


def test_a_reference_that_the_model_excludes_stays_finite(engine: Engine) -> None:
    # All mass of the model on one token that the reference leaves out, and the other way round.
    logits = torch.zeros(2, 64)
    logits[0, 9] = 1e4
    logits[1, 3] = 60.0
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    reference = Reference(torch.tensor([-1.0, -1.0]), None, ids, torch.full((2, 3), math.log(1 / 3)))
    case = Case(logits, torch.tensor([9, 3]), torch.ones(2), reference, 64)
    actual = run(engine, case, sft_topk(coefficient=1.0))
    assert all(value.isfinite().all() for value in actual.values())
    torch.testing.assert_close(actual["grad"][0, 1:4], torch.full((3,), -1 / 3), rtol=1e-5, atol=1e-6)


def test_values_of_cross_entropy_keep_the_gradient(engine: Engine) -> None:
    case = make_case((5, 3), 48, 41, 4)
    plain, ce = run(engine, case, asft_topk()), run(engine, case, asft_topk(), cross_entropy_values=True)
    assert torch.equal(ce["grad"], plain["grad"]) and torch.equal(ce["loss"], 0.0 - plain["log_prob"])


@pytest.mark.parametrize("objective", [asft_topk(), gift()])
def test_a_compiled_loss_is_the_eager_one(engine: Engine, objective: Objective) -> None:
    torch.compiler.reset()
    case = make_case((6,), 48, 41, 4)
    logits, labels = (engine.place(torch.nan_to_num(case.logits)), engine.place(case.labels))
    reference = Reference(*(None if value is None else engine.place(value) for value in case.reference))
    settings = {"backend": engine.backend, "vocab_size": 41, "reference": reference}

    def total(hidden: Tensor) -> Tensor:
        return vocab_parallel_loss(hidden * 1.5, labels, objective, **settings).loss.sum()

    found = []
    for function in (total, compiled(total)):
        leaf = logits.clone().requires_grad_()
        found += torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


def test_no_tensor_but_the_gradient_has_the_size_of_the_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_backend, "_max_rows", lambda columns: 4)
    case = make_case((16, 4), 3000, 2900, 20, torch.bfloat16)
    leaf = as_intermediate(engine.place(case.logits).requires_grad_())
    reference = Reference(*(None if value is None else engine.place(value) for value in case.reference))
    settings = {"vocab_size": 2900, "backend": engine.backend, "reference": reference, "overwrite_logits": True}
    with LargestTensor(leaf) as largest:
        out = vocab_parallel_loss(leaf, engine.place(case.labels), asft_topk(), **settings)
        torch.autograd.grad(out.loss.sum(), leaf)
    assert max(largest.elements.values()) <= 4 * 3000, "a block of rows, and K numbers for each of 64 tokens"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (None, "reads log_prob of the reference"),
        (Reference(torch.zeros(2)), "reads top_ids of the reference"),
        (Reference(torch.zeros(2), None, torch.zeros(2, 3, dtype=torch.int32)), "reads top_log_prob"),
        (Reference(torch.zeros(2), None, torch.zeros(2, 3), torch.zeros(2, 3)), "top_ids must be of an integer dtype"),
        (
            Reference(torch.zeros(2), None, torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 4)),
            "must be alike",
        ),
        (
            Reference(torch.zeros(2), None, torch.zeros(3, 3, dtype=torch.int32), torch.zeros(3, 3)),
            r"shape \(2,\) and K",
        ),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(reference: Reference | None, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        vocab_parallel_loss(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), asft_topk(), reference=reference)


PARALLEL = {"fp32": ((3, 2), 48, 43, 5, torch.float32), "bf16": ((3, 2), 1000, 990, 20, torch.bfloat16)}


def run_shard(backend: str) -> dict[str, Any]:
    results = {}
    for name, arguments in PARALLEL.items():
        case = make_case(*arguments)
        shard = case.logits.chunk(torch.distributed.get_world_size(), dim=-1)[torch.distributed.get_rank()]
        shard = shard.detach().requires_grad_()
        settings = {"tp_group": torch.distributed.group.WORLD, "vocab_size": case.vocab_size, "backend": backend}
        with Collectives() as forward:
            out = vocab_parallel_loss(shard, case.labels, asft_topk(), reference=case.reference, **settings)
        with Collectives() as backward:
            out.loss.backward(case.upstream)
        values = {field: value.detach() for field, value in out._asdict().items()}
        results[name] = {**values, "grad": shard.grad, "forward": forward.calls, "backward": backward.calls}
    return results


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_ranks(size: int, backend: str) -> None:
    ranks = run_ranks(run_shard, size, backend)
    for name, arguments in PARALLEL.items():
        case = make_case(*arguments)
        joined = {**ranks[0][name], "grad": torch.cat([rank[name]["grad"] for rank in ranks], dim=-1)}
        assert_matches(joined, expected(case, asft_topk()))
        assert (joined["grad"][..., case.vocab_size :] == 0).all()
        tokens, k = case.labels.numel(), case.reference.top_ids.shape[-1]
        for rank in ranks:
            assert [(call, size) for call, size, _ in rank[name]["forward"]] == [
                ("c10d::_allgather_base_", 4 * tokens),
                ("c10d::allreduce_", k * tokens),
            ]
            assert rank[name]["backward"] == []
            for field in ("loss", "weight", "reference_kl"):
                assert torch.equal(rank[name][field], ranks[0][name][field])
