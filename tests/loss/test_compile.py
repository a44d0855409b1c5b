"""vocab_parallel_loss in a function that torch.compile turns into one graph: the same results as an eager call's.

`aot_eager` runs the graph as it was traced, functionalized, split into forward and backward. What Inductor adds to that
concerns the operations around the loss, whose own kernels it cannot look into.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, library
from torch.utils.checkpoint import checkpoint

from megatron_idft import Objective, Reference, TokenStatistics, idft, resolve_objective, vocab_parallel_loss
from megatron_idft.loss import operators, triton_backend
from tests.loss.engines import Engine, interpreted
from tests.loss.intermediate import bits
from tests.loss.oracle import reference_of
from tests.loss.test_vocab_parallel_loss import make_inputs
from tests.ranks import run_ranks

compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def forget_other_tests() -> Iterator[None]:
    torch.compiler.reset()
    yield


def half_weight(statistics: TokenStatistics) -> Tensor:
    return (0.5 * statistics.log_prob).exp()


sharpness = Objective(
    "sharpness",
    lambda statistics: statistics.max_prob * statistics.sum_squared_prob + 0.01 * statistics.argmax,
    extra_statistics=frozenset({"max_prob", "sum_squared_prob", "argmax"}),
)

CASES: dict[str, dict[str, Any]] = {
    "idft": {"objective": "idft", "vocab_size": 37},
    "floor, exempt tokens, values of cross-entropy": {
        "objective": resolve_objective("dft", weight_floor=0.2, exempt_token_ids=[3, 5]),
        "cross_entropy_values": True,
    },
    "in place": {"objective": "entropy", "overwrite_logits": True, "dtype": torch.bfloat16},
    "a number of its own": {"objective": resolve_objective("power", q=0.3)},
    "a statistic of its own": {"objective": "deft", "vocab_size": 37},
    "a reference": {"objective": "asft", "reference": True, "vocab_size": 37},
    "a reference's entropy": {"objective": idft(weights="reference"), "reference": True},
    "a user's function": {"objective": f"{__name__}:half_weight"},
    "further statistics": {"objective": sharpness},
}
IN_KERNELS = list(CASES)[:7]


def output_layer_and_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, **settings: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = vocab_parallel_loss(torch.nn.functional.linear(hidden, weight), labels, **settings)
    return out.loss.sum(), out


def results(model: Callable[..., Any], hidden: Tensor, weight: Tensor, labels: Tensor, **settings: Any) -> list[Tensor]:
    """What the loss returns, and the gradients of the output layer."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss, out = model(hidden, weight, labels, **settings)
    return [*(value.detach() for value in out if value is not None), *torch.autograd.grad(loss, (hidden, weight))]


def layer_inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32, vocab: int = 37) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(n, 8, generator=generator).to(dtype) for n in (rows, columns))
    return hidden, weight, torch.randint(-1, vocab, (rows,), generator=generator)


def assert_equal(actual: list[Tensor], expected: list[Tensor], exactly: bool = True) -> None:
    for one, other in zip(actual, expected, strict=True):
        if exactly:
            assert torch.equal(bits(one), bits(other))
        else:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_layer_and_loss_are_the_eager_ones(engine: Engine, case: str) -> None:
    settings = {"backend": engine.backend, **CASES[case]}
    inputs = [engine.place(value) for value in layer_inputs(6, 40, settings.pop("dtype", torch.float32))]
    if "reference" in settings:
        log_prob, entropy, *_ = reference_of(inputs[-1].cpu())
        settings["reference"] = Reference(engine.place(log_prob), engine.place(entropy))
    expected = results(output_layer_and_loss, *inputs, **settings)
    actual = results(compiled(output_layer_and_loss), *inputs, **settings)
    # A user's weights are computed by the compiler's graph from the merged states, not by a kernel.
    assert_equal(actual, expected, exactly=engine.backend == "reference" or case in IN_KERNELS)


def test_a_graph_serves_every_lambda_and_number_of_tokens(engine: Engine) -> None:
    gamma_lambda = engine.place(torch.tensor(0.0))
    settings = {"objective": idft(gamma_lambda=gamma_lambda), "backend": engine.backend}
    model = compiled(output_layer_and_loss, dynamic=True)
    results(model, *map(engine.place, layer_inputs(5, 40)), **settings)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows, value in ((6, 0.0), (6, 0.5), (9, 1.0)):
            gamma_lambda.fill_(value)
            inputs = [engine.place(tensor) for tensor in layer_inputs(rows, 40)]
            assert_equal(results(model, *inputs, **settings), results(output_layer_and_loss, *inputs, **settings))


def loss_in_place(engine: Engine) -> Callable[[Tensor, Tensor], Tensor]:
    """A compiled loss whose logits are made outside of it."""
    return compiled(lambda logits, labels: engine.loss(logits, labels, overwrite_logits=True).loss.sum())


def test_logits_from_outside_are_overwritten_and_autograd_notices(engine: Engine) -> None:
    values, labels = map(engine.place, make_inputs((6,), 37))
    leaf, loss = values.requires_grad_(), loss_in_place(engine)
    logits = leaf * 1
    (gradient,) = torch.autograd.grad(loss(logits, labels), leaf)
    assert torch.equal(logits, gradient)
    (expected,) = torch.autograd.grad(engine.loss(leaf, labels).loss.sum(), leaf)
    assert torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(torch.tanh(leaf), labels).backward()
    total = loss(leaf * 1, labels)
    with pytest.raises(RuntimeError, match=r"retain_graph=False|modified by an inplace operation"):
        total.backward(retain_graph=True)
        total.backward()


