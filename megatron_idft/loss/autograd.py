"""The differentiable token loss over any backend: what is saved, what is overwritten, what is refused."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_idft.loss.shard import VocabShard
from megatron_idft.loss.top_k import TopTerm, gather_logits, local_columns, top_gradient, top_term
from megatron_idft.objectives import Objective
from megatron_idft.statistics import MergedState, Reference, TokenStatistics


class TokenResults(NamedTuple):
    """Everything that forward computes from the merged states, each [...] fp32; zeros at ignored positions.

    Attributes:
        loss: -weight * log_prob, or -log_prob if cross-entropy values were asked for.
        weight, log_prob, entropy: as in `LossOutput`.
        max, sum_exp: of the whole vocabulary, for backward; anything at ignored positions.
        invalid_labels: 0-dim int64, the number of labels >= vocab_size.
        row_coefficient: factor of the softmax in the gradient; None: the weight.
    """

    loss: Tensor
    weight: Tensor
    log_prob: Tensor
    entropy: Tensor
    max: Tensor
    sum_exp: Tensor
    invalid_labels: Tensor
    row_coefficient: Tensor | None = None


class Backend(Protocol):
    """The functions of a backend module. Labels [...] are int64 of any strides; one is ignored unless 0 <= label <
    vocab_size. Nothing here synchronises with the host or allocates a tensor of the logits' size.
    """

    def shard_state(
        self, logits: Tensor, labels: Tensor, shard: VocabShard, vocab_size: int, extra_statistics: frozenset[str]
    ) -> Tensor:
        """[..., S] contiguous fp32 state of this shard (statistics.py); anything finite where the label is ignored."""

    def token_results(
        self,
        states: Tensor,
        labels: Tensor,
        objective: Objective,
        vocab_size: int,
        cross_entropy_values: bool,
        reference: Reference | None = None,
    ) -> TokenResults:
        """Merge [R, ..., S] states in rank order and weigh the tokens.

        `reference` [...] has what the objective's `reference_statistics` ask for, of any floating dtype and strides.
        """

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
        """gradient [..., V/tp] = upstream (row_coefficient softmax - weight onehot), 0 at ignored rows and padding.

        Rounded once. `gradient` may share the logits' memory. Its version counter advances, so that autograd notices.
        """

    def store_columns(self, gradient: Tensor, columns: Tensor, values: Tensor) -> None:
        """gradient[..., columns[..., k]] = values[..., k] [..., K] fp32, rounded once; -1 is left out.

        Columns are int64 and no row names one twice.
        """


def weigh_tokens(
    merged: MergedState,
    labels: Tensor,
    objective: Objective,
    vocab_size: int,
    cross_entropy_values: bool,
    reference: Reference | None,
) -> TokenResults:
    """`TokenResults` in plain torch, for any objective."""
    invalid = labels >= vocab_size
    labels = torch.where(invalid, -1, labels)
    trained = labels >= 0

    def kept(value: Tensor, ignored: float = 0.0) -> Tensor:
        return torch.where(trained, value, ignored)

    statistics = TokenStatistics(
        log_prob=kept(merged.log_prob),
        entropy=kept(merged.entropy),
        labels=labels,
        vocab_size=vocab_size,
        max_prob=kept(1.0 / merged.sum_exp) if "max_prob" in objective.extra_statistics else None,
        sum_squared_prob=None if merged.sum_squared_prob is None else kept(merged.sum_squared_prob),
        argmax=None if merged.argmax is None else kept(merged.argmax, -1).to(torch.int64),
        reference_log_prob=None if reference is None else kept(reference.log_prob.float()),
        reference_entropy=None if reference is None or reference.entropy is None else kept(reference.entropy.float()),
    )
    weight = objective.weight(statistics)
    value = statistics.log_prob if cross_entropy_values else weight * statistics.log_prob
    return TokenResults(
        loss=0.0 - value,  # a plain negation would show ignored positions as -0.0
        weight=weight,
        log_prob=statistics.log_prob,
        entropy=statistics.entropy,
        max=merged.max,
        sum_exp=merged.sum_exp,
        invalid_labels=invalid.sum(),
    )


def reference_term(
    logits: Tensor,
    labels: Tensor,
    results: TokenResults,
    objective: Objective,
    shard: VocabShard,
    vocab_size: int,
    reference: Reference,
) -> TopTerm:
    """The KL term of an objective that has one. Collectives: see `gather_logits`."""
    assert reference.top_ids is not None
    trained = (labels >= 0) & (labels < vocab_size)
    statistics = TokenStatistics(
        results.log_prob,
        results.entropy,
        torch.where(trained, labels, -1),
        vocab_size,
        reference_log_prob=torch.where(trained, reference.log_prob.float(), 0.0),
        reference_entropy=None if reference.entropy is None else torch.where(trained, reference.entropy.float(), 0.0),
    )
    coefficient = objective.reference_kl_coefficient(statistics)
    found = gather_logits(logits, reference.top_ids, shard)
    return top_term(found, results.max, results.sum_exp, results.weight, coefficient, reference, trained)


def results_and_term(
    logits: Tensor,
    labels: Tensor,
    states: Tensor,
    objective: Objective,
    shard: VocabShard,
    vocab_size: int,
    backend: Backend,
    cross_entropy_values: bool,
    reference: Reference | None,
) -> tuple[TokenResults, TopTerm | None]:
    """Results of the gathered states, and the KL term of an objective that has one. Collectives: `gather_logits`."""
    results = backend.token_results(states, labels, objective, vocab_size, cross_entropy_values, reference)
    if objective.kl_coefficient is None or reference is None:
        return results, None
    term = reference_term(logits, labels, results, objective, shard, vocab_size, reference)
    loss = results.loss if cross_entropy_values else results.loss + term.coefficient * term.kl
    results = TokenResults(  # not _replace: the compiler of torch 2.8 does not trace it
        loss=loss,
        weight=results.weight,
        log_prob=results.log_prob,
        entropy=results.entropy,
        max=results.max,
        sum_exp=results.sum_exp,
        invalid_labels=results.invalid_labels,
        row_coefficient=term.row_coefficient,
    )
    return results, term


def write_whole_gradient(
    logits: Tensor,
    gradient: Tensor,
    labels: Tensor,
    upstream: Tensor,
    results: TokenResults,
    of_term: Sequence[Tensor],
    shard: VocabShard,
    vocab_size: int,
    backend: Backend,
) -> None:
    """`Backend.write_gradient`, and what a KL term corrects of it.

    Args:
        logits, gradient, labels, upstream, results, shard, vocab_size: as there.
        of_term: top_ids and the term's coefficient, probs and reference_probs; empty without a KL term.
        backend: which one.
    """
    backend.write_gradient(logits, gradient, labels, upstream, results, shard, vocab_size)
    if of_term:
        top_ids, coefficient, probs, reference_probs = of_term
        values = top_gradient(
            top_ids, coefficient, probs, reference_probs, labels, results.weight, results.log_prob, upstream
        )
        backend.store_columns(gradient, local_columns(top_ids, labels, shard, vocab_size), values)


class TokenLoss(torch.autograd.Function):
    """The tensors of `LossOutput`; only the loss carries gradient.

    Collectives: in forward one all-gather (`VocabShard.gather_states`), and one all-reduce (`gather_logits`) where the
    objective has a KL term; none in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        objective: Objective,
        shard: VocabShard,
        vocab_size: int,
        backend: Backend,
        overwrite_logits: bool,
        cross_entropy_values: bool,
        reference_log_prob: Tensor | None,  # each of its own: a tuple's tensors would be no inputs to autograd
        reference_entropy: Tensor | None,
        top_ids: Tensor | None,
        top_log_prob: Tensor | None,
    ) -> tuple[Tensor, ...]:
        reference = None
        if reference_log_prob is not None:
            reference = Reference(reference_log_prob, reference_entropy, top_ids, top_log_prob)
        state = backend.shard_state(logits, labels, shard, vocab_size, objective.extra_statistics)
        states = shard.gather_states(state)
        results, term = results_and_term(
            logits, labels, states, objective, shard, vocab_size, backend, cross_entropy_values, reference
        )
        of_term: tuple[Tensor, ...] = ()
        kl: tuple[Tensor, ...] = ()
        if term is not None:
            assert top_ids is not None
            kl, of_term = (term.kl,), (top_ids, term.coefficient, term.probs, term.reference_probs)
        ctx.shard, ctx.vocab_size, ctx.backend = shard, vocab_size, backend
        ctx.overwrite_logits = overwrite_logits
        ctx.overwritten = False
        _, *saved = results
        ctx.save_for_backward(logits, labels, *saved, *of_term)
        found = (results.weight, results.log_prob, results.entropy, results.invalid_labels, *kl)
        ctx.mark_non_differentiable(*found)
        return results.loss, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.overwritten:
            raise RuntimeError(
                "backward ran a second time, but the first one overwrote the logits with their gradient. Run backward "
                "once, over the sum of the losses, or pass overwrite_logits=False to vocab_parallel_loss"
            )
        logits, labels, *saved = ctx.saved_tensors
        # A detached alias shares the version counter: writing to it tells autograd that the logits have changed.
        gradient = logits.detach() if ctx.overwrite_logits else torch.empty_like(logits)
        ctx.overwritten = ctx.overwrite_logits
        # The loss itself is not needed again. Behind its other results stands what the KL term needs.
        size = len(TokenResults._fields) - 1
        results, of_term = TokenResults(grad_loss, *saved[:size]), saved[size:]
        write_whole_gradient(
            logits, gradient, labels, grad_loss, results, of_term, ctx.shard, ctx.vocab_size, ctx.backend
        )
        return gradient, *[None] * 11
