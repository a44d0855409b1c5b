"""Forward passes of a Megatron model that yield each token's log-probability and entropy, under any TP, PP, DP and EP.

The model runs as in training: labels go in with the tokens, and the hook's place in the model (see hook.py) turns this
rank's shard of the logits into the two statistics with one collective. The vocabulary is never gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_idft.errors import UnsupportedModelError
from megatron_idft.integration.loss.hook import IGNORED_LABEL, LossHook, MicroBatch, language_models
from megatron_idft.integration.offline.causal_attention import Documents
from megatron_idft.integration.offline.top_tokens import top_tokens
from megatron_idft.loss import vocab_parallel_loss
from megatron_idft.objectives import ce

Statistics = tuple[NDArray[Any], ...]  # log_prob, entropy, and where they are asked for, ids and log_prob of the top K


class StatisticsHook(LossHook):
    """Makes `model(…, labels=…)` return [b, s, 2 + 2 K] fp32 instead of the loss: log_prob, entropy, and of the K most
    probable tokens the ids, which fp32 holds exactly up to 2^24, and the log_prob.

    Args:
        top_k: K, 0 or more.

    Attributes:
        rows: int64 [k], the places in [s, b], flattened, whose logits the next pass makes: of a record's question none
            is read. The others are NaN. None: all, and so under sequence parallelism, where a rank has a part of the
            places, and with multi-token prediction, whose heads share the output layer.
    """

    rows: Tensor | None = None

    def __init__(self, model: Any, vocab_size: int, backend: str, top_k: int = 0) -> None:
        super().__init__(model, ce(), vocab_size, backend, metrics=None)
        self._top_k, self._true_size = top_k, vocab_size
        self._selects = not (model.config.sequence_parallel or model.config.mtp_num_layers)

    def attach(self) -> None:
        super().attach()
        if self._selects:
            self._undo.append(self.model.output_layer.register_forward_pre_hook(self._select).remove)

    def _select(self, output_layer: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.rows is None or not self._pending:
            return None
        states, *others = args  # [s, b, h]
        return states.flatten(0, 1)[self.rows].unsqueeze(1), *others

    def _main_head_loss(self, micro_batch: MicroBatch, logits: Tensor) -> Tensor:
        self._require_shard(logits)
        labels, rows = micro_batch.labels.transpose(0, 1), self.rows if self._selects else None
        out = vocab_parallel_loss(
            logits,
            labels if rows is None else labels.reshape(-1, 1)[rows],
            "ce",
            tp_group=self.model.pg_collection.tp,
            vocab_size=self.vocab_size,
            backend=self.backend,
        )
        found = torch.stack([out.log_prob, out.entropy], -1)
        if self._top_k:
            found = torch.cat([found, *self._top(logits)], -1)
        if rows is not None:
            everywhere = found.new_full((labels.numel(), found.shape[-1]), torch.nan)
            everywhere[rows] = found[:, 0]
            found = everywhere.view(*labels.shape, found.shape[-1])
        return found.transpose(0, 1).contiguous()

    def _top(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids, log_prob = top_tokens(
            logits,
            self._top_k,
            tp_group=self.model.pg_collection.tp,
            vocab_size=self._true_size,
            backend=self.backend,
        )
        return ids.float(), log_prob


class _Places(NamedTuple):
    """Of a batch: its shape [b, s], each record's row and where it begins there; lengths of those that share a row."""

    shape: tuple[int, int]
    starts: list[tuple[int, int]]
    lengths: list[int] | None


