import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_idft import LossOutput, Objective, dft, idft, resolve_objective, vocab_parallel_loss
from megatron_idft.loss import _ignore_invalid, reference, resolve_backend
from tests.loss.intermediate import as_intermediate, bits
from tests.loss.oracle import Expected, assert_matches, expected_loss

OBJECTIVES = ["ce", "dft", "idft", "entropy"]
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


def run(
    logits: Tensor,
    labels: Tensor,
    objective: str | Objective = "idft",
    vocab_size: int | None = None,
    upstream: Tensor | None = None,
) -> dict[str, Tensor]:
    """Outputs and the gradient with respect to `logits`, found to be the same when it overwrites them."""
    leaf = logits.detach().requires_grad_()
    copying = loss_and_grad(leaf, labels, objective, vocab_size, upstream, overwrite_logits=False)
    if 0 not in logits.stride():  # expanded logits cannot be overwritten
        intermediate = as_intermediate(leaf)
        overwriting = loss_and_grad(intermediate, labels, objective, vocab_size, upstream, overwrite_logits=True)
        assert overwriting["grad"].data_ptr() == intermediate.data_ptr()
        assert overwriting["grad"].stride() == logits.stride()
        for name, value in copying.items():
            assert torch.equal(bits(overwriting[name]), bits(value)), name
    return copying


def loss_and_grad(
    logits: Tensor,
    labels: Tensor,
    objective: str | Objective,
    vocab_size: int | None,
    upstream: Tensor | None,
    overwrite_logits: bool,
) -> dict[str, Tensor]:
    out = vocab_parallel_loss(
        logits, labels, objective, vocab_size=vocab_size, backend="reference", overwrite_logits=overwrite_logits
    )
    (grad,) = torch.autograd.grad(out.loss, logits, torch.ones_like(out.loss) if upstream is None else upstream)
    return {**{name: value.detach() for name, value in out._asdict().items()}, "grad": grad}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# V: 2 is the least with a choice, 97 no multiple of anything, 1024 a power of two, 5003 several SIMD strips and a rest.
@pytest.mark.parametrize("vocab", [2, 97, 1024, 5003])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_values_and_gradient(objective: str, dtype: torch.dtype, vocab: int) -> None:
    logits, labels = make_inputs((24,), vocab, dtype)
    upstream = torch.randn(24, generator=torch.Generator().manual_seed(1))
    actual = run(logits, labels, objective, upstream=upstream)
    assert actual["grad"].dtype == dtype
    assert_matches(actual, expected_loss(logits, labels, objective, upstream=upstream))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_the_rounded_float64_gradient(dtype: torch.dtype) -> None:
    # One rounding of a value good to ~1e-6 differs from the rounded float64 value only where it lies that close to a
    # tie: 1e-6 of an ulp of 2^-8 (bf16) or 2^-11 (fp16), so in far less than 1 % of the elements. A gradient built from
    # bf16 pieces, or scaled after being stored, differs in a third of them.
    logits, labels = make_inputs((64,), 2000, dtype)
    upstream = torch.rand(64) + 0.5
    exact = expected_loss(logits, labels, "idft", upstream=upstream).grad
    grad = run(logits, labels, "idft", upstream=upstream)["grad"]
    representable = exact.abs() >= torch.finfo(dtype).tiny
    differs = (grad != exact.to(dtype)) & representable
    assert differs.sum() < 0.005 * representable.sum()


@pytest.mark.parametrize("gamma_lambda", [0.0, 0.5, 1.0])
def test_lambda(gamma_lambda: float) -> None:
    logits, labels = make_inputs((24,), 97)
    actual = run(logits, labels, idft(gamma_lambda=torch.tensor(gamma_lambda)))
    assert_matches(actual, expected_loss(logits, labels, "idft", gamma_lambda=gamma_lambda))
    if gamma_lambda == 0.0:
        assert_same_bits(actual, run(logits, labels, dft()))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weight_floor_and_exempt_tokens(objective: str) -> None:
    logits, labels = make_inputs((48,), 10)
    modified = resolve_objective(objective, weight_floor=0.25, exempt_token_ids=[3, 7])
    assert ((labels == 3) | (labels == 7)).any()
    assert_matches(
        run(logits, labels, modified), expected_loss(logits, labels, objective, weight_floor=0.25, exempt=(3, 7))
    )


