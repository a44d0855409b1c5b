"""The output head fused with the loss, against float64 and the materialised head."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_idft import LossOutput, Reference, UpstreamWatch, vocab_parallel_linear_loss, vocab_parallel_loss
from megatron_idft.loss.linear import default_chunk_tokens, passes, products
from megatron_idft.loss.linear.autograd import LinearLoss
from megatron_idft.loss.linear.tokens import block_tokens, even_chunk
from tests.loss.engines import REFERENCE, Engine
from tests.loss.linear_cases import LinearCase, assert_close, expected_linear, make_linear_case
from tests.loss.oracle import objective_of, reads_reference, reference_of
from tests.loss.test_top_k import OBJECTIVES as TOP_K
from tests.loss.test_top_k import make_case
from tests.loss.test_vocab_parallel_loss import DTYPES, OBJECTIVES
from tools.benchmarks.memory_probe import StorageCounter


def loss_of(
    case: LinearCase, leaves: list[Tensor], objective: str = "idft", engine: Engine = REFERENCE, **settings: Any
) -> LossOutput:
    hidden, weight, *bias = leaves
    settings = {"backend": engine.backend, "bias": bias[0] if bias else None, **case.settings(), **settings}
    if reads_reference(objective):
        of_labels = reference_of(case.labels.cpu())[:2]
        settings["reference"] = Reference(*(value.to(engine.device) for value in of_labels))
    return vocab_parallel_linear_loss(hidden, weight, case.labels, objective_of(objective), **settings)


def check_gradients(case: LinearCase, leaves: list[Tensor], objective: str, upstream: Tensor) -> None:
    expected = expected_linear(case.on("cpu"), objective, upstream.cpu())
    for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=False):
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        assert_close(name, leaf.grad.cpu(), getattr(expected, name), case.hidden.dtype)


# Every objective, each with another dtype, chunk and way to the gradients.
CASES = [(objective, DTYPES[i % 3], (None, 5, 1, 21)[i % 4], i % 5 < 3) for i, objective in enumerate(OBJECTIVES)]


@pytest.mark.parametrize("compacted", [True, False])
@pytest.mark.parametrize("objective,dtype,chunk,in_forward", CASES)
def test_values_and_gradients(
    engine: Engine, objective: str, dtype: torch.dtype, chunk: int | None, in_forward: bool, compacted: bool
) -> None:
    case = make_linear_case(dtype=dtype, bias=chunk == 5, logit_scale=0.5 if chunk == 1 else 1.0).on(engine.device)
    leaves, upstream = case.leaves(), case.loss_mask * 3.0  # another common factor than loss_scale says
    count = case.num_trained if compacted else None
    out = loss_of(
        case, leaves, objective, engine, chunk_tokens=chunk, gradients_in_forward=in_forward, num_trained=count
    )
    (out.loss * upstream).sum().backward()
    expected = expected_linear(case.on("cpu"), objective, upstream.cpu())
    for name in ("loss", "weight", "log_prob", "entropy"):
        actual, wanted = getattr(out, name).cpu(), getattr(expected.values, name)
        assert actual.dtype == torch.float32 and (actual[case.labels.cpu() < 0] == 0).all()
        torch.testing.assert_close(actual.double(), wanted, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    check_gradients(case, leaves, objective, upstream)


@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("in_forward", [True, False])
def test_terms_of_the_top_k_are_those_of_the_materialised_head(engine: Engine, name: str, in_forward: bool) -> None:
    given = make_case((5, 3), 47, 40, 4)
    hidden = torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(1)).to(engine.device)
    weight = torch.randn(47, 12, generator=torch.Generator().manual_seed(2)).to(engine.device)
    labels, mask = given.labels.to(engine.device), given.upstream.to(engine.device)
    reference = Reference(*(None if value is None else value.to(engine.device) for value in given.reference))
    settings: dict[str, Any] = {"vocab_size": 40, "backend": engine.backend, "reference": reference}
    found = []
    for fused in (True, False):
        ours, rows = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            fused_only = {"chunk_tokens": 4, "gradients_in_forward": in_forward, "loss_mask": mask}
            count = int((labels >= 0).sum())
            out = vocab_parallel_linear_loss(
                ours, rows, labels, TOP_K[name], num_trained=count, **fused_only, **settings
            )
        else:
            out = vocab_parallel_loss(ours @ rows.T, labels, TOP_K[name], **settings)
        (out.loss * mask).sum().backward()
        found.append((out.loss.detach(), out.weight, out.reference_kl, ours.grad, rows.grad))
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=2e-5)


def test_values_alone_need_no_gradient_buffers_and_stay_the_same() -> None:
    case = make_linear_case()
    with torch.no_grad():
        alone = loss_of(case, case.leaves())
    trained = loss_of(case, case.leaves())
    for ours, theirs in zip(alone[:4], trained[:4], strict=True):
        assert torch.equal(ours, theirs.detach()) and not ours.requires_grad
    values = loss_of(case, case.leaves(), cross_entropy_values=True)
    assert torch.equal(values.loss.detach(), -trained.log_prob)


def test_chunks_and_compaction_keep_the_bits_of_the_values() -> None:
    """Sums over chunks round differently in the gradients only."""
    case = make_linear_case((64,), trained=0.5)
    whole = loss_of(case, case.leaves())
    for chunk, count in ((7, None), (64, case.num_trained), (16, case.num_trained + 5), (16, 10**6)):
        parts = loss_of(case, case.leaves(), chunk_tokens=chunk, num_trained=count)
        for ours, theirs in zip(parts[:4], whole[:4], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("in_forward", [True, False])
@pytest.mark.parametrize("count", [None, 0])
def test_nothing_trained_gives_nothing(in_forward: bool, count: int | None) -> None:
    case = make_linear_case(trained=0.0)
    leaves = case.leaves()
    out = loss_of(case, leaves, gradients_in_forward=in_forward, num_trained=count)
    (out.loss * case.loss_mask).sum().backward()
    assert all((value == 0).all() for value in out[:5])
    assert all(leaf.grad is not None and (leaf.grad == 0).all() for leaf in leaves)


def test_compaction_does_not_look_at_what_is_ignored() -> None:
    case = make_linear_case()
    hidden = torch.where((case.labels < 0).unsqueeze(-1), torch.nan, case.hidden)
    poisoned = case._replace(hidden=hidden)
    leaves = poisoned.leaves()
    out = loss_of(poisoned, leaves, num_trained=case.num_trained)
    (out.loss * case.loss_mask).sum().backward()
    check_gradients(case, leaves, "idft", case.loss_mask)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("in_forward", [True, False])
def test_what_is_frozen_costs_no_product(frozen: str, in_forward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_linear_case()
    hidden, weight = case.leaves()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    calls: list[str] = []
    add, mm = passes.add_weight_gradient, torch.mm
    monkeypatch.setattr(passes, "add_weight_gradient", lambda *given: (calls.append("dW"), add(*given)))
    monkeypatch.setattr(torch, "mm", lambda *given, **more: (calls.append("mm"), mm(*given, **more))[1])
    out = loss_of(case, [hidden, weight], gradients_in_forward=in_forward)
    (out.loss * case.loss_mask).sum().backward()
    logits = 1 if in_forward else 2
    assert calls.count("dW") == (frozen == "hidden") and calls.count("mm") == logits + (frozen == "weight")
    expected = expected_linear(case, "idft", case.loss_mask)
    for leaf, name in ((hidden, "hidden"), (weight, "weight")):
        if name == frozen:
            assert leaf.grad is None
        else:
            assert leaf.grad is not None
            assert_close(name, leaf.grad, getattr(expected, name), torch.float32)


# ------------------------------------------------------------------------------------------------ upstream gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False], ids=["main_grad", "autograd"])
@pytest.mark.parametrize(("count", "size"), [(None, 1.0), ("trained", 1e-3)])
def test_an_unexpected_upstream_gradient_is_made_good(
    dtype: torch.dtype, fused: bool, count: str | None, size: float
) -> None:
    """Also one that is far smaller: nothing of the roundings of what forward has computed may stay."""
    case = make_linear_case(dtype=dtype)
    leaves, watch = case.leaves(), UpstreamWatch()
    leaves[1].main_grad = torch.zeros(case.weight.shape)  # type: ignore[attr-defined]
    upstream = size * torch.randn(case.labels.shape, generator=torch.Generator().manual_seed(3))
    num = case.num_trained if count else None
    out = loss_of(case, leaves, watch=watch, fuse_wgrad_accumulation=fused, num_trained=num)
    (out.loss * upstream).sum().backward()
    assert watch.fitted is False and (watch.forwards, watch.backwards) == (1, 1)
    expected = expected_linear(case, "idft", upstream)
    assert leaves[0].grad is not None
    assert_close("hidden", leaves[0].grad, expected.hidden, dtype)
    of_weight = leaves[1].main_grad if fused else leaves[1].grad  # type: ignore[attr-defined]
    if not fused:
        assert_close("weight", of_weight, expected.weight, dtype)
        return
    error = (of_weight.double() - expected.weight).norm() / expected.weight.norm()
    assert error <= (8e-3 if dtype == torch.bfloat16 else 2e-6 / size), "fp32 sums were added and taken back"


@pytest.mark.parametrize("wrong", ["one token", "a common factor, where main_grad has the sum already"])
def test_a_misfit_on_the_device_is_counted_and_poisons(wrong: str) -> None:
    case, watch = make_linear_case(), UpstreamWatch(on_host=False, misfits=torch.zeros((), dtype=torch.int32))
    assert watch.misfits is not None
    for upstream, misfits in ((case.loss_mask, 0), (case.loss_mask * 1.0000001, 0), (None, 1)):
        leaves = case.leaves()
        leaves[1].main_grad = torch.zeros(case.weight.shape)  # type: ignore[attr-defined]
        if upstream is None:
            upstream = case.loss_mask.clone()
            if wrong == "one token":
                upstream.view(-1)[(case.labels >= 0).view(-1).nonzero()[1, 0]] *= 1.01
            else:
                upstream *= 2
        out = loss_of(case, leaves, watch=watch, fuse_wgrad_accumulation=True)
        (out.loss * upstream).sum().backward()
        assert watch.misfits.item() == misfits
        assert leaves[0].grad is not None
        assert bool(leaves[0].grad.isnan().any()) == bool(leaves[1].main_grad.isnan().any()) == bool(misfits)  # type: ignore[attr-defined]


def test_gradients_of_micro_batches_add_up_in_main_grad() -> None:
    case = make_linear_case()
    weight = case.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    scale = torch.tensor(4.0)
    for in_forward in (True, False):
        hidden = case.hidden.clone().requires_grad_()
        out = loss_of(
            case,
            [hidden, weight],
            fuse_wgrad_accumulation=True,
            gradients_in_forward=in_forward,
            loss_scale=scale,
            chunk_tokens=6,
        )
        ((out.loss * case.loss_mask).sum() * scale).backward()
        assert weight.grad_added_to_main_grad is True  # type: ignore[attr-defined]
        assert weight.grad is not None and weight.grad._nnz() == 0  # what the data-parallel hooks are called with
        weight.grad = None
    expected = expected_linear(case, "idft", case.loss_mask * 4)
    assert_close("weight", weight.main_grad, 2 * expected.weight, torch.float32)  # type: ignore[attr-defined]


def test_a_weight_of_embedding_and_head_gets_both_gradients() -> None:
    case = make_linear_case()
    weight, ids = case.weight.clone().requires_grad_(), torch.arange(9)
    weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    hidden = case.hidden.clone() + torch.nn.functional.embedding(ids, weight).sum()
    out = loss_of(case, [hidden, weight], fuse_wgrad_accumulation=True)
    (out.loss * case.loss_mask).sum().backward()
    plain = case.weight.clone().requires_grad_()
    of_plain = case.hidden.clone() + torch.nn.functional.embedding(ids, plain).sum()
    logits = of_plain @ plain.T
    expected = vocab_parallel_loss(logits, case.labels, vocab_size=case.vocab).loss
    (expected * case.loss_mask).sum().backward()
    assert weight.grad is not None and plain.grad is not None
    torch.testing.assert_close(weight.main_grad + weight.grad, plain.grad, rtol=1e-4, atol=1e-4)  # type: ignore[attr-defined]


def test_a_second_backward_is_refused() -> None:
    case = make_linear_case()
    loss = loss_of(case, case.leaves()).loss.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        loss.backward()


# --------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "dtype,parts,in_forward", [(torch.float32, 8, True), (torch.float32, 8, False), (torch.bfloat16, 5, True)]
)
def test_memory_of_a_step(dtype: torch.dtype, parts: int, in_forward: bool) -> None:
    """The buffers of a chunk and of the backend, far from [T, V/tp]; in 16 bits also a block in fp32."""
    tokens, width, vocab = 4096, 8, 32000
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    labels = torch.randint(0, vocab, (tokens,))
    known = {value.untyped_storage()._cdata: value.untyped_storage() for value in (hidden, weight, labels)}
    with StorageCounter(vocab, known) as counter:
        out = vocab_parallel_linear_loss(
            hidden, weight, labels, fuse_wgrad_accumulation=True, gradients_in_forward=in_forward, backend="reference"
        )
        out.loss.sum().backward()
    logits = tokens * vocab * hidden.element_size()
    assert counter.peak < logits / parts, f"{counter.peak / logits:.3f} of the logits"


@pytest.mark.parametrize("in_forward", [True, False])
def test_main_grad_spares_a_tensor_of_the_weights_size(in_forward: bool) -> None:
    hidden, weight = torch.randn(8, 512, requires_grad=True), torch.randn(1000, 512, requires_grad=True)
    weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    settings: dict[str, Any] = {"gradients_in_forward": in_forward, "fuse_wgrad_accumulation": True}
    known = {value.untyped_storage()._cdata: value.untyped_storage() for value in (hidden, weight, weight.main_grad)}  # type: ignore[attr-defined]
    with StorageCounter(1000, known) as counter:
        out = vocab_parallel_linear_loss(hidden, weight, torch.arange(8), backend="reference", **settings)
        out.loss.sum().backward()
    assert counter.peak < weight.nbytes / 4, f"{counter.peak / weight.nbytes:.2f} of the weight"


def test_chunks_follow_the_shape() -> None:
    assert [default_chunk_tokens(tokens) for tokens in (100, 2048, 8192, 32768, 10**6)] == [100, 1024, 1024, 4096, 4096]
    assert [default_chunk_tokens(tokens, "cpu") for tokens in (100, 1000, 4096, 10**6)] == [100, 128, 256, 1024]
    assert [even_chunk(tokens, 4096) for tokens in (4096, 4097, 9000, 12289)] == [4096, 2176, 3072, 3200]
    assert even_chunk(21, 5) == 5 and even_chunk(0, 5) == 1
    assert [block_tokens(4096, columns) for columns in (152064, 19008, 10**7)] == [384, 1024, 256]
    assert [block_tokens(chunk, 32000) for chunk in (1, 64, 256, 300, 1024)] == [1, 64, 64, 128, 256]


# --------------------------------------------------------------------------------------------------------- devices


def test_no_host_synchronisation_on_a_gpu() -> None:
    """As in test_reference.py: meta tensors have no values to look at."""
    hidden = torch.empty(64, 2, 16, device="meta", requires_grad=True)
    weight = torch.empty(50, 16, device="meta", requires_grad=True)
    weight.main_grad = torch.empty(50, 16, device="meta")  # type: ignore[attr-defined]
    labels = torch.empty(64, 2, dtype=torch.int64, device="meta")
    watch = UpstreamWatch(on_host=False, misfits=torch.empty((), dtype=torch.int32, device="meta"))
    mask, scale = torch.empty(64, 2, device="meta"), torch.empty((), device="meta")
    for fused in (True, False):
        out = vocab_parallel_linear_loss(
            hidden,
            weight,
            labels,
            vocab_size=45,
            num_trained=30,
            chunk_tokens=8,
            loss_mask=mask,
            loss_scale=scale,
            watch=watch,
            fuse_wgrad_accumulation=fused,
        )
        (out.loss * mask).sum().backward()
        assert hidden.grad is not None and hidden.grad.shape == hidden.shape


@pytest.mark.gpu
def test_no_host_synchronisation_and_cuda_graph() -> None:
    case = make_linear_case((64, 2), 64, 4096, 4000, torch.bfloat16).on("cuda")
    hidden, weight = case.leaves()
    weight.main_grad = torch.zeros(weight.shape, device="cuda")  # type: ignore[attr-defined]
    watch = UpstreamWatch(on_host=False, misfits=torch.zeros((), dtype=torch.int32, device="cuda"))
    count = case.num_trained

    def step() -> tuple[Tensor, Tensor]:
        weight.main_grad.zero_()  # type: ignore[attr-defined]
        settings = {"num_trained": count, "chunk_tokens": 32, "fuse_wgrad_accumulation": True, "watch": watch}
        out = vocab_parallel_linear_loss(
            hidden, weight, case.labels, loss_mask=case.loss_mask, vocab_size=4000, **settings
        )
        (of_hidden,) = torch.autograd.grad((out.loss * case.loss_mask).sum(), hidden)
        return of_hidden, weight.main_grad.clone()  # type: ignore[attr-defined]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)


def test_a_product_is_trusted_only_if_it_is_right() -> None:
    right = products._in_fp32

    def overwrites(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        total.copy_(gradient.t().float() @ hidden.float())

    def turns(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        right(total, hidden, gradient)

    def rounds(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        total += gradient.t() @ hidden

    for dtype in (torch.bfloat16, torch.float16):
        assert products._is_right(right, "cpu", dtype)
        assert not any(products._is_right(wrong, "cpu", dtype) for wrong in (overwrites, turns))
    assert not products._is_right(rounds, "cpu", torch.bfloat16)
    assert products.mixed_product("cpu", torch.bfloat16) == ("torch, in fp32", right)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_products_on_a_gpu(dtype: torch.dtype) -> None:
    name, _ = products.mixed_product("cuda", dtype)
    assert name in ("apex", "transformer-engine", "torch")
    assert products._is_right(products._torch_mixed, "cuda", dtype)
    hidden, weight = (torch.randn(rows, 256, device="cuda").to(dtype) for rows in (300, 1000))
    found = torch.empty(300, 1000, device="cuda")
    products.logits_product(hidden, weight, found)
    torch.testing.assert_close(found.double(), hidden.double() @ weight.double().T, rtol=1e-4, atol=1e-3)


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_count_that_is_too_small_is_refused_and_on_a_device_shows_as_nan() -> None:
    case = make_linear_case()
    with pytest.raises(ValueError, match=f"num_trained is 3, but {case.num_trained} labels are trained"):
        loss_of(case, case.leaves(), num_trained=3)
    given: list[Any] = []
    apply, LinearLoss.apply = LinearLoss.apply, lambda *args: given.append(args) or apply(*args)
    try:
        loss_of(case, case.leaves(), num_trained=case.num_trained)
    finally:
        LinearLoss.apply = apply
    settings = given[0][5]
    for count, is_nan in ((case.num_trained - 1, True), (case.num_trained, False)):
        object.__setattr__(settings, "num_trained", count)
        loss, *_ = LinearLoss.apply(*given[0])
        assert bool(loss.isnan().all()) == is_nan


HIDDEN, WEIGHT, LABELS = torch.randn(4, 2, 8), torch.randn(10, 8), torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    "given,settings,error",
    [
        ((HIDDEN.double(), WEIGHT, LABELS), {}, "both be bfloat16, float16 or float32"),
        ((HIDDEN, WEIGHT.bfloat16(), LABELS), {}, "torch.float32 and torch.bfloat16: cast one of them"),
        ((HIDDEN, WEIGHT.T, LABELS), {}, r"hidden must be \[..., H\] and weight \[V/tp, H\]"),
        ((HIDDEN, WEIGHT, LABELS.T), {}, "transpose the labels"),
        ((HIDDEN, WEIGHT, LABELS.int()), {}, "labels.long()"),
        ((HIDDEN, WEIGHT, LABELS), {"bias": torch.zeros(9)}, r"bias must be \[10\]"),
        ((HIDDEN, WEIGHT, LABELS), {"loss_mask": torch.zeros(2, 4)}, "loss_mask must have the labels' shape"),
        ((HIDDEN, WEIGHT, LABELS), {"vocab_size": 11}, "vocab_size must lie in"),
        ((HIDDEN, WEIGHT, LABELS + 10), {}, "8 of 8 labels are >= vocab_size 10"),
        ((HIDDEN, WEIGHT, LABELS), {"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ((HIDDEN, WEIGHT, LABELS), {"logit_scale": math.nan}, "logit_scale must be a finite number"),
        (
            (HIDDEN, WEIGHT.clone().requires_grad_(), LABELS),
            {"fuse_wgrad_accumulation": True},
            "weight.main_grad in fp32",
        ),
        ((HIDDEN, WEIGHT, LABELS), {"objective": "prift"}, "reads log_prob of the reference model"),
    ],
)
def test_what_does_not_fit_together_is_refused(given: tuple[Tensor, ...], settings: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        vocab_parallel_linear_loss(*given, **settings)


def test_a_watch_on_the_device_needs_its_counter() -> None:
    with pytest.raises(ValueError, match="pass misfits"):
        UpstreamWatch(on_host=False)
