import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_idft import LossOutput, Objective, dft, idft, loss, vocab_parallel_loss
from megatron_idft.loss import backends, resolve_backend, triton_backend
from megatron_idft.loss.backends import load_backend
from megatron_idft.loss.shard import VocabShard
from megatron_idft.objectives import objective_names
from megatron_idft.statistics import TokenStatistics
from tests.loss.engines import Engine
from tests.loss.oracle import VARIANTS, Expected, assert_matches, expected_loss, objective_of

# Those with a term beside the weight: test_top_k.py.
OBJECTIVES = [name for name in (*objective_names(), *VARIANTS) if objective_of(name).kl_coefficient is None]
NEVER_NEGATIVE = [name for name in OBJECTIVES if not objective_of(name).negative_weights]
# Whose weight does not follow p: a token of probability 0 keeps one.
NOT_GATED = {"ce", "entropy", "prift", "asft", "sft_k3", "minor_sft", "iw", *VARIANTS}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_inputs(
    shape: tuple[int, ...], vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Logits whose targets range from likely to hopeless, a third of the labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, vocab, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, vocab, shape, generator=generator)
    likely = torch.rand(shape, generator=generator) < 0.4
    labels = torch.where(likely, logits.float().argmax(-1), labels)
    return logits, torch.where(torch.rand(shape, generator=generator) < 0.33, -100, labels)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# V: 2 is the least with a choice, 97 no multiple of anything, 1024 a power of two, 5003 several SIMD strips and a rest.
VOCABULARIES = [2, 97, 1024, 5003]
# Every pair of a vocabulary, an objective and a dtype. An interpreted kernel costs by the row: few rows.
CASES = [
    (vocab, objective, DTYPES[(i + j) % 3])
    for i, vocab in enumerate(VOCABULARIES)
    for j, objective in enumerate(OBJECTIVES)
]


@pytest.mark.parametrize("vocab,objective,dtype", CASES)
def test_values_and_gradient(engine: Engine, vocab: int, objective: str, dtype: torch.dtype) -> None:
    logits, labels = make_inputs((9,), vocab, dtype)
    upstream = torch.randn(9, generator=torch.Generator().manual_seed(1))
    actual = engine.run(logits, labels, objective, upstream=upstream)
    assert actual["grad"].dtype == dtype
    assert_matches(actual, expected_loss(logits, labels, objective, upstream=upstream))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_the_rounded_float64_gradient(engine: Engine, dtype: torch.dtype) -> None:
    # One rounding of a value good to ~1e-6 differs from the rounded float64 value only where it lies that close to a
    # tie: 1e-6 of an ulp of 2^-8 (bf16) or 2^-11 (fp16), so in far less than 1 % of the elements. A gradient built from
    # bf16 pieces, or scaled after being stored, differs in a third of them.
    logits, labels = make_inputs((12,), 5000, dtype)
    upstream = torch.rand(12) + 0.5
    exact = expected_loss(logits, labels, "idft", upstream=upstream).grad
    grad = engine.run(logits, labels, "idft", upstream=upstream)["grad"]
    representable = exact.abs() >= torch.finfo(dtype).tiny
    differs = (grad != exact.to(dtype)) & representable
    assert differs.sum() < 0.005 * representable.sum()


@pytest.mark.parametrize("gamma_lambda", [0.0, 0.5, 1.0])
def test_lambda(engine: Engine, gamma_lambda: float) -> None:
    logits, labels = make_inputs((9,), 97)
    actual = engine.run(logits, labels, idft(gamma_lambda=torch.tensor(gamma_lambda)))
    assert_matches(actual, expected_loss(logits, labels, "idft", gamma_lambda=gamma_lambda))
    if gamma_lambda == 0.0:
        assert_same_bits(actual, engine.run(logits, labels, dft()))


@pytest.mark.parametrize("objective", NEVER_NEGATIVE)
def test_weight_floor_and_exempt_tokens(engine: Engine, objective: str) -> None:
    logits, labels = make_inputs((20,), 10)
    modified = objective_of(objective).with_weight_floor(0.25).with_exempt_tokens([3, 7])
    assert ((labels == 3) | (labels == 7)).any()
    assert_matches(
        engine.run(logits, labels, modified), expected_loss(logits, labels, objective, weight_floor=0.25, exempt=(3, 7))
    )


