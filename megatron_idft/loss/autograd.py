"""The differentiable token loss over any backend: what is saved, what is overwritten, what is refused."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_idft.loss.shard import VocabShard
from megatron_idft.objectives import Objective
from megatron_idft.statistics import MergedState, Reference, TokenStatistics


class TokenResults(NamedTuple):
    """Everything that forward computes from the merged states, each [...] fp32; zeros at ignored positions.

    Attributes:
        loss: -weight * log_prob, or -log_prob if cross-entropy values were asked for.
        weight, log_prob, entropy: as in `LossOutput`.
        max, sum_exp: of the whole vocabulary, for backward; anything at ignored positions.
        invalid_labels: 0-dim int64, the number of labels >= vocab_size.
    """

    loss: Tensor
    weight: Tensor
    log_prob: Tensor
    entropy: Tensor
    max: Tensor
    sum_exp: Tensor
    invalid_labels: Tensor


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
        """gradient [..., V/tp] = weight upstream (softmax - onehot), rounded once, 0 at ignored rows and padding.

        `gradient` may share the logits' memory. Its version counter advances, so that autograd notices.
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

    def given(value: Tensor | None) -> Tensor | None:
        return None if value is None else kept(value.float())

    statistics = TokenStatistics(
        log_prob=kept(merged.log_prob),
        entropy=kept(merged.entropy),
        labels=labels,
        vocab_size=vocab_size,
        max_prob=kept(1.0 / merged.sum_exp) if "max_prob" in objective.extra_statistics else None,
        sum_squared_prob=None if merged.sum_squared_prob is None else kept(merged.sum_squared_prob),
        argmax=None if merged.argmax is None else kept(merged.argmax, -1).to(torch.int64),
        reference_log_prob=None if reference is None else given(reference.log_prob),
        reference_entropy=None if reference is None else given(reference.entropy),
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


class TokenLoss(torch.autograd.Function):
    """loss, weight, log_prob, entropy and invalid_labels; only the loss carries gradient.

    Collectives: one all-gather in forward (`VocabShard.gather_states`), none in backward.
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        reference = None if reference_log_prob is None else Reference(reference_log_prob, reference_entropy)
        state = backend.shard_state(logits, labels, shard, vocab_size, objective.extra_statistics)
        states = shard.gather_states(state)
        results = backend.token_results(states, labels, objective, vocab_size, cross_entropy_values, reference)
        ctx.shard, ctx.vocab_size, ctx.backend = shard, vocab_size, backend
        ctx.overwrite_logits = overwrite_logits
        ctx.overwritten = False
        _, *saved = results
        ctx.save_for_backward(logits, labels, *saved)
        ctx.mark_non_differentiable(results.weight, results.log_prob, results.entropy, results.invalid_labels)
        return results.loss, results.weight, results.log_prob, results.entropy, results.invalid_labels

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
        results = TokenResults(grad_loss, *saved)  # the loss itself is not needed again
        ctx.backend.write_gradient(logits, gradient, labels, grad_loss, results, ctx.shard, ctx.vocab_size)
        return gradient, *[None] * 9