def test_a_leaf_and_its_views_are_refused(engine: Engine) -> None:
    values, labels = map(engine.place, make_inputs((6,), 37))
    leaf = values.clone().requires_grad_()
    for logits in (leaf, leaf.view(6, 37)):
        # The compiler of torch 2.8 stops as well, without the message.
        with pytest.raises(Exception, match=r"would destroy the values of a leaf|Observed exception"):
            loss_in_place(engine)(logits, labels)
    assert torch.equal(leaf, values)


def test_hooks_on_saved_tensors_are_refused(engine: Engine) -> None:
    values, labels = map(engine.place, make_inputs((6,), 37))
    leaf, loss = values.requires_grad_(), loss_in_place(engine)
    loss(leaf * 1, labels)
    with pytest.raises(RuntimeError, match=r"saved-tensor hooks.*Pass overwrite_logits=False"):
        checkpoint(lambda leaf: loss(torch.tanh(leaf), labels), leaf, use_reentrant=False)


def test_an_invalid_label_on_the_cpu_stops_the_graph() -> None:
    loss = compiled(lambda logits, labels: vocab_parallel_loss(logits, labels).loss)
    loss(torch.randn(2, 8), torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="1 of 2 labels are >= vocab_size 8"):
        loss(torch.randn(2, 8), torch.tensor([0, 8]))


def test_the_operators_declare_what_they_do(engine: Engine) -> None:
    logits, labels = map(engine.place, make_inputs((3, 2), 37))
    shard = {"backend": engine.backend, "start": 0, "valid_columns": 30, "vocab_size": 30}
    labels = labels.clamp(0, 29).t().contiguous().t()  # for ignored ones, some results are NaN, which equals nothing
    state_settings = {**shard, "extra_statistics": "sum_squared_prob argmax", "overwrites_logits": True}
    library.opcheck(operators.shard_state, (logits, labels), state_settings)
    states = operators.shard_state(logits, labels, **state_settings).unsqueeze(0)
    settings = {
        **{"gamma_lambda": engine.place(torch.tensor(0.5)), "backend": engine.backend, "vocab_size": 30},
        **{"cross_entropy_values": False, "formula": "idft", "parameters": "beta gamma_min gamma_max"},
        **{"numbers": [1.0, 0.1, 2.0], "weight_floor": 0.0, "exempt_token_ids": [2], "extra_statistics": ""},
        **{"reference_log_prob": None, "reference_entropy": None, "negative_weights": False},
    }
    states = states[..., :4].contiguous()
    if engine.backend != "reference":  # which has no formulas
        library.opcheck(operators.token_results, (states, labels), settings)
    weight, log_prob, maximum, sum_exp = (torch.rand_like(labels, dtype=torch.float32) for _ in range(4))
    per_token = {"weight": weight, "log_prob": -log_prob, "maximum": maximum, "sum_exp": 1 + sum_exp}
    arguments = (logits, torch.empty_like(logits), labels, torch.ones_like(weight))
    for row_coefficient in (None, 2 * weight):
        settings = {**per_token, "row_coefficient": row_coefficient, **shard}
        library.opcheck(operators.write_gradient, arguments, settings)
    columns = torch.tensor([3, -1, 7], device=labels.device).expand(3, 2, 3)
    arguments = (torch.zeros_like(logits), columns, torch.rand_like(columns, dtype=torch.float32))
    library.opcheck(operators.store_columns, arguments, {"backend": engine.backend})
    names = ("shard_state", "token_results", "write_gradient", "store_columns")
    schemas = [getattr(torch.ops.megatron_idft, name).default._schema for name in names]
    written = [argument.name for schema in schemas for argument in schema.arguments if argument.is_write]
    assert written == ["gradient", "gradient"]


def compare_on_a_rank(backends: list[str]) -> dict[str, tuple[list[Tensor], list[Tensor], list[list[str]]]]:
    """For each backend, compiled and eager results of this rank's shard, and what the graphs of both passes call."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    hidden, weight, labels = layer_inputs(6, 40)
    group = torch.distributed.new_group(list(range(torch.distributed.get_world_size())))  # as Megatron makes them
    shard = weight.chunk(group.size())[group.rank()]
    recorded = aot_autograd(fw_compiler=record, partition_fn=min_cut_rematerialization_partition)  # as Inductor does
    model = torch.compile(output_layer_and_loss, fullgraph=True, backend=recorded)
    found = {}
    for backend in backends:
        graphs: list[list[str]] = []
        settings = {"objective": "idft", "tp_group": group, "vocab_size": 37, "backend": backend}
        eager = results(output_layer_and_loss, hidden, shard, labels, **settings)
        found[backend] = (results(model, hidden, shard, labels, **settings), eager, graphs)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(compare_on_a_rank, 2, ["reference", *(["triton"] if triton_backend.INTERPRETED else [])])


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
def test_tensor_parallel_ranks(ranks: list[dict[str, Any]], backend: str) -> None:
    one_rank = results(output_layer_and_loss, *layer_inputs(6, 40), objective="idft", vocab_size=37)
    for rank in ranks:
        compiled, eager, graphs = rank[backend]
        assert_equal(compiled, eager)
        assert_equal(compiled[:5], ranks[0][backend][0][:5])
        assert_equal(compiled[:5], one_rank[:5], exactly=False)
        collectives = [[name for name in graph if "all_" in name or "reduce" in name] for graph in graphs]
        assert collectives == [["_c10d_functional.all_gather_into_tensor.default"], []]
