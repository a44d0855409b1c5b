"""The loops over tokens: forward with or without gradients, and the backward pass that computes the logits again.

A *block* of tokens is what fp32 logits are kept of, a *chunk* of several blocks what the gradient is kept of until the
two products with it. While the states of one block travel to the other tensor-parallel ranks, the logits of the next
are computed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import Work

from megatron_idft.loss.autograd import Backend, TokenResults, results_and_term, write_whole_gradient
from megatron_idft.loss.linear.products import add_weight_gradient, logits_product
from megatron_idft.loss.linear.tokens import block_tokens, spans
from megatron_idft.loss.shard import VocabShard
from megatron_idft.loss.top_k import TopTerm
from megatron_idft.objectives import Objective
from megatron_idft.statistics import Reference


@dataclass(frozen=True, eq=False)
class Head:
    """What the passes need to know beside tensors that carry gradient."""

    objective: Objective
    shard: VocabShard
    vocab_size: int
    backend: Backend
    logit_scale: float
    chunk_tokens: int
    cross_entropy_values: bool


class Inputs(NamedTuple):
    """hidden [T, H], of which `rows` [n] (None: all) are computed; labels [n]; reference of the same [n] tokens."""

    hidden: Tensor
    rows: Tensor | None
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    reference: Reference | None

    def hidden_rows(self, part: slice) -> Tensor:
        return self.hidden[part] if self.rows is None else self.hidden[self.rows[part]]


class Gradients:
    """What the products with the logits' gradient add up to, each None where nobody needs it.

    Attributes:
        hidden: [n, H] in the dtype of the hidden states, this rank's part of a sum over tensor-parallel ranks.
        weight: [V/tp, H] fp32; `main_grad` where that is given, added to.
        bias: [V/tp] fp32.
    """

    def __init__(self, inputs: Inputs, needed: Sequence[bool], main_grad: Tensor | None) -> None:
        of_hidden, of_weight, of_bias = needed
        shape = (inputs.labels.numel(), inputs.hidden.shape[-1])
        self.hidden = inputs.hidden.new_empty(shape) if of_hidden else None
        self.weight = None
        if of_weight:
            self.weight = torch.zeros_like(inputs.weight, dtype=torch.float32) if main_grad is None else main_grad
        self.bias = torch.zeros(len(inputs.weight), device=inputs.hidden.device) if of_bias else None
        self._inputs = inputs

    def add(self, chunk: slice, gradient: Tensor) -> None:
        """The products of a chunk with the gradient [chunk, V/tp] of its logits, before their scale."""
        if self.hidden is not None:
            torch.mm(gradient, self._inputs.weight, out=self.hidden[chunk])
        if self.weight is not None:
            add_weight_gradient(self.weight, gradient, self._inputs.hidden_rows(chunk))
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=torch.float32)


class _Block(NamedTuple):
    part: slice  # of the n tokens
    logits: Tensor
    states: Tensor | None = None
    work: Work | None = None


Results = tuple[TokenResults, TopTerm | None]


def forward_pass(head: Head, inputs: Inputs, upstream: Tensor, gradients: Gradients | None) -> Results:
    """Values of all n tokens, and with `gradients` what upstream [n] fp32 makes of them.

    Collectives: as `vocab_parallel_loss` for each block, in turn; those of one block overlap the product of the next.
    """
    found: list[Results] = []
    buffers = _Buffers(head, inputs, gradients is not None, overlapped=head.shard.is_split)

    def finish(block: _Block) -> None:
        if block.work is not None:
            block.work.wait()
        assert block.states is not None
        labels, reference = inputs.labels[block.part], _reference(inputs.reference, block.part)
        values = (head.objective, head.shard, head.vocab_size, head.backend, head.cross_entropy_values)
        results, term = results_and_term(block.logits, labels, block.states, *values, reference)
        found.append((results, term))
        if gradients is None:
            return
        of_term: tuple[Tensor, ...] = ()
        if term is not None:
            assert reference is not None and reference.top_ids is not None
            of_term = (reference.top_ids, term.coefficient, term.probs, term.reference_probs)
        _write_gradient(head, inputs, buffers, block, upstream, results, of_term)
        if buffers.ends_chunk(block.part):
            gradients.add(*buffers.chunk(block.part))

    waiting: list[_Block] = []
    for part in buffers.blocks:
        logits = _logits(head, inputs, part, buffers.logits(part))
        labels, extra = inputs.labels[part], head.objective.extra_statistics
        state = head.backend.shard_state(logits, labels, head.shard, head.vocab_size, extra)
        waiting.append(_Block(part, logits, *head.shard.begin_gather(state)))
        if len(waiting) > head.shard.is_split:
            finish(waiting.pop(0))
    for block in waiting:
        finish(block)
    return _joined(found)


def backward_pass(
    head: Head,
    inputs: Inputs,
    results: TokenResults,
    of_term: Sequence[Tensor],
    upstream: Tensor,
    gradients: Gradients,
) -> None:
    """Compute the logits again and what upstream [n] fp32 makes of them; of_term as in `write_whole_gradient`.

    Collectives: none.
    """
    buffers = _Buffers(head, inputs, True, overlapped=False)
    for part in buffers.blocks:
        block = _Block(part, _logits(head, inputs, part, buffers.logits(part)))
        of_block = TokenResults(*(_part(value, part) for value in results))
        _write_gradient(head, inputs, buffers, block, upstream, of_block, [value[part] for value in of_term])
        if buffers.ends_chunk(part):
            gradients.add(*buffers.chunk(part))


class _Buffers:
    """Memory that the blocks use in turn.

    Attributes:
        blocks: the parts of the n tokens; each lies within one chunk.
    """

    def __init__(self, head: Head, inputs: Inputs, has_gradient: bool, overlapped: bool) -> None:
        tokens, columns, dtype = inputs.labels.numel(), len(inputs.weight), inputs.hidden.dtype
        self._size = min(head.chunk_tokens, max(tokens, 1))
        each = min(block_tokens(self._size, columns), self._size)
        chunks = spans(tokens, self._size)
        self.blocks = [
            slice(chunk.start + part.start, chunk.start + part.stop)
            for chunk in chunks
            for part in spans(chunk.stop - chunk.start, each)
        ]
        self._ends = {chunk.stop for chunk in chunks}
        self._gradient = inputs.hidden.new_empty((self._size, columns) if has_gradient else (0, columns))
        # The gradient overwrites fp32 logits, unless those of the next chunk are there already.
        self._in_place = has_gradient and dtype == torch.float32 and not overlapped
        count = 0 if self._in_place else 1 + overlapped
        self._logits = [
            torch.empty(each, columns, dtype=torch.float32, device=inputs.hidden.device) for _ in range(count)
        ]
        self._next = 0

    def logits(self, part: slice) -> Tensor:
        """[block, V/tp] fp32 memory for the logits of a block."""
        if self._in_place:
            return self.gradient(part)
        self._next = (self._next + 1) % len(self._logits)
        return self._logits[self._next][: part.stop - part.start]

    def gradient(self, part: slice) -> Tensor:
        """[block, V/tp] memory for the gradient of a block's logits."""
        begin = part.start % self._size
        return self._gradient[begin : begin + part.stop - part.start]

    def ends_chunk(self, part: slice) -> bool:
        return part.stop in self._ends

    def chunk(self, part: slice) -> tuple[slice, Tensor]:
        """The chunk that a block ends, and the gradient of its logits."""
        begin = part.start // self._size * self._size
        return slice(begin, part.stop), self._gradient[: part.stop - begin]