# Megatron's logits are [s, b, V/tp]; each view below is one a caller may hold without owning a contiguous copy.
VIEWS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "transposed [s, b, V] -> [b, s, V]": lambda dtype: torch.randn(4, 3, 41, dtype=dtype).transpose(0, 1),
    "columns of a wider tensor": lambda dtype: torch.randn(3, 2, 64, dtype=dtype)[..., 3:44],
    "every other row": lambda dtype: torch.randn(10, 41, dtype=dtype)[::2],
    "part of the batch": lambda dtype: torch.randn(3, 5, 41, dtype=dtype)[:, 1:3],
    "vocabulary-major": lambda dtype: torch.randn(41, 5, dtype=dtype).t(),
    "expanded": lambda dtype: torch.randn(1, 3, 41, dtype=dtype).expand(2, 3, 41),
    "permuted 3 leading dimensions": lambda dtype: torch.randn(2, 3, 2, 41, dtype=dtype).permute(2, 0, 1, 3),
    "reversed 4 leading dimensions": lambda dtype: torch.randn(2, 2, 2, 2, 41, dtype=dtype).permute(3, 2, 1, 0, 4),
    "single row without leading dimensions": lambda dtype: torch.randn(41, dtype=dtype),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # two sizes of an element
def test_any_strides(engine: Engine, dtype: torch.dtype, view: str) -> None:
    logits = VIEWS[view](dtype)
    labels = torch.randint(-2, 41, logits.shape[:-1])
    assert_matches(engine.run(logits, labels), expected_loss(logits, labels, "idft"))


def test_gradient_reaches_the_base_of_a_view(engine: Engine) -> None:
    base = engine.place(torch.randn(6, 5, 20)).requires_grad_()
    labels = engine.place(torch.randint(0, 15, (5, 6)))
    engine.loss(base[..., 2:17].transpose(0, 1), labels).loss.sum().backward()
    expected = engine.run(base.detach()[..., 2:17].transpose(0, 1).contiguous(), labels)["grad"]
    assert base.grad is not None
    assert torch.equal(base.grad[..., 2:17].cpu(), expected.transpose(0, 1))
    assert not base.grad[..., :2].any() and not base.grad[..., 17:].any()


# One less, one more, and exactly one or two of the kernels' blocks, for each of their launch parameters.
NEAR_BLOCKS = [blocks * size + extra for size in (512, 1024, 2048, 4096) for blocks in (1, 2) for extra in (-1, 0, 1)]


SHAPES = st.lists(st.integers(1, 3), min_size=0, max_size=4).map(tuple).filter(lambda shape: math.prod(shape) <= 12)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_generated_shapes(engine: Engine, data: st.DataObject) -> None:
    shape = data.draw(SHAPES, label="shape")
    vocab = data.draw(st.one_of(st.integers(1, 70), st.sampled_from(NEAR_BLOCKS)), label="V")
    vocab_size = data.draw(st.integers(1, vocab), label="vocab_size")
    objective = data.draw(st.sampled_from(OBJECTIVES))
    dtype = data.draw(st.sampled_from(DTYPES))
    order = data.draw(st.permutations(range(len(shape))), label="memory order")
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn(*(shape[dim] for dim in order), vocab, generator=generator).mul_(4).to(dtype)
    logits = stored.permute(*(order.index(dim) for dim in range(len(shape))), len(shape))
    labels = torch.randint(-1, vocab_size, shape, generator=generator)
    upstream = torch.randn(shape, generator=generator)
    assert logits.shape == (*shape, vocab)
    actual = engine.run(logits, labels, objective, vocab_size, upstream)
    assert_matches(actual, expected_loss(logits, labels, objective, vocab_size, upstream))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_ignored_rows_may_hold_anything(engine: Engine, poison: float, dtype: torch.dtype) -> None:
    logits, labels = make_inputs((3, 2), 50, dtype)
    ignored = labels < 0
    assert ignored.any() and not ignored.all()
    poisoned = torch.where(ignored.unsqueeze(-1), poison, logits)
    one_cell = logits.clone()
    one_cell[..., 7] = torch.where(ignored, poison, logits[..., 7])
    clean = engine.run(logits, labels)
    # NaN upstream at an ignored position: the same poison, arriving from the other side.
    upstream = torch.where(ignored, torch.nan, 1.0)
    for actual in (engine.run(one_cell, labels), engine.run(poisoned, labels, upstream=upstream)):
        assert_same_bits(actual, clean)
        for name in ("loss", "weight", "log_prob", "entropy", "grad"):
            assert (actual[name][ignored] == 0).all(), name


