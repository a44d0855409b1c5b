"""Continuous batched decoding from a Megatron model: plain generation, and pairs of streams mixed into one response.

One copy of the weights, one forward pass per step for all running sequences, each at its own position. A pair is two
rows of the batch: the question as it is, and the question with a hint. Slots of a response that ends are given to the
next request at once; the hinted row is given up as soon as the splitter is written. Tensor-parallel ranks call with the
same requests, keep their shard of the vocabulary and find the same tokens.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_idft.errors import InputError, NonFiniteLogitsError, UserError
from megatron_idft.inference.cache import Bank, KeyValueCache
from megatron_idft.inference.decode_forward import DecodeForward
from megatron_idft.inference.draws import draw
from megatron_idft.inference.memory import memory_for_cache
from megatron_idft.inference.requests import (
    Completion,
    DecodeSettings,
    FinishReason,
    Repetition,
    Request,
    Sampling,
    Stopping,
    Tokens,
)
from megatron_idft.inference.sampling import FIRST_CANDIDATES, choose
from megatron_idft.inference.served import ServedModel
from megatron_idft.loss import distribution_statistics, vocab_parallel_loss
from megatron_idft.statistics import LOWEST

_PREFILL_TOKENS = 16384  # padded tokens of prompts in one forward pass; at least one prompt
_SCORED_TOKENS = 4096  # the same where logits of all tokens are made


class _Sequence:
    """A response in the making. row, hinted_row: its slots; hinted_row None where only the plain stream runs."""

    __slots__ = ("hinted_row", "request", "row", "split_at", "tail", "tokens", "values")

    def __init__(self, request: Request, row: int, hinted_row: int | None) -> None:
        self.request, self.row, self.hinted_row = request, row, hinted_row
        self.tokens: list[int] = []
        self.values: list[NDArray[np.float64]] = []  # per token: log_prob, entropy, hint share, hinted entropy
        self.tail = ""
        self.split_at: int | None = None


class DecodeEngine:
    """Decodes from a model that this tensor-parallel group holds.

    Serves GPTModel, and HybridModel without state-space layers; dense and MoE; local and Transformer Engine layers;
    keys and values in the model's dtype; SDPA, or flash-attn's cache kernel where it is installed. On a GPU the forward
    pass of a step is a CUDA graph (not with experts, whose routing asks the host).

    Args:
        model: what Megatron's training setup returned: one chunk, without pipeline stages.
        vocab_size: rows of the true vocabulary; others are never drawn and take no part in any statistic.
        max_positions: the context; a response that reaches it in either stream ends there.
        max_rows: responses decoded at once, at most. An eighth more may go on after their splitter, without the hint.
        memory_bytes: for keys and values on this rank, at most. None: a share of what is free now, see memory.py.
        tell: is given a line for a person whenever more memory is allocated for them.

    Attributes:
        decoded_tokens: so far, for who shows progress.

    Raises:
        UnservedModelError: the model or its layout is not served.
    """

    def __init__(
        self,
        model: Sequence[torch.nn.Module],
        vocab_size: int,
        *,
        max_positions: int,
        max_rows: int,
        memory_bytes: int | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model = ServedModel(model, max_positions)
        self.vocab_size, self.max_positions, self.max_rows = vocab_size, max_positions, max_rows
        self.cache = KeyValueCache(self.model, memory_for_cache(memory_bytes, self.model.device, self.model.tp_group))
        self._forward = DecodeForward(self.model, self.cache)
        self._tell = tell
        self.decoded_tokens = 0
        self._banks: tuple[Bank, ...] = ()  # of the latest call
        self._kept = 0  # tokens that the last cut left: how many candidates the next one begins with

    def describe(self) -> str:
        """The budget of memory, and kernels, in one line for a person."""
        cache = self.cache
        attention = "SDPA" if cache.cudnn else "SDPA without cuDNN"
        if cache.flash_attention is not None:  # for one token at a time; prompts go through SDPA
            attention = f"flash-attn and {attention}"
        return (
            f"decode engine: up to {self.max_rows} responses at once, {self.max_positions:,} positions;"
            f" budget for keys and values on this rank {_size(cache.memory_bytes)}, allocated as needed,"
            f" {cache.bytes_per_token:,} bytes per token; attention by {attention}, CUDA graphs"
            f" {'on' if self._forward.graphs else 'off'}"
            + (
                f"; another {_size(packed)} for packed copies of the weights"
                if (packed := self._forward.packed.bytes)
                else ""
            )
        )

    def close(self) -> None:
        """Give the model its own attention back and free the slots."""
        self._forward.close()
        self.cache.close()

    def generate(
        self,
        prompts: Sequence[Tokens],
        record_ids: Sequence[str],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: Collection[int],
        on_done: Callable[[], None] = lambda: None,
    ) -> list[Tokens]:
        """Continuations of `prompts`, each up to and with its first stop token, or of `max_tokens` tokens.

        Called by all ranks with the same arguments; returns the same on all of them. A draw depends on (seed, record
        id, step) only. temperature 1 is the model's own distribution, 0 the most probable token. on_done is called
        after each continuation.
        """
        requests = [Request(id, prompt, seed=seed) for id, prompt in zip(record_ids, prompts, strict=True)]
        room = [i for i, prompt in enumerate(prompts) if len(prompt) < self.max_positions]
        found: list[Tokens] = [np.zeros(0, dtype=np.int32) for _ in prompts]
        settings = DecodeSettings(Sampling(temperature), Stopping(stop_ids, max_tokens))
        positions = {id(requests[i]): i for i in room}
        for completion in self.decode([requests[i] for i in room], settings):
            found[positions[id(completion.request)]] = completion.token_ids
            on_done()
        return found

    @torch.no_grad()
    def score(self, sequences: Sequence[Tokens]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """log_prob and entropy [n - 1] fp32 of each sequence of n >= 2 ids: of token t + 1 given those up to t.

        Nats, temperature 1, true vocabulary. The same on all ranks of the tensor-parallel group, which call it with the
        same sequences. Collectives: the layers' own and one all-gather of four numbers per token and batch.
        """
        found: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        for batch in _batches([len(sequence) - 1 for sequence in sequences], _SCORED_TOKENS):
            length = max(len(sequences[i]) for i in batch) - 1
            tokens = np.zeros((len(batch), length), dtype=np.int64)
            labels = np.full((len(batch), length), -100, dtype=np.int64)
            for row, i in enumerate(batch):
                n = len(sequences[i]) - 1
                tokens[row, :n], labels[row, :n] = sequences[i][:-1], sequences[i][1:]
            with self.cache.prefilling(None, self._tensor(np.zeros(0))):
                states = self.model.hidden_states(self._tensor(tokens), self._positions(tokens.shape))
            out = vocab_parallel_loss(
                self.model.logits(states),
                self._tensor(labels).transpose(0, 1),
                "ce",
                tp_group=self.model.tp_group,
                vocab_size=self.vocab_size,
            )
            log_prob, entropy = (x.transpose(0, 1).cpu().numpy() for x in (out.log_prob, out.entropy))
            for row, i in enumerate(batch):
                n = len(sequences[i]) - 1
                found[i] = log_prob[row, :n], entropy[row, :n]
        return [found[i] for i in range(len(sequences))]

    @torch.no_grad()
    def decode(self, requests: Sequence[Request], settings: DecodeSettings) -> Iterator[Completion]:
        """Yield the responses as they end. Which comes first depends on lengths; what they are does not.

        Called by all ranks of the tensor-parallel group with the same arguments. Abandoning the iterator is allowed, on
        all ranks at once; a later call takes over the slots, and an earlier iterator that goes on then says so.

        Raises:
            InputError: a prompt fills the context, or a hinted request without a mixing.
            UserError: not even one response fits into the memory.
            NonFiniteLogitsError: the model gives NaN or infinite logits for a request, which is named.
            RuntimeError: another call has taken over the slots.
        """
        requests = list(requests)
        self._check(requests, settings)
        if not requests:
            return
        plain, hinted = self._banks = self._make_banks(requests, settings.stopping.max_tokens)
        waiting = deque(requests)
        running: list[_Sequence] = []  # running[row] has the row of the plain bank
        paired: list[_Sequence] = []  # paired[row] has the row of the hinted bank
        while waiting or running:
            if self._banks[0] is not plain:
                raise RuntimeError(
                    "decode() was called again before its earlier iterator was exhausted: use one at a time"
                )
            self._admit(waiting, plain, hinted, running, paired)
            values = self._step(plain, hinted, running, paired, settings)
            self.decoded_tokens += len(running)
            # From the last to the first: the last row, which has been looked at by then, fills a row that is freed.
            for row in reversed(range(len(running))):
                sequence = running[row]
                finished = self._append(sequence, values[row], plain, hinted, settings.stopping)
                gone = finished is not None or sequence.split_at is not None
                if gone and sequence.hinted_row is not None:
                    _free(hinted, paired, sequence, "hinted_row")
                if finished is not None:
                    _free(plain, running, sequence, "row")
                    yield _completion(sequence, finished)

    def _check(self, requests: Sequence[Request], settings: DecodeSettings) -> None:
        for request in requests:
            prompts = [request.prompt] if request.hinted_prompt is None else [request.prompt, request.hinted_prompt]
            lengths = [len(prompt) for prompt in prompts]
            if min(lengths) == 0 or max(lengths) >= self.max_positions:
                raise InputError(
                    f"request {request.id}: prompts of {lengths} tokens leave no room for a response in a context of"
                    f" {self.max_positions}: shorten them or raise --seq-length"
                )
            if request.hinted_prompt is not None and settings.mixing is None:
                raise InputError(f"request {request.id} has a hinted prompt, but the settings name no mixing")
        if settings.stopping.splitter and settings.stopping.piece is None:
            raise InputError("a splitter is searched in the text of the tokens: pass `piece` with it")

    def _make_banks(self, requests: Sequence[Request], max_tokens: int) -> tuple[Bank, Bank]:
        """As many rows as memory, `max_rows` and the requests allow."""
        plain = max(self._capacity(len(request.prompt), max_tokens) for request in requests)
        prompts = [request.hinted_prompt for request in requests if request.hinted_prompt is not None]
        hinted = max((self._capacity(len(prompt), max_tokens) for prompt in prompts), default=0)
        per_row = (plain + hinted) * self.cache.bytes_per_token
        rows = min(self.max_rows, len(requests), self.cache.memory_bytes // per_row)
        if rows == 0:
            raise UserError(
                f"keys and values of one response take up to {per_row / 2**20:.0f} MiB on each rank, and"
                f" {self.cache.memory_bytes / 2**20:.0f} MiB are free for them: lower the longest response or"
                " --seq-length, raise --kv-memory-gb, or split the model over more GPUs (--tensor-model-parallel-size)"
            )
        extra = 0
        if prompts:
            # A response whose hinted row is given up goes on in the plain bank: with some rows more there, the next
            # pair need not wait for its end.
            spare = (self.cache.memory_bytes // self.cache.bytes_per_token - rows * (plain + hinted)) // plain
            extra = min(rows // 8, len(requests) - rows, spare)
        shapes = [(rows + extra, plain), (min(rows, len(prompts)), hinted)]
        before = self.cache.allocated_bytes
        first, second = self.cache.banks(shapes)
        if (allocated := self.cache.allocated_bytes) > before:
            pairs = f" + {second.slots} x {second.capacity:,} with the hint" if prompts else ""
            self._tell(
                f"decode engine: {_size(allocated)} allocated for keys and values on this rank, {first.slots} responses"
                f" x {first.capacity:,} positions{pairs}, of a budget of {_size(self.cache.memory_bytes)}"
            )
        return first, second

    def _capacity(self, prompt: int, max_tokens: int) -> int:
        # The last token of a response is never fed. Rounded, so that calls of like lengths share CUDA graphs.
        return min(-(-(prompt + max_tokens) // 256) * 256, self.max_positions)

    def _admit(
        self,
        waiting: deque[Request],
        plain: Bank,
        hinted: Bank,
        running: list[_Sequence],
        paired: list[_Sequence],
    ) -> None:
        """Start requests in their order while there are slots for them."""
        started: list[_Sequence] = []
        while waiting and plain.active < plain.slots:
            request = waiting[0]
            if request.hinted_prompt is not None and hinted.active == hinted.slots:
                break
            waiting.popleft()
            hinted_row = None if request.hinted_prompt is None else hinted.take(request.hinted_prompt)
            sequence = _Sequence(request, plain.take(request.prompt), hinted_row)
            started.append(sequence)
            running.append(sequence)
            if hinted_row is not None:
                paired.append(sequence)
        self._prefill(plain, [(sequence.row, sequence.request.prompt) for sequence in started])
        pairs = [(s.hinted_row, s.request.hinted_prompt) for s in started]
        self._prefill(hinted, [(row, prompt) for row, prompt in pairs if row is not None and prompt is not None])

    def _prefill(self, bank: Bank, prompts: Sequence[tuple[int, Tokens]]) -> None:
        """Keys and values of all but the last token of each prompt, which the next step feeds."""
        prompts = [(row, prompt) for row, prompt in prompts if len(prompt) > 1]
        for batch in _batches([len(prompt) - 1 for _, prompt in prompts], _PREFILL_TOKENS):
            length = max(len(prompts[i][1]) for i in batch) - 1
            tokens = np.zeros((len(batch), length), dtype=np.int64)
            for row, i in enumerate(batch):
                tokens[row, : len(prompts[i][1]) - 1] = prompts[i][1][:-1]
            slots = self._tensor(np.array([prompts[i][0] for i in batch]))
            with self.cache.prefilling(bank, slots):
                self.model.hidden_states(self._tensor(tokens), self._positions(tokens.shape))

    def _step(
        self,
        plain: Bank,
        hinted: Bank,
        running: Sequence[_Sequence],
        paired: Sequence[_Sequence],
        settings: DecodeSettings,
    ) -> NDArray[np.float64]:
        """[rows, 5] of the next token of each running sequence: id, log_prob, entropy, hint share, hinted entropy."""
        n = plain.active
        logits = self._forward([plain, hinted])  # [n + hinted.active, V/tp]
        merged, shard = distribution_statistics(logits, tp_group=self.model.tp_group, vocab_size=self.vocab_size)
        log_probs = logits[:, : shard.valid_columns].float()
        # In place, and finite, so that a share of 0 of either stream is 0 of it.
        log_probs = log_probs.sub_(merged.max[:, None]).sub_(merged.sum_exp.log()[:, None]).clamp_(min=LOWEST)
        scores, own = log_probs[:n], log_probs[:n]
        plain_share = torch.ones(n, device=scores.device)
        hinted_entropy = torch.full_like(plain_share, torch.nan)
        if paired:
            assert settings.mixing is not None
            rows = self._tensor(np.array([sequence.row for sequence in paired]))
            share = settings.mixing.plain_share(merged.entropy[n:])
            if settings.mixing.first_token_hinted:
                share = share.where(self._tensor(np.array([bool(sequence.tokens) for sequence in paired])), 0.0)
            plain_share[rows], hinted_entropy[rows] = share, merged.entropy[n:]
            scores = own.index_copy(0, rows, torch.lerp(log_probs[n:], own[rows], share[:, None]))
        draws = np.array([draw(s.request.seed, s.request.id, len(s.tokens)) for s in running])
        chosen = choose(
            scores, own, settings.sampling, self._tensor(draws), shard, candidates=max(FIRST_CANDIDATES, 2 * self._kept)
        )
        self._kept = chosen.kept
        columns = [chosen.tokens, chosen.log_prob, merged.entropy[:n], 1 - plain_share.double(), hinted_entropy]
        values = torch.stack([column.double() for column in columns], -1).cpu().numpy()
        broken = np.flatnonzero(~np.isfinite(values[:, :3]).all(-1))
        if len(broken):
            name = running[int(broken[0])].request.id
            raise NonFiniteLogitsError(
                f"request {name}: the model gives NaN or infinite logits: check the checkpoint, or pass --bf16 for"
                " --fp16"
            )
        return values

    def _append(
        self, sequence: _Sequence, values: NDArray[np.float64], plain: Bank, hinted: Bank, stopping: Stopping
    ) -> FinishReason | None:
        """Add a token to a sequence; why the response ends with it, None if it goes on."""
        token = int(values[0])
        sequence.tokens.append(token)
        sequence.values.append(values[1:])
        lengths = []
        for bank, row in ((plain, sequence.row), (hinted, sequence.hinted_row)):
            if row is not None:
                bank.tokens[row] = token
                bank.lengths[row] += 1
                lengths.append(int(bank.lengths[row]) + 1)
        count = len(sequence.tokens)
        if stopping.splitter and stopping.piece is not None and sequence.hinted_row is not None:
            # Far enough back to find the splitter across tokens, however short they are.
            sequence.tail = (sequence.tail + stopping.piece(token))[-len(stopping.splitter) - 256 :]
            if stopping.splitter in sequence.tail:
                sequence.split_at = count
        if token in stopping.stop_ids and (count > 1 or stopping.stop_on_first_token):
            return "eos"
        if count >= stopping.max_tokens:
            return "length"
        if max(lengths) >= self.max_positions:
            return "context"
        repetition = stopping.repetition
        if repetition is not None and count % repetition.every == 0 and _repeats(sequence.tokens, repetition):
            return "repetition"
        return None

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.model.device, non_blocking=True)

    def _positions(self, shape: tuple[int, ...]) -> Tensor:
        return torch.arange(shape[1], device=self.model.device).expand(shape)


def _batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of lengths that go together, up to so many padded tokens, the longest first: running out of memory shows
    at once."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _repeats(tokens: Sequence[int], repetition: Repetition) -> bool:
    words, size = np.array(tokens, dtype=np.int32).tobytes(), 4 * repetition.ngram
    counts = Counter(words[begin : begin + size] for begin in range(0, len(words) - size + 1, 4))
    return max(counts.values(), default=0) >= repetition.count


def _completion(sequence: _Sequence, reason: FinishReason) -> Completion:
    log_prob, entropy, hint_share, hinted_entropy = np.array(sequence.values, dtype=np.float32).T
    tokens = np.array(sequence.tokens, dtype=np.int32)
    return Completion(
        sequence.request, tokens, reason, log_prob, entropy, hint_share, hinted_entropy, sequence.split_at
    )


def _free(bank: Bank, owners: list[_Sequence], sequence: _Sequence, name: str) -> None:
    """Give up a sequence's slot; the owner of the slot that moves into it is updated."""
    slot = getattr(sequence, name)
    moved = bank.free(slot)
    last = owners.pop()
    if moved is not None:
        owners[slot] = last
        setattr(last, name, slot)
    setattr(sequence, name, None)


def _size(count: int) -> str:
    """Bytes, for a person."""
    return f"{count / 2**30:.2f} GiB" if count >= 1 << 30 else f"{count / 2**20:.2f} MiB"
