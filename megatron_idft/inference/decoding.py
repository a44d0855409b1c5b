"""The interface of decoders, the choice of one, and the plainest, which computes all anew for every token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_idft.errors import UnservedModelError
from megatron_idft.inference.draws import sample, uniform
from megatron_idft.inference.engine import DecodeEngine
from megatron_idft.inference.requests import Tokens


class Decoder(Protocol):
    def generate(
        self,
        prompts: Sequence[Tokens],
        record_ids: Sequence[str],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: Collection[int],
    ) -> list[Tokens]:
        """Continuations of `prompts`, each up to and with its first stop token, or of `max_tokens` tokens.

        Called by all ranks with the same arguments; returns the same on all of them. A draw depends on (seed, record
        id, step) and nothing else. temperature 1 is the model's own distribution, 0 the most probable token.
        """


def decoder_for(
    model: Sequence[torch.nn.Module],
    vocab_size: int,
    *,
    max_positions: int,
    max_rows: int,
    tokens_per_batch: int,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Decoder, str]:
    """The decode engine where it serves the model and its layout, else RecomputingDecoder; and what to say of it.

    Args:
        model: the chunks of this rank, as Megatron's training setup returns them.
        vocab_size: rows of the true vocabulary.
        max_positions: the context.
        max_rows: responses decoded at once, at most.
        tokens_per_batch: padded tokens of a forward pass without a cache.
        tell: see DecodeEngine.
    """
    try:
        engine = DecodeEngine(model, vocab_size, max_positions=max_positions, max_rows=max_rows, tell=tell)
    except UnservedModelError as reason:
        return (
            RecomputingDecoder(model, vocab_size, tokens_per_batch, max_positions),
            f"decoding by whole forward passes, which is slow: {reason}",
        )
    return engine, engine.describe()


class RecomputingDecoder:
    """Decodes by a full forward pass per token: right by construction, slow in proportion to the length.

    Serves what training serves: TP, PP, sequence parallelism, GPTModel and HybridModel. Every data-parallel replica
    does the same work.

    Args:
        model: the pipeline chunks of this rank (one; virtual stages are not served), in evaluation mode.
        vocab_size: rows of the true vocabulary; others are never drawn.
        tokens_per_batch: padded tokens in one forward pass; at least one sequence.
        max_positions: the model's context; a continuation that reaches it ends there.
    """

    def __init__(
        self, model: Sequence[torch.nn.Module], vocab_size: int, tokens_per_batch: int, max_positions: int
    ) -> None:
        [self.model] = model
        self.vocab_size = vocab_size
        self.tokens_per_batch = tokens_per_batch
        self.max_positions = max_positions

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tokens],
        record_ids: Sequence[str],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: Collection[int],
    ) -> list[Tokens]:
        sequences = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        running = list(range(len(sequences)))
        for step in range(max_tokens):
            running = [i for i in running if len(sequences[i]) < self.max_positions]
            if not running:
                break
            logits = self._next_logits([sequences[i] for i in running])
            draws = uniform(seed, [record_ids[i] for i in running], step)
            chosen = _from_last_stage(None if logits is None else sample(logits, temperature, draws))
            for i, token in zip(running, chosen, strict=True):
                sequences[i] = np.append(sequences[i], token)
            running = [i for i, token in zip(running, chosen, strict=True) if int(token) not in stop_ids]
        return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]

    def _next_logits(self, sequences: Sequence[Tokens]) -> NDArray[np.float32] | None:
        """[b, V] fp32 logits of the next token on the last pipeline stage, None on the others."""
        from megatron.core import mpu
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.utils import get_model_config

        config = get_model_config(self.model)
        multiple = mpu.get_tensor_model_parallel_world_size() if config.sequence_parallel else 1
        length = -(-max(len(sequence) for sequence in sequences) // multiple) * multiple
        rows = max(1, self.tokens_per_batch // length)
        batches = [sequences[start : start + rows] for start in range(0, len(sequences), rows)]
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=_tensors(batches, length),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not mpu.is_pipeline_last_stage():
            return None
        group = mpu.get_tensor_model_parallel_group()
        shard = torch.cat(outputs).float()
        shards = [torch.empty_like(shard) for _ in range(group.size())]
        torch.distributed.all_gather(shards, shard, group=group)
        return torch.cat(shards, -1)[:, : self.vocab_size].cpu().numpy()


def _tensors(batches: Sequence[Sequence[Tokens]], length: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for batch in batches:
        tokens = np.zeros((len(batch), length), dtype=np.int64)
        for row, sequence in enumerate(batch):
            tokens[row, : len(sequence)] = sequence
        last = np.array([len(sequence) - 1 for sequence in batch])
        positions = np.ascontiguousarray(np.broadcast_to(np.arange(length), tokens.shape))
        yield tuple(torch.from_numpy(value).cuda() for value in (tokens, positions, last))  # type: ignore[misc]


def _forward_step(data_iterator: Iterator[tuple[Tensor, Tensor, Tensor]], model: torch.nn.Module) -> Any:
    tokens, positions, last = next(data_iterator)
    output = model(tokens, positions, None)  # [b, s, V/tp] on the last stage

    def last_logits(output: Tensor, non_loss_data: bool) -> Tensor:
        return output[torch.arange(len(last), device=output.device), last]

    return output, last_logits


def _from_last_stage(value: Any) -> Any:
    """The last pipeline stage's value, on every stage."""
    from megatron.core import mpu

    values = [value]
    source = mpu.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast_object_list(values, source, group=mpu.get_pipeline_model_parallel_group())
    return values[0]
