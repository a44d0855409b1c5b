"""Forward passes of a Megatron model that yield each token's log-probability and entropy, under any TP, PP, DP and EP.

The model runs as in training: labels go in with the tokens, and the hook's place in the model (see hook.py) turns this
rank's shard of the logits into the two statistics with one collective. The vocabulary is never gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_idft.errors import UnsupportedModelError
from megatron_idft.integration.loss.hook import LossHook, language_models
from megatron_idft.loss import vocab_parallel_loss
from megatron_idft.objectives import ce

Statistics = tuple[NDArray[np.float32], NDArray[np.float32]]


class StatisticsHook(LossHook):
    """Makes `model(…, labels=…)` return [b, s, 2] fp32, log_prob and entropy, instead of the loss."""

    def __init__(self, model: Any, vocab_size: int | None, backend: str) -> None:
        super().__init__(model, ce(), vocab_size, backend, metrics=None)

    def _main_head_loss(self, labels: Tensor, loss_mask: Tensor | None, logits: Tensor) -> Tensor:
        self._require_shard(logits)
        out = vocab_parallel_loss(
            logits,
            labels.transpose(0, 1),
            "ce",
            tp_group=self.model.pg_collection.tp,
            vocab_size=self.vocab_size,
            backend=self.backend,
        )
        return torch.stack([out.log_prob, out.entropy], -1).transpose(0, 1).contiguous()


class ModelScorer:
    """Scores token sequences with a model that every rank holds its part of.

    Args:
        model: the (virtual) pipeline chunks of this rank, as Megatron's training setup returns them, without gradient
            buffers (`--skip-train`).
        vocab_size: rows of the true vocabulary.
        tokens_per_batch: padded tokens in one micro-batch; at least one sequence.
        backend: as in `vocab_parallel_loss`.

    Raises:
        UnsupportedModelError: the hook cannot reach the model's loss, or there is context parallelism.
    """

    def __init__(self, model: Sequence[torch.nn.Module], vocab_size: int, tokens_per_batch: int, backend: str) -> None:
        from megatron.core import mpu
        from megatron.core.utils import get_model_config

        if mpu.get_context_parallel_world_size() > 1:
            raise UnsupportedModelError("context parallelism is not served in scoring: use --context-parallel-size 1")
        self.model = list(model)
        self.tokens_per_batch = tokens_per_batch
        self.hooks = [
            StatisticsHook(language_model, vocab_size, backend)
            for language_model in language_models(self.model)
            if getattr(language_model, "post_process", True)
        ]
        for hook in self.hooks:
            hook.attach()
        for chunk in self.model:
            chunk.eval()
        config = get_model_config(self.model[0])
        config.variable_seq_lengths = True  # micro-batches of different lengths share one pipeline pass
        self._multiple = mpu.get_tensor_model_parallel_world_size() if config.sequence_parallel else 1

    @torch.no_grad()
    def score(
        self, sequences: Sequence[NDArray[np.integer]], on_done: Callable[[Sequence[int]], None] = lambda indices: None
    ) -> list[Statistics] | None:
        """log_prob and entropy [n - 1] fp32 of each sequence of n >= 2 token ids: of token t + 1 given those up to t.

        Called by all ranks with the same sequences. Data-parallel replicas share the work.

        Args:
            sequences: token ids.
            on_done: is told, on the last pipeline stage, which sequences this replica and the others have done, all
                but those of the last round.

        Returns:
            the statistics in the order of `sequences` on rank 0 of the data-parallel group of the last pipeline stage;
            None on the other ranks. Collectives: those of the model's forward passes; one object gather over the
            data-parallel group.
        """
        from megatron.core import mpu
        from megatron.core.pipeline_parallel import get_forward_backward_func

        batches = self._batches(sequences)
        replica, replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        # As many on every replica, and on every virtual stage: experts and pipelines work in lockstep.
        rounds = -(-len(batches) // replicas)
        stages = mpu.get_pipeline_model_parallel_world_size()
        if len(self.model) > 1:
            rounds = -(-rounds // stages) * stages
        mine = [batches[min(r * replicas + replica, len(batches) - 1)] for r in range(rounds)]
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[
                *(self._tensors(sequences, mine) for _ in self.model[1:]),
                _told(self._tensors(sequences, mine), batches, replicas, on_done),
            ],
            model=self.model,
            num_microbatches=rounds,
            seq_length=self._padded(max(len(sequence) for sequence in sequences) - 1),
            micro_batch_size=1,  # of no consequence: shapes travel with the tensors
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            return None
        found = {
            index: (row[: len(sequences[index]) - 1, 0], row[: len(sequences[index]) - 1, 1])
            for batch, output in zip(mine, outputs, strict=True)
            for index, row in zip(batch, output.cpu().numpy(), strict=True)
        }
        group = mpu.get_data_parallel_group()
        gathered: list[Any] | None = [None] * replicas if replica == 0 else None
        torch.distributed.gather_object(found, gathered, torch.distributed.get_global_rank(group, 0), group)
        if gathered is None:
            return None
        merged: dict[int, Statistics] = {index: pair for part in gathered for index, pair in part.items()}
        return [merged[index] for index in range(len(sequences))]

    def _batches(self, sequences: Sequence[NDArray[np.integer]]) -> list[list[int]]:
        """Indices of sequences of like length, longest first: running out of memory shows at once."""
        batches: list[list[int]] = []
        for index in sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i)):
            longest = self._padded(len(sequences[batches[-1][0]]) - 1) if batches else 0
            if not batches or (len(batches[-1]) + 1) * longest > self.tokens_per_batch:
                batches.append([])
            batches[-1].append(index)
        return batches

    def _padded(self, length: int) -> int:
        return -(-length // self._multiple) * self._multiple

    def _tensors(
        self, sequences: Sequence[NDArray[np.integer]], batches: Sequence[Sequence[int]]
    ) -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            length = self._padded(max(len(sequences[index]) for index in batch) - 1)
            tokens = np.zeros((len(batch), length), dtype=np.int64)
            labels = np.full((len(batch), length), -100, dtype=np.int64)
            for row, index in enumerate(batch):
                sequence = sequences[index]
                tokens[row, : len(sequence) - 1] = sequence[:-1]
                labels[row, : len(sequence) - 1] = sequence[1:]
            positions = np.broadcast_to(np.arange(length), tokens.shape)
            yield {
                name: torch.from_numpy(np.ascontiguousarray(value)).cuda(non_blocking=True)
                for name, value in (("tokens", tokens), ("labels", labels), ("position_ids", positions))
            }


def _told(
    tensors: Iterator[dict[str, Tensor]],
    batches: Sequence[Sequence[int]],
    replicas: int,
    on_done: Callable[[Sequence[int]], None],
) -> Iterator[dict[str, Tensor]]:
    """`tensors`, of one round each. A round is done when the next one is asked for."""
    for round_number, batch in enumerate(tensors):
        if round_number:
            on_done([i for done in batches[(round_number - 1) * replicas : round_number * replicas] for i in done])
        yield batch


def _forward_step(
    data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Callable[..., Tensor]]:
    batch = next(data_iterator)
    # Padding stands on the right, where a causal model does not look.
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, lambda output, non_loss_data: output