@pytest.mark.parametrize("label", [-1, -100, -(2**40)])
def test_every_negative_label_is_ignored(engine: Engine, label: int) -> None:
    actual = engine.run(torch.randn(3, 5), torch.tensor([2, label, 0]))
    assert actual["loss"][1] == 0 and (actual["grad"][1] == 0).all() and (actual["loss"][[0, 2]] > 0).all()


def test_all_labels_ignored(engine: Engine) -> None:
    actual = engine.run(torch.full((4, 6), math.nan), torch.full((4,), -100))
    assert not any(actual[name].any() for name in ("loss", "weight", "log_prob", "entropy", "grad"))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_trained_row_is_nan_and_harms_no_other(engine: Engine, poison: float) -> None:
    logits = torch.randn(3, 9)
    logits[1, 4] = poison
    actual = engine.run(logits, torch.tensor([1, 2, 3]), "ce")
    assert actual["loss"][1].isnan() and actual["grad"][1].isnan().any()
    assert actual["loss"][[0, 2]].isfinite().all() and actual["grad"][[0, 2]].isfinite().all()


def test_a_row_of_minus_infinity_has_no_distribution(engine: Engine) -> None:
    logits = torch.randn(3, 9)
    logits[1] = -math.inf
    actual = engine.run(logits, torch.tensor([1, 2, 3]), "ce")
    assert actual["log_prob"].isnan().tolist() == actual["entropy"].isnan().tolist() == [False, True, False]
    assert actual["grad"].isnan().any(-1).tolist() == [False, True, False]