def _logits(head: Head, inputs: Inputs, part: slice, out: Tensor) -> Tensor:
    logits_product(inputs.hidden_rows(part), inputs.weight, out)
    if inputs.bias is not None:
        out += inputs.bias
    if head.logit_scale != 1:
        out *= head.logit_scale
    return out


def _write_gradient(
    head: Head,
    inputs: Inputs,
    buffers: _Buffers,
    block: _Block,
    upstream: Tensor,
    results: TokenResults,
    of_term: Sequence[Tensor],
) -> None:
    """The gradient with respect to the product, so with the scale of the logits in it."""
    labels, scaled = inputs.labels[block.part], upstream[block.part] * head.logit_scale
    shared = (head.shard, head.vocab_size, head.backend)
    write_whole_gradient(block.logits, buffers.gradient(block.part), labels, scaled, results, of_term, *shared)


def _reference(reference: Reference | None, part: slice) -> Reference | None:
    return None if reference is None else Reference(*(_part(value, part) for value in reference))


def _part(value: Tensor | None, part: slice) -> Any:
    return value if value is None or not value.dim() else value[part]


def _joined(found: Sequence[Results]) -> Results:
    """Those of blocks, one after the other."""
    tokens, terms = zip(*found, strict=True)
    joined: Iterator[Any] = (
        None if values[0] is None else torch.cat(values) if values[0].dim() else torch.stack(values).sum()
        for values in zip(*tokens, strict=True)
    )
    term = None if terms[0] is None else TopTerm(*map(torch.cat, zip(*terms, strict=True)))
    return TokenResults(*joined), term
