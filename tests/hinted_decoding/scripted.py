"""An engine that says what a test tells it to, and a tiny tokenizer, for the decisions around the real engine."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_idft.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from megatron_idft.inference.requests import Completion, DecodeSettings, Request
from tests.data.chat_templates import CHATML, LLAMA3, MISTRAL, QWEN3_MARKED
from tests.tiny_tokenizers import save_tokenizer

__all__ = ["CHATML", "LLAMA3", "MISTRAL", "QWEN3_MARKED", "ScriptedEngine", "make_tokenizer", "score_ids"]

Answer = str | tuple[str, str] | list[int]  # text; (text, finish reason); exact ids


def make_tokenizer(folder: Path, template: str = CHATML) -> ChatTokenizer:
    return load_tokenizer(save_tokenizer(folder, template))


class ScriptedEngine:
    """script: request id -> what is answered. A request that is not in it fails: nothing may be asked in vain.

    What stands under (id, max_tokens) goes first: of a request that comes again with more room.
    """

    def __init__(self, tokenizer: ChatTokenizer, script: dict[str | tuple[str, int], Answer]):
        self.tokenizer, self.script, self.decoded_tokens = tokenizer, script, 0
        self.calls: list[tuple[list[Request], DecodeSettings]] = []
        self.scored: list[list[list[int]]] = []

    @property
    def requests(self) -> dict[str, Request]:
        return {request.id: request for requests, _ in self.calls for request in requests}

    def settings_of(self, identity: str) -> DecodeSettings:
        return next(settings for requests, settings in self.calls if identity in {r.id for r in requests})

    def serve(self, feed: Callable[[], Request | None]) -> Iterator[Completion]:
        """With room for everything. A call is what has the same settings, of what was fed before a response ended."""
        while requests := list(iter(feed, None)):
            groups: dict[DecodeSettings, list[Request]] = {}
            for request in requests:
                groups.setdefault(request.settings, []).append(request)
            for settings, group in groups.items():
                self.calls.append((group, settings))
            for request in reversed(requests):  # whichever ends first
                yield self._completion(request, request.settings)

    def _completion(self, request: Request, settings: DecodeSettings) -> Completion:
        wider = (request.id, settings.stopping.max_tokens)
        answer = self.script[wider if wider in self.script else request.id]
        reason = "eos"
        if isinstance(answer, tuple):
            answer, reason = answer
        if isinstance(answer, str):
            [encoding] = self.tokenizer.encode_batch([answer + ("<|im_end|>" if reason == "eos" else "")], [[]])
            answer = encoding.ids.tolist()
        ids = np.array(answer, dtype=np.int32)
        self.decoded_tokens += len(ids)
        assert reason != "eos" or int(ids[-1]) in settings.stopping.stop_ids
        n, hinted = len(ids), request.hinted_prompt is not None
        mixed = np.arange(n) < n // 2
        return Completion(
            request,
            ids,
            reason,
            log_prob=(-0.1 * np.arange(n)).astype(np.float32),
            entropy=np.full(n, 0.25, dtype=np.float32),
            hint_share=np.where(mixed & hinted, 0.75, 0.0).astype(np.float32),
            hinted_entropy=np.where(mixed & hinted, 0.7, np.nan).astype(np.float32),
            split_at=n // 2 if hinted else None,
        )

    def score(self, sequences: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        self.scored.append([sequence.tolist() for sequence in sequences])
        return [score_ids(sequence) for sequence in sequences]


def score_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers that depend on token and position."""
    ids = np.asarray(ids)
    return (-(ids[1:] % 70) / 10).astype(np.float32), (np.arange(len(ids) - 1) % 5 / 10).astype(np.float32)