def extreme_rows(vocab: int = 40) -> dict[str, Tensor]:
    noise = torch.randn(vocab, generator=torch.Generator().manual_seed(3))
    one_hot = torch.zeros(vocab)
    one_hot[0] = 1e4
    almost_one_hot = torch.zeros(vocab)
    almost_one_hot[0] = 18.0  # p = 1 - 6e-7: the smallest entropies that fp32 resolves
    masked = noise.clone()
    masked[10:30] = -math.inf
    only_one_left = torch.full((vocab,), -math.inf)
    only_one_left[0] = 1.0
    huge_mask = noise.clone()
    huge_mask[5:] = torch.finfo(torch.float32).min
    return {
        "offset 1e4": noise + 1e4,
        "offset -1e4": noise - 1e4,
        "one-hot": one_hot,
        "almost one-hot": almost_one_hot,
        "constant": torch.full((vocab,), -3.0),
        "-inf columns": masked,
        "one finite column": only_one_left,
        "columns masked by the least float": huge_mask,
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_extreme_rows(engine: Engine, objective: str) -> None:
    rows = {name: row for name, row in extreme_rows().items() if name != "one finite column"}
    logits = torch.stack(list(rows.values())).repeat(2, 1, 1)
    labels = torch.tensor([[0], [4]]).expand(2, len(rows))  # the likely token, and one that may be hopeless
    actual = engine.run(logits, labels, objective)
    assert all(value.isfinite().all() for value in actual.values())
    expected = expected_loss(logits, labels, objective)
    for index, name in enumerate(rows):
        try:
            assert_matches(
                {field: value[:, index] for field, value in actual.items() if value.dim()},
                Expected(*(value[:, index] for value in expected)),
            )
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_target_of_probability_zero_is_finite(engine: Engine, objective: str) -> None:
    logits = torch.stack([extreme_rows()["-inf columns"], extreme_rows()["one finite column"]])
    actual = engine.run(logits, torch.tensor([15, 15]), objective)
    assert all(value.isfinite().all() for value in actual.values())
    assert (actual["log_prob"] <= -1e29).all()
    if objective not in NOT_GATED:
        assert not actual["weight"].any() and not actual["loss"].any() and not actual["grad"].any()
    if objective == "ce":  # softmax - onehot, as for any other target
        assert (actual["grad"][:, 15] == -1).all()
        torch.testing.assert_close(actual["grad"].sum(-1), torch.zeros(2), atol=1e-6, rtol=0)


def test_padding_columns_count_nowhere(engine: Engine) -> None:
    # 101 true columns padded to 128, as Megatron does, with padding that would dominate every sum.
    logits, labels = make_inputs((2, 4), 101)
    padded = torch.nn.functional.pad(logits, (0, 27), value=50.0)
    padded[..., -1] = math.nan
    actual, plain = engine.run(padded, labels, vocab_size=101), engine.run(logits, labels)
    assert (actual["grad"][..., 101:] == 0).all()
    actual["grad"] = actual["grad"][..., :101]
    for name in plain:
        torch.testing.assert_close(actual[name], plain[name], rtol=0, atol=1e-6)


def test_entropy_weight_uses_the_true_vocabulary(engine: Engine) -> None:
    constant = torch.zeros(2, 16)
    weight = engine.run(constant, torch.tensor([0, 9]), "entropy", vocab_size=10)["weight"]
    torch.testing.assert_close(weight, torch.ones(2))


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_expected_cll_under_the_models_own_distribution_is_zero(engine: Engine, scale: float) -> None:
    vocab = 45
    logits = (torch.randn(1, vocab) * scale).expand(vocab, vocab)
    out = engine.loss(engine.place(logits), engine.place(torch.arange(vocab)), "ce")
    expectation = (out.log_prob.double().exp() * (out.log_prob.double() + out.entropy.double())).sum()
    assert abs(expectation.item()) < 5e-6


UPSTREAM: dict[str, Callable[[], Tensor]] = {
    "expanded scalar, as sum() sends it": lambda: torch.tensor(0.125).expand(3, 2),
    "transposed": lambda: torch.randn(2, 3).t(),
    "slice": lambda: torch.randn(3, 9)[:, 2:4],
    "zeros": lambda: torch.zeros(3, 2),
    "the size of an fp16 loss scale": lambda: torch.rand(3, 2) * 2**16,
}


@pytest.mark.parametrize("kind", UPSTREAM)
def test_upstream_gradient_of_any_layout(engine: Engine, kind: str) -> None:
    logits, labels = make_inputs((3, 2), 33)
    upstream = UPSTREAM[kind]()
    actual = engine.run(logits, labels, upstream=upstream)
    assert_matches(actual, expected_loss(logits, labels, "idft", upstream=upstream))
    if kind == "zeros":
        assert not actual["grad"].any()


# Also a user's function, whose weights have the labels' memory order.
@pytest.mark.parametrize("objective", ["idft", Objective("mine", lambda statistics: statistics.log_prob.exp())])
def test_labels_of_any_layout(engine: Engine, objective: str | Objective) -> None:
    logits, labels = make_inputs((3, 2), 33)
    turned = labels.t().contiguous().t()
    assert_same_bits(engine.run(logits, turned, objective), engine.run(logits, labels, objective))


def test_no_tokens(engine: Engine) -> None:
    for shape in ((0,), (0, 3), (3, 0)):
        actual = engine.run(torch.randn(*shape, 7), torch.zeros(shape, dtype=torch.long))
        assert actual["loss"].shape == shape and actual["grad"].shape == (*shape, 7)


def test_only_the_loss_carries_gradient(engine: Engine) -> None:
    logits, labels = make_inputs((6,), 10)
    out = engine.loss(engine.place(logits).requires_grad_(), engine.place(labels))
    assert isinstance(out, LossOutput)
    assert out.reference_kl is None
    assert [value.requires_grad for value in out[:5]] == [True, False, False, False, False]


def test_weight_gets_no_gradient_even_from_a_differentiable_objective(engine: Engine) -> None:
    logits, labels = make_inputs((9,), 20)
    attached = Objective("attached dft", lambda statistics: statistics.log_prob.exp())
    assert_matches(engine.run(logits, labels, attached), expected_loss(logits, labels, "dft"))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cross_entropy_values_with_the_gradient_of_the_objective(engine: Engine, objective: str) -> None:
    logits, labels = make_inputs((9,), 20)
    leaf = engine.place(logits).requires_grad_()
    out = engine.loss(leaf, engine.place(labels), objective, cross_entropy_values=True)
    assert torch.equal(out.loss, 0.0 - out.log_prob)
    (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
    assert torch.equal(grad.cpu(), engine.run(logits, labels, objective)["grad"])


EXTRA_STATISTICS = ["max_prob", "sum_squared_prob", "argmax"]


@pytest.mark.parametrize(
    "asked", [*([name] for name in EXTRA_STATISTICS), ["sum_squared_prob", "argmax"], EXTRA_STATISTICS]
)
def test_statistics_that_an_objective_asks_for(engine: Engine, asked: list[str]) -> None:
    logits, labels = make_inputs((2, 3), 5000)  # several of the kernels' blocks
    logits[0, 0, 1000:] = logits[0, 0].max() + 1  # a tie within and across blocks: the first counts
    logits[1, :, 4999] = 80.0  # padding, which counts nowhere
    labels[:, 0] = 3  # trained
    labels.clamp_(max=4998)
    probs = logits[..., :4999].double().softmax(-1)
    expected = {"max_prob": probs.amax(-1), "sum_squared_prob": probs.square().sum(-1), "argmax": probs.argmax(-1)}
    seen: dict[str, Tensor | None] = {}

    def weight(statistics: TokenStatistics) -> Tensor:
        seen.update({name: getattr(statistics, name) for name in EXTRA_STATISTICS})
        return torch.ones_like(statistics.log_prob)

    engine.run(logits, labels, Objective("probe", weight, extra_statistics=frozenset(asked)), vocab_size=4999)
    trained = labels >= 0
    assert not trained.all()
    for name, value in seen.items():
        assert (value is not None) == (name in asked), name
        if value is not None:
            wanted = expected[name][trained].to(value.dtype)
            torch.testing.assert_close(value.cpu()[trained], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shards", [2, 4])
def test_extra_statistics_merge_over_shards(engine: Engine, shards: int) -> None:
    logits, labels = make_inputs((3, 2), 96)
    logits[0, :, 30:60] = logits[0].amax() + 1  # a tie within a shard and across shards: the first counts
    labels[labels < 0] = 0
    backend = load_backend(engine.backend)
    seen: dict[str, Tensor] = {}

    def weight(statistics: TokenStatistics) -> Tensor:
        assert statistics.argmax is not None and statistics.sum_squared_prob is not None
        seen.update(argmax=statistics.argmax.cpu(), squares=statistics.sum_squared_prob.cpu())
        return torch.ones_like(statistics.log_prob)

    objective = Objective("probe", weight, extra_statistics=frozenset(["argmax", "sum_squared_prob"]))
    placed, width = engine.place(labels), 96 // shards
    states = [
        backend.shard_state(part, placed, VocabShard(r * width, width, width, None), 96, objective.extra_statistics)
        for r, part in enumerate(engine.place(logits).chunk(shards, -1))
    ]
    backend.token_results(torch.stack(states), placed, objective, 96, False)
    probs = logits.double().softmax(-1)
    assert torch.equal(seen["argmax"], probs.argmax(-1))
    torch.testing.assert_close(seen["squares"], probs.square().sum(-1).float(), rtol=1e-6, atol=1e-7)


def test_an_unknown_extra_statistic_is_refused() -> None:
    with pytest.raises(ValueError, match="may name max_prob, sum_squared_prob, argmax; got median"):
        Objective("probe", lambda statistics: statistics.log_prob, extra_statistics=frozenset(["median"]))


def test_second_derivatives_are_refused(engine: Engine) -> None:
    logits = engine.place(torch.randn(3, 5)).requires_grad_()
    loss = engine.loss(logits, engine.place(torch.tensor([0, 1, 2]))).loss.pow(2).sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_logits_changed_between_forward_and_backward_are_noticed(engine: Engine) -> None:
    logits = engine.place(torch.randn(3, 5)).requires_grad_()
    hidden = logits * 1
    loss = engine.loss(hidden, engine.place(torch.tensor([0, 1, 2]))).loss.sum()
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_invalid_labels_on_the_cpu_are_an_error(engine: Engine) -> None:
    labels = torch.tensor([[0, 7, -100], [9, 6, 12]])
    with pytest.raises(ValueError, match="3 of 6 labels are >= vocab_size 7, the first being 7"):
        vocab_parallel_loss(torch.randn(2, 3, 10), labels, vocab_size=7)
    with pytest.raises(ValueError, match="1 of 6 labels are >= vocab_size 10, the first being 12"):
        vocab_parallel_loss(torch.randn(2, 3, 10), labels)


def test_invalid_labels_elsewhere_are_counted_and_ignored(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "reject_invalid_labels", lambda labels, vocab_size: None)  # as on a GPU
    monkeypatch.setattr(triton_backend, "_MERGE_TOKENS", 32)  # several programs count
    logits, labels = torch.randn(2, 20, 9), torch.randint(-1, 9, (2, 20))
    labels[1, ::3] = 2**40
    actual = engine.run(logits, labels, vocab_size=7)
    assert actual["invalid_labels"].item() == (labels >= 7).sum() and actual["invalid_labels"].dtype == torch.int64
    assert_same_bits(
        {**actual, "invalid_labels": torch.tensor(0)},
        engine.run(logits, torch.where(labels >= 7, -100, labels), vocab_size=7),
    )


def test_the_largest_valid_label_is_valid(engine: Engine) -> None:
    out = engine.loss(engine.place(torch.zeros(1, 8)), engine.place(torch.tensor([6])), "ce", vocab_size=7)
    assert out.loss.item() == pytest.approx(math.log(7)) and out.invalid_labels == 0


@pytest.mark.parametrize(
    "logits,labels,arguments,error,message",
    [
        (
            torch.randn(4, 2, 9),
            torch.zeros(2, 4).long(),
            {},
            ValueError,
            r"leading shape \(4, 2\).*transpose the labels",
        ),
        (torch.randn(4, 9), torch.zeros(4), {}, TypeError, "labels must be int64"),
        (torch.randn(4, 9).double(), torch.zeros(4).long(), {}, TypeError, "got torch.float64"),
        (torch.zeros(4, 9).long(), torch.zeros(4).long(), {}, TypeError, "logits must be"),
        (torch.randn(4, 0), torch.zeros(4).long(), {}, ValueError, "at least one column"),
        (torch.tensor(1.0), torch.tensor(0), {}, ValueError, "at least one column"),
        (torch.randn(4, 9), torch.zeros(4).long(), {"vocab_size": 10}, ValueError, r"vocab_size must lie in \(0, 9\]"),
        (torch.randn(4, 9), torch.zeros(4).long(), {"vocab_size": 0}, ValueError, "got 0"),
        (torch.randn(4, 9), torch.zeros(4, device="meta").long(), {}, ValueError, "device"),
        (torch.randn(4, 9), torch.zeros(4).long(), {"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
        (torch.randn(4, 9), torch.zeros(4).long(), {"objective": "sft"}, ValueError, "unknown objective 'sft'"),
    ],
)
def test_arguments_that_do_not_fit(
    engine: Engine, logits: Tensor, labels: Tensor, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vocab_parallel_loss(logits, labels, **arguments)  # type: ignore[arg-type]


def test_resolve_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_backend("auto", torch.device("cpu")) == "reference"
    assert resolve_backend("reference", "cuda") == "reference"
    assert resolve_backend("auto", "cuda") == "triton" == resolve_backend("triton", "cuda")
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs logits on a CUDA device, got cpu; use backend='auto'"):
        resolve_backend("triton", "cpu")
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    assert resolve_backend("auto", "cuda") == "reference"
    with pytest.raises(ValueError, match="pip install triton"):
        resolve_backend("triton", "cuda")


def test_oracle_disagrees_with_a_wrong_result(engine: Engine) -> None:
    logits, labels = make_inputs((6,), 10)
    actual, expected = engine.run(logits, labels), expected_loss(logits, labels, "idft")
    for name in Expected._fields:
        wrong = {**actual, name: actual[name] * 1.001}
        with pytest.raises(AssertionError):
            assert_matches(wrong, expected)
