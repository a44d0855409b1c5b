"""The prompts of every stage as JSONL, for another engine to answer. Its answers come back through input/provided.py.

The first line is a header: {"realign_prompts": 1, …}. Each other line is the prompt of one stage of one turn, with the
ids that the pipeline would feed, or says under "no_prompt" why there is none. Of later turns only what does not depend
on the responses that are accepted before them is known.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_idft.data.chat.tokenizer import ChatTokenizer
from megatron_idft.errors import InputError, UserError
from megatron_idft.files import complete_file
from megatron_idft.hinted_decoding.input.provided import prompt_sha256
from megatron_idft.hinted_decoding.output.outcomes import NO_MARKER
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.settings import RealignSettings
from megatron_idft.hinted_decoding.stages.conversation import Ids
from megatron_idft.hinted_decoding.stages.given import analysis_ids, check_given
from megatron_idft.hinted_decoding.stages.marker import close_at_marker, without_stop
from megatron_idft.hinted_decoding.stages.tasks import RealignInput, RecordTask, Turn

FORMAT = 1
Row = dict[str, Any]


def write_prompts(
    given: Iterable[RealignInput],
    tokenizer: ChatTokenizer,
    settings: RealignSettings,
    templates: Sequence[HintTemplate],
    output: Path,
) -> Counter[str]:
    """Write the file, whole or not at all.

    Args:
        given: the records.
        tokenizer: of the model.
        settings: of the job that will read the answers.
        templates: of the hint; none where they are not chosen yet.
        output: a new .jsonl file.

    Returns:
        the number of prompts of each stage, and of each reason for which one is missing.

    Raises:
        InputError: the output exists, or has another suffix.
    """
    if output.exists():
        raise InputError(f"--output {output} exists: name a new file")
    if output.suffix != ".jsonl":
        raise InputError(f"--output {output}: the prompts go to one file: name one that ends in .jsonl")
    counts = Counter[str]()
    output.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(output) as building, open(building, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(json.dumps(_header(tokenizer, settings, templates), ensure_ascii=False) + "\n")
        for one in given:
            for row in RecordPrompts(one, tokenizer, settings, templates).rows():
                counts[str(row.get("no_prompt", row["stage"]))] += 1
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return counts


def _header(tokenizer: ChatTokenizer, settings: RealignSettings, templates: Sequence[HintTemplate]) -> Row:
    rollout, analysis, described = settings.rollout_sampling, settings.analysis_sampling, settings.describe()
    return {
        "realign_prompts": FORMAT,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "seq_length": settings.max_positions,
        "seed": settings.seed,
        "sampling": {
            "own": {
                "temperature": rollout.temperature,
                "top_p": rollout.top_p,
                "top_k": rollout.top_k,
                "samples": settings.rollout_samples,
            },
            "analysis": {
                "temperature": analysis.temperature,
                "top_p": analysis.top_p,
                "top_k": analysis.top_k,
                "samples": 1,
            },
        },
        "templates": [
            {"name": template.name, "sha256": template.sha256, "marker": template.marker}
            | {"after_marker": template.after_marker}
            for template in templates
        ],
    } | {name: described[name] for name in ("mixing", "hinted", "repetition")}


class RecordPrompts:
    """Goes through the turns of a record as if each stayed as it was."""

    def __init__(
        self,
        given: RealignInput,
        tokenizer: ChatTokenizer,
        settings: RealignSettings,
        templates: Sequence[HintTemplate],
    ):
        self._task = RecordTask(given, tokenizer, settings.max_positions)
        self._tokenizer, self._settings, self._templates = tokenizer, settings, templates

    def rows(self) -> Iterator[Row]:
        """The lines of the record."""
        task = self._task
        for number in range(task.num_turns):
            turn = task.begin(number)
            if turn is None:
                break
            yield from self._of_turn(turn)
            turn.stage = "original"
            task.settle(turn)
        if task.error is not None:
            yield self._missing(len(task.turns), "own", task.error)

    def _of_turn(self, turn: Turn) -> Iterator[Row]:
        settings, number = self._settings, turn.number
        if turn.prompt.fixed:
            yield self._missing(number, "own", "the turn stays as it is: it only calls tools, or is not trained")
            return
        # Turns that stay as they are leave the prompts of later ones known.
        depends = any(not earlier.prompt.fixed for earlier in self._task.turns[:number])
        undecidable = turn.reference is None and settings.model_judge_threshold is None
        if undecidable and settings.unverified != "keep":
            yield self._missing(number, "own", "no reference answer to verify with: nothing is decoded for this turn")
            return
        if turn.rollouts or settings.rollout_samples:
            if depends:
                yield self._missing(number, "own", "the prompt holds the response that is accepted before it")
            else:
                yield self._row(turn, "own", turn.prompt.text, turn.prompt.ids, settings.max_tokens)
        for template in self._templates:
            if depends and template.sees_conversation:
                stage = "hinted" if template.marker is None else "analysis"
                yield self._missing(number, stage, "the prompt holds the response that is accepted before it", template)
                continue
            try:
                yield from self._of_template(turn, template)
            except UserError as error:
                yield self._missing(number, "hinted", f"no hinted prompt: {error}", template)

    def _of_template(self, turn: Turn, template: HintTemplate) -> Iterator[Row]:
        text, ids = turn.ask_by(template, self._tokenizer)
        if len(ids) >= self._settings.max_positions:
            yield self._missing(turn.number, "hinted", "hinted prompt longer than --seq-length", template)
            return
        if template.marker is None:
            yield self._row(turn, "hinted", text, ids, self._settings.max_tokens, template)
            return
        yield self._row(turn, "analysis", text, ids, self._settings.analysis_max_tokens, template)
        given = turn.analysis_for(template)
        if given is None:
            yield self._missing(turn.number, "hinted", "the prompt goes on with the analysis, to its marker", template)
            return
        check_given("analyses", given, ids, self._tokenizer)
        written = without_stop(analysis_ids(given, text, self._tokenizer), turn.prompt.end_ids, self._stop_ids(turn))
        closed, _ = close_at_marker(written, template, self._tokenizer, self._settings.analysis_marker)
        if closed is None:
            yield self._missing(turn.number, "hinted", NO_MARKER, template)
            return
        hinted = np.concatenate([ids, closed])
        yield self._row(turn, "hinted", self._tokenizer.decode(hinted), hinted, self._settings.max_tokens, template)

    def _stop_ids(self, turn: Turn) -> set[int]:
        return {int(turn.prompt.end_ids[-1]), self._tokenizer.eos_id}

    def _row(
        self, turn: Turn, stage: str, text: str, ids: Ids, longest: int, template: HintTemplate | None = None
    ) -> Row:
        """longest: the response, where the context leaves room for it."""
        return self._identity(turn.number, stage, template) | {
            "max_tokens": min(longest, self._settings.max_positions - len(ids)),
            "stop_token_ids": sorted(self._stop_ids(turn)),
            "end_token_ids": turn.prompt.end_ids.tolist(),
            "prompt_sha256": prompt_sha256(ids),
            "text": text,
            "token_ids": ids.tolist(),
        }

    def _missing(self, number: int, stage: str, why: str, template: HintTemplate | None = None) -> Row:
        return self._identity(number, stage, template) | {"no_prompt": why}

    def _identity(self, number: int, stage: str, template: HintTemplate | None) -> Row:
        row: Row = {"id": self._task.record.id, "turn": number, "stage": stage}
        return row if template is None else row | {"template_sha256": template.sha256}