# Megatron's logits are [s, b, V/tp]; each view below is one a caller may hold without owning a contiguous copy.
VIEWS: dict[str, Callable[[], Tensor]] = {
    "transposed [s, b, V] -> [b, s, V]": lambda: torch.randn(7, 3, 41).transpose(0, 1),
    "columns of a wider tensor": lambda: torch.randn(5, 4, 64)[..., 3:44],
    "every other row": lambda: torch.randn(10, 41)[::2],
    "part of the batch": lambda: torch.randn(6, 5, 41)[:, 1:3],
    "vocabulary-major": lambda: torch.randn(41, 9).t(),
    "expanded": lambda: torch.randn(1, 3, 41).expand(4, 3, 41),
    "permuted 3 leading dimensions": lambda: torch.randn(2, 3, 4, 41).permute(2, 0, 1, 3),
    "single row without leading dimensions": lambda: torch.randn(41),
}


@pytest.mark.parametrize(
    "max_rows", [1, 2, 5, 10**6]
)  # within the last dimension, across dimensions, everything at once
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides_in_any_block_size(view: str, max_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = VIEWS[view]()
    labels = torch.randint(-2, 41, logits.shape[:-1])
    expected = run(logits.contiguous(), labels)
    monkeypatch.setattr(reference, "_max_rows", lambda columns: max_rows)
    assert_same_bits(run(logits, labels), expected)
    assert_same_bits(run(logits.bfloat16(), labels), run(logits.bfloat16().contiguous(), labels))


def test_gradient_reaches_the_base_of_a_view() -> None:
    base = torch.randn(6, 5, 20, requires_grad=True)
    labels = torch.randint(0, 15, (5, 6))
    vocab_parallel_loss(base[..., 2:17].transpose(0, 1), labels).loss.sum().backward()
    expected = run(base.detach()[..., 2:17].transpose(0, 1).contiguous(), labels)["grad"]
    assert base.grad is not None
    assert torch.equal(base.grad[..., 2:17], expected.transpose(0, 1))
    assert not base.grad[..., :2].any() and not base.grad[..., 17:].any()


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_generated_shapes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=3), label="shape"))
    vocab = data.draw(st.integers(1, 70), label="V")
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
    actual = run(logits, labels, objective, vocab_size, upstream)
    assert_matches(actual, expected_loss(logits, labels, objective, vocab_size, upstream))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_ignored_rows_may_hold_anything(poison: float, dtype: torch.dtype) -> None:
    logits, labels = make_inputs((8, 4), 50, dtype)
    ignored = labels < 0
    assert ignored.any() and not ignored.all()
    poisoned = torch.where(ignored.unsqueeze(-1), poison, logits)
    one_cell = logits.clone()
    one_cell[..., 7] = torch.where(ignored, poison, logits[..., 7])
    clean = run(logits, labels)
    # NaN upstream at an ignored position: the same poison, arriving from the other side.
    upstream = torch.where(ignored, torch.nan, 1.0)
    for actual in (run(poisoned, labels), run(one_cell, labels), run(poisoned, labels, upstream=upstream)):
        assert_same_bits(actual, clean)
        for name in ("loss", "weight", "log_prob", "entropy", "grad"):
            assert (actual[name][ignored] == 0).all(), name


@pytest.mark.parametrize("label", [-1, -100, -(2**40)])
def test_every_negative_label_is_ignored(label: int) -> None:
    actual = run(torch.randn(3, 5), torch.tensor([2, label, 0]))
    assert actual["loss"][1] == 0 and (actual["grad"][1] == 0).all() and (actual["loss"][[0, 2]] > 0).all()


