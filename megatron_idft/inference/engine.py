"""Continuous batched decoding from a Megatron model: plain generation, and pairs of streams mixed into one response.

One copy of the weights, one forward pass per step for all running sequences, each at its own position and with its own
settings. A pair is two rows of the batch: the question as it is, and the question with a hint. The blocks of a response
that ends are given to the next request at once; the hinted row is given up as soon as the splitter is written.
Tensor-parallel ranks are fed the same requests, keep their shard of the vocabulary and find the same tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_idft.errors import InputError, NonFiniteLogitsError, UserError
from megatron_idft.inference.attention import Prefill
from megatron_idft.inference.blocks import BlockPool
from megatron_idft.inference.cache import KeyValueCache
from megatron_idft.inference.decode_forward import DecodeForward
from megatron_idft.inference.draws import draw
from megatron_idft.inference.memory import memory_for_cache
from megatron_idft.inference.prefill import Prefiller, batches
from megatron_idft.inference.requests import (
    Completion,
    DecodeSettings,
    FinishReason,
    Mixing,
    Repetition,
    Request,
    Sampling,
    Stopping,
    Tokens,
)
from megatron_idft.inference.sampling import FIRST_CANDIDATES, choose
from megatron_idft.inference.scheduler import Feed, Response, Scheduler
from megatron_idft.inference.served import ServedModel
from megatron_idft.loss import distribution_statistics, vocab_parallel_loss
from megatron_idft.loss.shard import VocabShard
from megatron_idft.statistics import LOWEST

_SCORED_TOKENS = 4096  # padded tokens in one forward pass that makes the logits of all; at least one sequence


class DecodeEngine:
    """Decodes from a model that this tensor-parallel group holds.

    Serves GPTModel, and HybridModel without state-space layers; dense and MoE; local and Transformer Engine layers;
    keys and values in blocks, in the model's dtype. On a CPU attention is SDPA's; on a GPU one token at a time goes
    through flash-attn's cache kernel where it is installed, else one of our own, and a step's forward pass is a CUDA
    graph (not with experts, whose routing asks the host).

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
        self._prefill = Prefiller(self.model, self.cache, max_positions)
        self._scheduler = Scheduler(BlockPool(1, 1), 0, lambda number, request: self._accept(number, request, None))
        # Of each sampling: tokens that its last cut left, hence how many candidates the next one begins with.
        self._kept: dict[Sampling, int] = {}

    def describe(self) -> str:
        """The budget of memory, and kernels, in one line for a person."""
        cache = self.cache
        attention = "SDPA" if cache.cudnn else "SDPA without cuDNN"
        if cache.model.device.type != "cpu":  # for one token at a time; prompts go through SDPA
            attention = f"{'paged kernel' if cache.flash_attention is None else 'flash-attn'} and {attention}"
        return (
            f"decode engine: up to {self.max_rows} responses at once, {self.max_positions:,} positions;"
            f" budget for keys and values on this rank {_size(cache.memory_bytes)}, {cache.bytes_per_token:,}"
            f" bytes per token in blocks of {cache.block_size}; attention by {attention}, CUDA graphs"
            f" {'on' if self._forward.graphs else 'off'}"
            + (
                f"; another {_size(packed)} for packed copies of the weights"
                if (packed := self._forward.packed.bytes)
                else ""
            )
        )

    def describe_prompts(self) -> str:
        """What of the prompts so far was computed, in one line for a person."""
        found, prompts = self.found_tokens, self.prompt_tokens
        return (
            f"prompts had {prompts:,} tokens, of which {found:,} ({found / max(prompts, 1):.0%}) had been computed for"
            " an earlier one"
        )

    def close(self) -> None:
        """Give the model its own attention and settings back and free the blocks."""
        self._forward.close()
        self.cache.close()
        self.model.close()

    def forget_prompts(self) -> None:
        """Compute the next prompts anew, also those that earlier calls have computed."""
        if self.cache.pool is not None:
            self.cache.pool.forget()

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
        for batch in batches([len(sequence) - 1 for sequence in sequences], _SCORED_TOKENS):
            length = max(len(sequences[i]) for i in batch) - 1
            tokens = np.zeros((len(batch), length), dtype=np.int64)
            labels = np.full((len(batch), length), -100, dtype=np.int64)
            for row, i in enumerate(batch):
                n = len(sequences[i]) - 1
                tokens[row, :n], labels[row, :n] = sequences[i][:-1], sequences[i][1:]
            with self.cache.prefilling(Prefill()):
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

    def decode(self, requests: Sequence[Request], settings: DecodeSettings | None = None) -> Iterator[Completion]:
        """Yield the responses to some requests; `serve` says how.

        Args:
            requests: to be decoded.
            settings: of those that carry none.
        """
        requests = list(requests)
        for number, request in enumerate(requests):
            self._accept(number, request, settings)  # refused before the first one is decoded
        rest = iter(requests)
        return self.serve(lambda: next(rest, None), settings)

    @torch.no_grad()
    def serve(self, feed: Feed, settings: DecodeSettings | None = None) -> Iterator[Completion]:
        """Yield the responses as they end. Which comes first depends on lengths; what they are does not.

        Called by all ranks of the tensor-parallel group with feeds that return the same. Abandoning the iterator is
        allowed, on all ranks at once; a later call takes over the blocks, and an earlier iterator that goes on then
        says so.

        Args:
            feed: asked for the next request whenever there is room for one, also between two responses. It ends when
                nothing is decoded and the feed has nothing.
            settings: of requests that carry none.

        Raises:
            InputError: a prompt fills the context, or a hinted request without a mixing.
            UserError: a response does not fit into the memory.
            NonFiniteLogitsError: the model gives NaN or infinite logits for a request, which is named.
            RuntimeError: another call has taken over the blocks.
        """
        self._scheduler.abandon()
        pool = self._open_pool()
        scheduler = Scheduler(pool, self.max_rows, lambda number, request: self._accept(number, request, settings))
        self._scheduler = scheduler
        while True:
            scheduler.grow()
            self._prefill(scheduler.admit(feed))
            pool.computed()
            running = list(scheduler.running)
            if not running:
                return
            values = self._step(running)
            self.decoded_tokens += len(running)
            for response, value in zip(running, values, strict=True):
                finished = self._append(response, value)
                if finished is None and response.split_at is not None:
                    scheduler.drop_hint(response)
                if finished is not None:
                    scheduler.finish(response)
                    yield _completion(response, finished)
                    self._require_current(scheduler)

    def _require_current(self, scheduler: Scheduler) -> None:
        if self._scheduler is not scheduler:
            raise RuntimeError("decode() was called again before its earlier iterator was exhausted: use one at a time")

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts so far, but for the last one of each."""
        return 0 if self.cache.pool is None else self.cache.pool.prompt_tokens

    @property
    def preempted(self) -> int:
        """How often a response of the latest call gave its blocks to older ones, and was computed again."""
        return self._scheduler.preempted

    @property
    def found_tokens(self) -> int:
        """How many of `prompt_tokens` an earlier row had computed."""
        return 0 if self.cache.pool is None else self.cache.pool.found_tokens

    def _accept(self, number: int, request: Request, settings: DecodeSettings | None) -> Response:
        """A response for a request, which is refused if it can never be decoded."""
        settings = request.settings or settings
        if settings is None:
            raise ValueError(f"request {request.id} has no settings, and the call names none")
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
        return Response(number, request, settings, self._longest(lengths, settings.stopping))

    def _longest(self, prompts: Sequence[int], stopping: Stopping) -> int:
        """The tokens that a response may have: as many as asked for, or as the memory holds beside nothing else."""
        tokens = stopping.max_tokens
        must = tokens if stopping.must_fit is None else min(stopping.must_fit, tokens)
        while (needed := self._bytes(prompts, tokens)) > self.cache.memory_bytes:
            if tokens == must:
                raise UserError(
                    f"keys and values of one response take up to {_size(needed)} on each rank, and"
                    f" {_size(self.cache.memory_bytes)} are free for them: lower the longest response or --seq-length,"
                    " raise --kv-memory-gb, or split the model over more GPUs (--tensor-model-parallel-size)"
                )
            tokens = max(must, tokens - self.cache.block_size)
        return tokens

    def _bytes(self, prompts: Sequence[int], tokens: int) -> int:
        """Of the blocks of one response of so many tokens, and of the block that is nobody's."""
        size = self.cache.block_size
        blocks = sum(-(-min(n + tokens, self.max_positions) // size) for n in prompts) + 1
        return blocks * size * self.cache.bytes_per_token

    def _open_pool(self) -> BlockPool:
        before = self.cache.pool
        pool = self.cache.open_pool(self.max_positions, 2 * (self.max_rows + self.max_rows // 8))
        if pool is not before:
            used = "committed as they are written" if self.model.device.type == "cpu" else "allocated"
            self._tell(
                f"decode engine: {_size(self.cache.allocated_bytes)} for keys and values on this rank, {used},"
                f" {pool.blocks:,} blocks of {pool.size} positions, of a budget of {_size(self.cache.memory_bytes)}"
            )
        return pool

    def _step(self, running: Sequence[Response]) -> NDArray[np.float64]:
        """[rows, 5] of the next token of each running response: id, log_prob, entropy, hint share, hinted entropy."""
        n = len(running)
        paired = [i for i, response in enumerate(running) if response.hinted is not None]
        hinted_rows = [response.hinted for response in running if response.hinted is not None]
        logits = self._forward([*(response.plain for response in running), *hinted_rows])
        merged, shard = distribution_statistics(logits, tp_group=self.model.tp_group, vocab_size=self.vocab_size)
        log_probs = logits[:, : shard.valid_columns].float()
        # In place, and finite, so that a share of 0 of either stream is 0 of it.
        log_probs = log_probs.sub_(merged.max[:, None]).sub_(merged.sum_exp.log()[:, None]).clamp_(min=LOWEST)
        scores, own = log_probs[:n], log_probs[:n]
        plain_share = torch.ones(n, device=scores.device)
        hinted_entropy = torch.full_like(plain_share, torch.nan)
        if paired:
            rows = self._tensor(np.array(paired))
            share = self._plain_shares([running[i] for i in paired], merged.entropy[n:])
            plain_share[rows], hinted_entropy[rows] = share, merged.entropy[n:]
            if len(paired) == n:  # as a rule; a copy of both streams less
                scores = torch.lerp(log_probs[n:], own, share[:, None])
            else:
                scores = own.index_copy(0, rows, torch.lerp(log_probs[n:], own[rows], share[:, None]))
        tokens, log_prob = self._choose(running, scores, own, shard)
        columns = [tokens, log_prob, merged.entropy[:n], 1 - plain_share.double(), hinted_entropy]
        values = torch.stack([column.double() for column in columns], -1).cpu().numpy()
        broken = np.flatnonzero(~np.isfinite(values[:, :3]).all(-1))
        if len(broken):
            name = running[int(broken[0])].request.id
            raise NonFiniteLogitsError(
                f"request {name}: the model gives NaN or infinite logits: check the checkpoint, or pass --bf16 for"
                " --fp16"
            )
        return values

    def _plain_shares(self, paired: Sequence[Response], entropy: Tensor) -> Tensor:
        """[pairs] fp32 from the entropies of their hinted streams."""

        def shares(mixing: Mixing, group: Sequence[Response], entropy: Tensor) -> Tensor:
            found = mixing.plain_share(entropy)
            if not mixing.first_token_hinted:
                return found
            return found.where(self._tensor(np.array([bool(response.tokens) for response in group])), 0.0)

        mixings = [response.settings.mixing for response in paired]
        groups = _groups(mixings)
        if len(groups) == 1:
            assert mixings[0] is not None
            return shares(mixings[0], paired, entropy)
        result = torch.empty_like(entropy)
        for mixing, members in groups.items():
            assert mixing is not None
            rows = self._tensor(np.array(members))
            result[rows] = shares(mixing, [paired[i] for i in members], entropy[rows])
        return result

    def _choose(
        self, running: Sequence[Response], scores: Tensor, own: Tensor, shard: VocabShard
    ) -> tuple[Tensor, Tensor]:
        """The next tokens and their log_probs, each [rows], drawn in groups of the same sampling."""
        draws = np.array([draw(s.request.seed, s.request.id, len(s.tokens)) for s in running])
        groups = _groups([response.settings.sampling for response in running])
        tokens = torch.empty(len(running), dtype=torch.int64, device=scores.device)
        log_prob = torch.empty(len(running), dtype=torch.float64, device=scores.device)
        for sampling, members in groups.items():
            candidates = max(FIRST_CANDIDATES, 2 * self._kept.get(sampling, 0))
            if len(groups) == 1:
                chosen = choose(scores, own, sampling, self._tensor(draws), shard, candidates=candidates)
                tokens, log_prob = chosen.tokens, chosen.log_prob
            else:
                rows, some = self._tensor(np.array(members)), self._tensor(draws[members])
                chosen = choose(scores[rows], own[rows], sampling, some, shard, candidates=candidates)
                tokens[rows], log_prob[rows] = chosen.tokens, chosen.log_prob.double()
            self._kept[sampling] = chosen.kept
        return tokens, log_prob

    def _append(self, response: Response, values: NDArray[np.float64]) -> FinishReason | None:
        """Add a token to a response; why the response ends with it, None if it goes on."""
        stopping = response.settings.stopping
        token = int(values[0])
        response.tokens.append(token)
        response.values.append(values[1:])
        self._scheduler.advance(response)
        count = len(response.tokens)
        if stopping.splitter and stopping.piece is not None and response.hinted is not None:
            # Far enough back to find the splitter across tokens, however short they are.
            response.tail = (response.tail + stopping.piece(token))[-len(stopping.splitter) - 256 :]
            if stopping.splitter in response.tail:
                response.split_at = count
        if token in stopping.stop_ids and (count > 1 or stopping.stop_on_first_token):
            return "eos"
        if count >= response.max_tokens:
            return "length"
        if max(row.length for row in response.rows()) + 1 >= self.max_positions:
            return "context"
        repetition = stopping.repetition
        if repetition is not None and count % repetition.every == 0 and _repeats(response.tokens, repetition):
            return "repetition"
        return None

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.model.device, non_blocking=True)

    def _positions(self, shape: tuple[int, ...]) -> Tensor:
        return torch.arange(shape[1], device=self.model.device).expand(shape)


def _groups[Setting](settings: Sequence[Setting]) -> dict[Setting, list[int]]:
    """Setting -> where it stands."""
    found: dict[Setting, list[int]] = {}
    for number, setting in enumerate(settings):
        found.setdefault(setting, []).append(number)
    return found


def _repeats(tokens: Sequence[int], repetition: Repetition) -> bool:
    words, size = np.array(tokens, dtype=np.int32).tobytes(), 4 * repetition.ngram
    counts = Counter(words[begin : begin + size] for begin in range(0, len(words) - size + 1, 4))
    return max(counts.values(), default=0) >= repetition.count


def _completion(response: Response, reason: FinishReason) -> Completion:
    log_prob, entropy, hint_share, hinted_entropy = np.array(response.values, dtype=np.float32).T
    tokens = np.array(response.tokens, dtype=np.int32)
    return Completion(
        response.request, tokens, reason, log_prob, entropy, hint_share, hinted_entropy, response.split_at
    )


def _size(count: int) -> str:
    """Bytes, for a person."""
    return f"{count / 2**30:.2f} GiB" if count >= 1 << 30 else f"{count / 2**20:.2f} MiB"