class ModelScorer:
    """Scores token sequences with a model that every rank holds its part of.

    Args:
        model: the (virtual) pipeline chunks of this rank, as Megatron's training setup returns them, without gradient
            buffers (`--skip-train`).
        vocab_size: rows of the true vocabulary.
        tokens_per_batch: padded tokens in one micro-batch; at least one sequence.
        backend: as in `vocab_parallel_loss`.
        top_k: how many of the most probable tokens of each place are given, too.

    Raises:
        UnsupportedModelError: the hook cannot reach the model's loss, or there is context parallelism.
    """

    def __init__(
        self,
        model: Sequence[torch.nn.Module],
        vocab_size: int,
        tokens_per_batch: int,
        backend: str,
        top_k: int = 0,
    ) -> None:
        from megatron.core import mpu
        from megatron.core.utils import get_model_config

        if mpu.get_context_parallel_world_size() > 1:
            raise UnsupportedModelError("context parallelism is not served in scoring: use --context-parallel-size 1")
        self.model, self._top_k = list(model), top_k
        self.tokens_per_batch = tokens_per_batch
        self.hooks = [
            StatisticsHook(language_model, vocab_size, backend, top_k)
            for language_model in language_models(self.model)
            if getattr(language_model, "post_process", True)
        ]
        for hook in self.hooks:
            hook.attach()
        for chunk in self.model:
            chunk.eval()
        self.documents = Documents(self.model)
        config = get_model_config(self.model[0])
        config.variable_seq_lengths = True  # micro-batches of different lengths share one pipeline pass
        self._multiple = mpu.get_tensor_model_parallel_world_size() if config.sequence_parallel else 1

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[NDArray[np.integer]],
        masks: Sequence[NDArray[np.integer]] | None = None,
        on_done: Callable[[Sequence[int]], None] = lambda indices: None,
    ) -> list[Statistics] | None:
        """log_prob and entropy [n - 1] fp32 of each sequence of n >= 2 token ids: of token t + 1 given those up to t.

        With `top_k` also the ids int32 and log_prob fp32 [n - 1, K] of the most probable tokens in its place.

        Called by all ranks with the same sequences. Data-parallel replicas share the work.

        Args:
            sequences: the token ids.
            masks: [n] each, not 0 where a token's statistics are read, as of one at least after the first. What they
                leave out may be NaN. None: all are read.
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
            forward_step_func=self._forward_step,
            data_iterator=[
                *(self._tensors(sequences, mine, masks) for _ in self.model[1:]),
                _told(self._tensors(sequences, mine, masks), batches, replicas, on_done),
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
            index: self._columns(row[: len(sequences[index]) - 1])
            for batch, output in zip(mine, outputs, strict=True)
            for index, row in zip(batch, self._split(output.cpu().numpy(), sequences, batch), strict=True)
        }
        group = mpu.get_data_parallel_group()
        gathered: list[Any] | None = [None] * replicas if replica == 0 else None
        torch.distributed.gather_object(found, gathered, torch.distributed.get_global_rank(group, 0), group)
        if gathered is None:
            return None
        merged: dict[int, Statistics] = {index: pair for part in gathered for index, pair in part.items()}
        return [merged[index] for index in range(len(sequences))]

    def _forward_step(
        self, data_iterator: Iterator[dict[str, Any]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[..., Tensor]]:
        batch = next(data_iterator)
        # Padding stands on the right, where a causal model does not look.
        with self.fed(batch):
            output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, lambda output, non_loss_data: output

    @contextmanager
    def fed(self, batch: dict[str, Any]) -> Iterator[None]:
        """While it lasts, the model takes its input for this batch, and makes the logits that the batch needs."""
        with ExitStack() as stack:
            if self.documents.served:
                stack.enter_context(self.documents.within(batch["lengths"], batch["position_ids"][0]))
            for hook in self.hooks:
                hook.rows = batch["rows"]
                stack.callback(setattr, hook, "rows", None)
            yield

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
        self,
        sequences: Sequence[NDArray[np.integer]],
        batches: Sequence[Sequence[int]],
        masks: Sequence[NDArray[np.integer]] | None = None,
    ) -> Iterator[dict[str, Any]]:
        for batch in batches:
            places = self._places([len(sequences[index]) - 1 for index in batch])
            tokens, positions = (np.zeros(places.shape, dtype=np.int64) for _ in range(2))
            labels = np.full(places.shape, IGNORED_LABEL, dtype=np.int64)
            for index, (row, begin) in zip(batch, places.starts, strict=True):
                sequence, n = sequences[index], len(sequences[index]) - 1
                tokens[row, begin : begin + n], labels[row, begin : begin + n] = sequence[:-1], sequence[1:]
                positions[row, begin : begin + n] = np.arange(n)
                if masks is not None:
                    labels[row, begin : begin + n][masks[index][1:] == 0] = IGNORED_LABEL
            if not self.documents.served:
                positions[:] = np.arange(positions.shape[1])
            rows = np.flatnonzero(labels.T != IGNORED_LABEL)
            arrays = (("tokens", tokens), ("labels", labels), ("position_ids", positions), ("rows", rows))
            tensors: dict[str, Any] = {name: torch.from_numpy(value).cuda(non_blocking=True) for name, value in arrays}
            yield tensors | {"lengths": places.lengths}

    def _places(self, lengths: Sequence[int]) -> _Places:
        """Where the records of a batch stand: side by side with padding, or after each other in one row."""
        if not self.documents.served:
            return _Places((len(lengths), self._padded(max(lengths))), [(row, 0) for row in range(len(lengths))], None)
        used = sum(lengths)
        padding = self._padded(used) - used
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        return _Places(
            (1, used + padding), [(0, begin) for begin in starts], [*lengths, *([padding] if padding else [])]
        )

    def _split(
        self, output: NDArray[np.float32], sequences: Sequence[NDArray[np.integer]], batch: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """[b, s, C] -> of each record [at least n - 1, C]."""
        places = self._places([len(sequences[index]) - 1 for index in batch])
        return [output[row, begin:] for row, begin in places.starts]

    def _columns(self, row: NDArray[np.float32]) -> Statistics:
        """[n - 1, 2 + 2 K] -> its statistics."""
        if not self._top_k:
            return row[:, 0], row[:, 1]
        ids, log_prob = np.split(row[:, 2:], 2, axis=-1)
        return row[:, 0], row[:, 1], np.nan_to_num(ids, nan=-1).astype(np.int32), log_prob


def _told(
    tensors: Iterator[dict[str, Any]],
    batches: Sequence[Sequence[int]],
    replicas: int,
    on_done: Callable[[Sequence[int]], None],
) -> Iterator[dict[str, Any]]:
    """`tensors`, of one round each. A round is done when the next one is asked for."""
    for round_number, batch in enumerate(tensors):
        if round_number:
            on_done([i for done in batches[(round_number - 1) * replicas : round_number * replicas] for i in done])
        yield batch