def test_all_labels_ignored() -> None:
    actual = run(torch.full((4, 6), math.nan), torch.full((4,), -100))
    assert not any(actual[name].any() for name in ("loss", "weight", "log_prob", "entropy", "grad"))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_trained_row_is_nan_and_harms_no_other(poison: float) -> None:
    logits = torch.randn(3, 9)
    logits[1, 4] = poison
    actual = run(logits, torch.tensor([1, 2, 3]), "ce")
    assert actual["loss"][1].isnan() and actual["grad"][1].isnan().any()
    assert actual["loss"][[0, 2]].isfinite().all() and actual["grad"][[0, 2]].isfinite().all()


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
@pytest.mark.parametrize("label", [0, 4])  # the likely token, and one that may be hopeless
@pytest.mark.parametrize("name", [name for name in extreme_rows() if name != "one finite column"])
def test_extreme_rows(name: str, label: int, objective: str) -> None:
    logits = extreme_rows()[name].repeat(2, 1)
    labels = torch.tensor([label, label])
    actual = run(logits, labels, objective)
    assert all(value.isfinite().all() for value in actual.values())
    assert_matches(actual, expected_loss(logits, labels, objective))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_target_of_probability_zero_is_finite(objective: str) -> None:
    logits = torch.stack([extreme_rows()["-inf columns"], extreme_rows()["one finite column"]])
    actual = run(logits, torch.tensor([15, 15]), objective)
    assert all(value.isfinite().all() for value in actual.values())
    assert (actual["log_prob"] <= -1e29).all()
    if objective in ("dft", "idft"):
        assert not actual["weight"].any() and not actual["loss"].any() and not actual["grad"].any()
    if objective == "ce":  # softmax - onehot, as for any other target
        assert (actual["grad"][:, 15] == -1).all()
        torch.testing.assert_close(actual["grad"].sum(-1), torch.zeros(2), atol=1e-6, rtol=0)


def test_padding_columns_count_nowhere() -> None:
    # 101 true columns padded to 128, as Megatron does, with padding that would dominate every sum.
    logits, labels = make_inputs((4, 5), 101)
    padded = torch.nn.functional.pad(logits, (0, 27), value=50.0)
    padded[..., -1] = math.nan
    actual, plain = run(padded, labels, vocab_size=101), run(logits, labels)
    assert (actual["grad"][..., 101:] == 0).all()
    actual["grad"] = actual["grad"][..., :101]
    for name in plain:
        torch.testing.assert_close(actual[name], plain[name], rtol=0, atol=1e-7)


def test_entropy_weight_uses_the_true_vocabulary() -> None:
    constant = torch.zeros(2, 16)
    weight = run(constant, torch.tensor([0, 9]), "entropy", vocab_size=10)["weight"]
    torch.testing.assert_close(weight, torch.ones(2))


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_expected_cll_under_the_models_own_distribution_is_zero(scale: float) -> None:
    vocab = 300
    logits = (torch.randn(1, vocab) * scale).expand(vocab, vocab)
    out = vocab_parallel_loss(logits, torch.arange(vocab), "ce")
    expectation = (out.log_prob.double().exp() * (out.log_prob.double() + out.entropy.double())).sum()
    assert abs(expectation.item()) < 5e-6


UPSTREAM: dict[str, Callable[[], Tensor]] = {
    "expanded scalar, as sum() sends it": lambda: torch.tensor(0.125).expand(6, 5),
    "transposed": lambda: torch.randn(5, 6).t(),
    "slice": lambda: torch.randn(6, 9)[:, 2:7],
    "zeros": lambda: torch.zeros(6, 5),
    "the size of an fp16 loss scale": lambda: torch.rand(6, 5) * 2**16,
}


@pytest.mark.parametrize("kind", UPSTREAM)
def test_upstream_gradient_of_any_layout(kind: str) -> None:
    logits, labels = make_inputs((6, 5), 33)
    upstream = UPSTREAM[kind]()
    actual = run(logits, labels, upstream=upstream)
    assert_matches(actual, expected_loss(logits, labels, "idft", upstream=upstream))
    if kind == "zeros":
        assert not actual["grad"].any()


def test_labels_of_any_layout() -> None:
    logits, labels = make_inputs((6, 5), 33)
    assert_same_bits(run(logits, labels.t().contiguous().t()), run(logits, labels))


def test_no_tokens() -> None:
    for shape in ((0,), (0, 3), (3, 0)):
        actual = run(torch.randn(*shape, 7), torch.zeros(shape, dtype=torch.long))
        assert actual["loss"].shape == shape and actual["grad"].shape == (*shape, 7)


def test_only_the_loss_carries_gradient() -> None:
    logits, labels = make_inputs((6,), 10)
    out = vocab_parallel_loss(logits.requires_grad_(), labels)
    assert isinstance(out, LossOutput)
    assert [value.requires_grad for value in out] == [True, False, False, False, False]


def test_weight_gets_no_gradient_even_from_a_differentiable_objective() -> None:
    logits, labels = make_inputs((24,), 20)
    attached = Objective("attached dft", lambda statistics: statistics.log_prob.exp())
    assert_same_bits(run(logits, labels, attached), run(logits, labels, "dft"))


