"""The model's own judgement of responses that nothing else can decide about: weak, for it prefers its own texts.

It is asked whether a response says the same as the reference. The verdict is the probability of Yes against No as the
next word of its reply, so nothing is decoded: two scored sequences for each response.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.hinted_decoding.judge_prompt import judge_prompt
from megatron_idft.hinted_decoding.output.outcomes import BY_MODEL
from megatron_idft.hinted_decoding.stages.candidates import Candidate, Ids
from megatron_idft.hinted_decoding.stages.conversation import encode, encode_after
from megatron_idft.hinted_decoding.stages.needs import Steps, score
from megatron_idft.hinted_decoding.stages.tasks import Turn

YES, NO = "Yes", "No"


class ModelJudge:
    """Asks the model about responses.

    Args:
        tokenizer: of the model.
        threshold: the smallest probability of Yes with which a response is right.
        max_positions: the context in tokens.
    """

    def __init__(self, tokenizer: ChatTokenizer, threshold: float, max_positions: int):
        self._tokenizer, self._threshold, self._max_positions = tokenizer, threshold, max_positions
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        self._template = environment.from_string(judge_prompt())

    def judge(self, turn: Turn, candidates: Sequence[Candidate]) -> Steps[None]:
        """Set the verdicts of the candidates; one whose prompt exceeds the context stays as it is."""
        asked = [(candidate, self._replies(turn, candidate)) for candidate in candidates]
        asked = [(c, replies) for c, replies in asked if max(map(len, replies)) <= self._max_positions]
        scored = yield from score([ids for _, replies in asked for ids in replies])
        for (candidate, replies), yes, no in zip(asked, scored[::2], scored[1::2], strict=True):
            first = _shared(*replies) - 1
            odds = float(yes[0][first:].sum(dtype=np.float64) - no[0][first:].sum(dtype=np.float64))
            candidate.model_probability = probability = 1 / (1 + math.exp(-max(-700.0, min(700.0, odds))))
            candidate.verdict = "right" if probability >= self._threshold else "wrong"
            candidate.verified_by, candidate.undecided_because = BY_MODEL, None

    def _replies(self, turn: Turn, candidate: Candidate) -> tuple[Ids, Ids]:
        """The prompt with either reply, int32 [n]."""
        reference = turn.original_text
        if turn.answer is not None and turn.answer not in reference:
            reference = f"{reference}\n\n{turn.answer}"
        text = self._template.render(question=turn.question, reference=reference, response=candidate.text)
        prompt = self._tokenizer.template.render([{"role": "user", "content": text}], add_generation_prompt=True)
        ids = encode(self._tokenizer, prompt)
        yes, no = (np.concatenate([ids, encode_after(self._tokenizer, prompt, word)]) for word in (YES, NO))
        return yes, no


def _shared(a: Ids, b: Ids) -> int:
    """The number of first tokens that both share."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
