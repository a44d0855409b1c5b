"""The backends as custom operators of torch, which torch.compile puts into its graph without looking inside.

A traced call takes this way, so that one graph holds the whole loss (`fullgraph=True`). An eager call goes to the
backend itself: the dispatcher would cost it some microseconds an operator. `custom_op` and not `triton_op`: how the
kernels are launched depends on addresses and strides, which are known only when they run.
"""

from typing import NamedTuple

import torch
from torch import Tensor, library

from megatron_idft.loss import reference as reference_backend
from megatron_idft.loss.autograd import TokenResults
from megatron_idft.loss.backends import load_backend
from megatron_idft.loss.checks import reject_hooks_on_saved_tensors, reject_invalid_labels
from megatron_idft.loss.shard import VocabShard
from megatron_idft.objectives import KernelFormula, Objective
from megatron_idft.statistics import STATE_SIZE, Reference, TokenStatistics, extra_state_columns

_SevenTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Operators(NamedTuple):
    """A backend (`autograd.Backend`) for code that is being traced.

    Attributes:
        backend: the name of the backend that does the work when the graph runs.
        overwrites_logits: whether backward will write into the logits.
    """

    backend: str
    overwrites_logits: bool

    def shard_state(
        self, logits: Tensor, labels: Tensor, shard: VocabShard, vocab_size: int, extra_statistics: frozenset[str]
    ) -> Tensor:
        """See `autograd.Backend`. Checks as well what an eager call checks and a trace cannot know.

        Raises:
            ValueError: a label >= vocab_size, for labels on the CPU.
            RuntimeError: the graph, which overwrites logits, runs under saved-tensor hooks.
        """
        extras = " ".join(extra_state_columns(extra_statistics))
        state: Tensor = shard_state(
            logits,
            labels,
            backend=self.backend,
            start=shard.start,
            valid_columns=shard.valid_columns,
            vocab_size=vocab_size,
            extra_statistics=extras,
            overwrites_logits=self.overwrites_logits,
        )
        return state

    def token_results(
        self,
        states: Tensor,
        labels: Tensor,
        objective: Objective,
        vocab_size: int,
        cross_entropy_values: bool,
        reference: Reference | None = None,
    ) -> TokenResults:
        """See `autograd.Backend`. Where no kernel knows the formula: plain torch, for the compiler to fuse."""
        formula = objective.token_weight
        if self.backend == "reference" or not isinstance(formula, KernelFormula):
            return reference_backend.token_results(
                states, labels, objective, vocab_size, cross_entropy_values, reference
            )
        numbers = {name: value for name, value in formula.parameters.items() if not isinstance(value, Tensor)}
        results = token_results(
            states,
            labels,
            gamma_lambda=None if len(numbers) == len(formula.parameters) else formula.parameters["gamma_lambda"],
            reference_log_prob=None if reference is None else reference.log_prob,
            reference_entropy=None if reference is None else reference.entropy,
            backend=self.backend,
            vocab_size=vocab_size,
            cross_entropy_values=cross_entropy_values,
            formula=formula.name,
            parameters=" ".join(numbers),
            numbers=list(numbers.values()),
            weight_floor=objective.weight_floor,
            exempt_token_ids=list(objective.exempt_token_ids),
            extra_statistics=" ".join(extra_state_columns(objective.extra_statistics)),
            negative_weights=objective.negative_weights,
        )
        return TokenResults(*results)

    def write_gradient(
        self,
        logits: Tensor,
        gradient: Tensor,
        labels: Tensor,
        upstream: Tensor,
        results: TokenResults,
        shard: VocabShard,
        vocab_size: int,
    ) -> None:
        """See `autograd.Backend`."""
        write_gradient(
            logits,
            gradient,
            labels,
            upstream,
            weight=results.weight,
            row_coefficient=results.row_coefficient,
            log_prob=results.log_prob,
            maximum=results.max,
            sum_exp=results.sum_exp,
            backend=self.backend,
            start=shard.start,
            valid_columns=shard.valid_columns,
            vocab_size=vocab_size,
        )

    def store_columns(self, gradient: Tensor, columns: Tensor, values: Tensor) -> None:
        """See `autograd.Backend`."""
        store_columns(gradient, columns, values, backend=self.backend)