def test_second_derivatives_are_refused() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    loss = vocab_parallel_loss(logits, torch.tensor([0, 1, 2])).loss.pow(2).sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_logits_changed_between_forward_and_backward_are_noticed() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    hidden = logits * 1
    loss = vocab_parallel_loss(hidden, torch.tensor([0, 1, 2])).loss.sum()
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, by dtype, other than views of `known`."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}
        self.known = known.data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() != self.known:
                self.elements[value.dtype] = max(self.elements.get(value.dtype, 0), value.numel())
        return result


@pytest.mark.parametrize("overwrite_logits", [False, True])
def test_no_tensor_but_the_gradient_has_the_size_of_the_logits(
    overwrite_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_max_rows", lambda columns: 4)
    logits = as_intermediate(torch.randn(16, 8, 50).bfloat16().transpose(0, 1).requires_grad_())
    labels = torch.zeros(8, 16).long()
    with LargestTensor(logits) as largest:
        loss = vocab_parallel_loss(logits, labels, vocab_size=40, overwrite_logits=overwrite_logits).loss.sum()
        torch.autograd.grad(loss, logits)
    if overwrite_logits:
        assert largest.elements[torch.bfloat16] <= labels.numel()  # the target logits
    else:
        assert largest.elements[torch.bfloat16] == logits.numel()
    others = {dtype: elements for dtype, elements in largest.elements.items() if dtype != torch.bfloat16}
    assert max(others.values()) <= max(4 * 50, 4 * labels.numel())  # a block, or the packed state


def test_no_host_synchronisation_on_a_gpu() -> None:
    # Meta tensors take the same path and have no values: reading one on the host, or a shape that depends on values,
    # raises.
    with pytest.raises(NotImplementedError):
        torch.empty(3, device="meta")[torch.empty(3, dtype=torch.bool, device="meta")]
    logits = torch.empty(6, 2, 50, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels = torch.empty(6, 2, dtype=torch.int64, device="meta")
    objective = idft(gamma_lambda=torch.empty((), device="meta")).with_weight_floor(0.1).with_exempt_tokens([2])
    out = vocab_parallel_loss(logits, labels, objective, vocab_size=45)
    out.loss.sum().backward()
    assert logits.grad is not None and logits.grad.shape == logits.shape
    assert out.invalid_labels.shape == () and out.invalid_labels.dtype == torch.int64


def test_invalid_labels_on_the_cpu_are_an_error() -> None:
    labels = torch.tensor([[0, 7, -100], [9, 6, 12]])
    with pytest.raises(ValueError, match="3 of 6 labels are >= vocab_size 7, the first being 7"):
        vocab_parallel_loss(torch.randn(2, 3, 10), labels, vocab_size=7)
    with pytest.raises(ValueError, match="1 of 6 labels are >= vocab_size 10, the first being 12"):
        vocab_parallel_loss(torch.randn(2, 3, 10), labels)


def test_invalid_labels_elsewhere_are_counted_and_ignored() -> None:
    labels = torch.tensor([0, 7, -5, 9, 6], device="cpu")
    kept, count = _ignore_invalid(labels, vocab_size=7)
    assert count.item() == 2 and count.dtype == torch.int64
    assert (kept >= 0).tolist() == [True, False, False, False, True]
    assert torch.equal(kept[[0, 2, 4]], labels[[0, 2, 4]])


def test_the_largest_valid_label_is_valid() -> None:
    out = vocab_parallel_loss(torch.zeros(1, 8), torch.tensor([6]), "ce", vocab_size=7)
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
        (torch.randn(4, 9), torch.zeros(4).long(), {"backend": "triton"}, ValueError, "no Triton backend.*'reference'"),
        (torch.randn(4, 9), torch.zeros(4).long(), {"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
        (torch.randn(4, 9), torch.zeros(4).long(), {"objective": "sft"}, ValueError, "unknown objective 'sft'"),
    ],
)
def test_arguments_that_do_not_fit(
    logits: Tensor, labels: Tensor, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vocab_parallel_loss(logits, labels, **arguments)  # type: ignore[arg-type]


def test_resolve_backend() -> None:
    assert resolve_backend("auto", torch.device("cpu")) == "reference"
    assert resolve_backend("reference") == "reference"


def test_oracle_disagrees_with_a_wrong_result() -> None:
    logits, labels = make_inputs((6,), 10)
    actual, expected = run(logits, labels), expected_loss(logits, labels, "idft")
    for name in Expected._fields:
        wrong = {**actual, name: actual[name] * 1.001}
        with pytest.raises(AssertionError):
            assert_matches(wrong, expected)