@library.custom_op("megatron_idft::shard_state", mutates_args=())
def shard_state(
    logits: Tensor,
    labels: Tensor,
    backend: str,
    start: int,
    valid_columns: int,
    vocab_size: int,
    extra_statistics: str,  # names between spaces: a schema has no lists of strings
    overwrites_logits: bool,
) -> Tensor:
    """`Operators.shard_state` when the graph runs."""
    if labels.device.type == "cpu":
        reject_invalid_labels(labels, vocab_size)
    if overwrites_logits:
        reject_hooks_on_saved_tensors()
    shard = VocabShard(start, valid_columns, logits.shape[-1], tp_group=None)
    extras = frozenset(extra_statistics.split())
    return load_backend(backend).shard_state(logits, labels, shard, vocab_size, extras)


@shard_state.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    backend: str,
    start: int,
    valid_columns: int,
    vocab_size: int,
    extra_statistics: str,
    overwrites_logits: bool,
) -> Tensor:
    size = STATE_SIZE + len(extra_statistics.split())
    return logits.new_empty(*labels.shape, size, dtype=torch.float32)


@library.custom_op("megatron_idft::token_results", mutates_args=())
def token_results(
    states: Tensor,
    labels: Tensor,
    gamma_lambda: Tensor | None,  # in the place of a number, read on the device when the graph runs
    reference_log_prob: Tensor | None,
    reference_entropy: Tensor | None,
    backend: str,
    vocab_size: int,
    cross_entropy_values: bool,
    formula: str,
    parameters: str,  # names of `numbers` between spaces
    numbers: list[float],
    weight_floor: float,
    exempt_token_ids: list[int],
    extra_statistics: str,
    negative_weights: bool,
) -> _SevenTensors:
    """`Operators.token_results` when the graph runs: the tensors of `TokenResults`."""
    values: dict[str, float | Tensor] = dict(zip(parameters.split(), numbers, strict=True))
    if gamma_lambda is not None:
        values["gamma_lambda"] = gamma_lambda
    objective = Objective(
        formula,
        KernelFormula(formula, _computed_by_the_kernel, values),
        weight_floor=weight_floor,
        exempt_token_ids=tuple(exempt_token_ids),
        extra_statistics=frozenset(extra_statistics.split()),
        negative_weights=negative_weights,
    )
    reference = None if reference_log_prob is None else Reference(reference_log_prob, reference_entropy)
    results = load_backend(backend).token_results(
        states, labels, objective, vocab_size, cross_entropy_values, reference
    )
    loss, weight, log_prob, entropy, maximum, sum_exp, invalid_labels, _ = results
    return loss, weight, log_prob, entropy, maximum, sum_exp, invalid_labels


@token_results.register_fake
def _(states: Tensor, labels: Tensor, *_: object, **__: object) -> _SevenTensors:
    loss, weight, log_prob, entropy, maximum, sum_exp = (states.new_empty(labels.shape) for _ in range(6))
    return loss, weight, log_prob, entropy, maximum, sum_exp, labels.new_empty(())


def _computed_by_the_kernel(statistics: TokenStatistics) -> Tensor:
    raise AssertionError("a formula of the kernels was asked for its weight")


@library.custom_op("megatron_idft::write_gradient", mutates_args=("gradient",))
def write_gradient(
    logits: Tensor,
    gradient: Tensor,  # of its own, or the logits
    labels: Tensor,
    upstream: Tensor,
    weight: Tensor,
    row_coefficient: Tensor | None,
    log_prob: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    backend: str,
    start: int,
    valid_columns: int,
    vocab_size: int,
) -> None:
    """`Operators.write_gradient` when the graph runs."""
    shard = VocabShard(start, valid_columns, logits.shape[-1], tp_group=None)
    results = TokenResults(
        loss=upstream,  # this and the other two are not read
        weight=weight,
        log_prob=log_prob,
        entropy=log_prob,
        max=maximum,
        sum_exp=sum_exp,
        invalid_labels=labels,
        row_coefficient=row_coefficient,
    )
    load_backend(backend).write_gradient(logits, gradient, labels, upstream, results, shard, vocab_size)


@write_gradient.register_fake
def _(*_: object, **__: object) -> None:
    return None


@library.custom_op("megatron_idft::store_columns", mutates_args=("gradient",))
def store_columns(gradient: Tensor, columns: Tensor, values: Tensor, backend: str) -> None:
    """`Operators.store_columns` when the graph runs."""
    load_backend(backend).store_columns(gradient, columns, values)


@store_columns.register_fake
def _(*_: object, **__: object) -> None:
    return None
