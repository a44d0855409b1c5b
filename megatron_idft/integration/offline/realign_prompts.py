"""Which prompts a job of `realign` works with: those that its flags name, or those that a trial has chosen.

The trial's chunks are the prompts, in a ledger of its own in OUTPUT/prompt_trial: launches and replicas share them, a
stopped one is taken up by others, and all texts stay there. Whoever finds the trial finished writes the choice to
OUTPUT/prompts.json, once for the folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from megatron_idft.corpus.ledger.ledger import Ledger
from megatron_idft.corpus.ledger.manifest import differences
from megatron_idft.corpus.scores.display import bounded
from megatron_idft.errors import InputError, SettingsMismatch
from megatron_idft.hinted_decoding.named_prompts import NamedPrompts
from megatron_idft.hinted_decoding.output.outcomes import OUTCOME_SCHEMA, OutcomeRow
from megatron_idft.hinted_decoding.output.results import TRIAL, recorded_prompts
from megatron_idft.hinted_decoding.prompt_trial import (
    PromptNumbers,
    choose,
    chosen_templates,
    describe_trial,
    measure,
    read_choice,
    write_choice,
)
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.stages.candidates import Floats
from megatron_idft.hinted_decoding.stages.scheduler import Engine
from megatron_idft.inference.requests import Completion, Request, Tokens
from megatron_idft.integration.offline import program
from megatron_idft.integration.offline.replica import Replica

Try = Callable[[HintTemplate], Sequence[OutcomeRow]]


class RememberingEngine:
    """The engine for a trial: the same originals are scored once for all prompts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._scores: dict[bytes, tuple[Floats, Floats]] = {}

    @property
    def decoded_tokens(self) -> int:
        return self._engine.decoded_tokens

    def serve(self, feed: Callable[[], Request | None]) -> Iterator[Completion]:
        return self._engine.serve(feed)

    def score(self, sequences: Sequence[Tokens]) -> list[tuple[Floats, Floats]]:
        names = [np.asarray(sequence, dtype=np.int64).tobytes() for sequence in sequences]
        new = {name: sequence for name, sequence in zip(names, sequences, strict=True) if name not in self._scores}
        if new:
            self._scores |= dict(zip(new, self._engine.score(list(new.values())), strict=True))
        return [self._scores[name] for name in names]


def prompts_of_folder(
    output: Path, named: NamedPrompts, job: Mapping[str, Any] | None
) -> tuple[HintTemplate, ...] | None:
    """The prompts that a folder works with already, or that the flags name; None: a trial has to choose.

    Args:
        output: the folder.
        named: of --hint-prompt.
        job: model, tokenizer and records, which a choice holds for; None: whatever it was made for.

    Raises:
        SettingsMismatch: the choice in the folder was made for another job.
        InputError: the folder's prompts are not known, or a file to be tried was not among those that were.
    """
    if not named.auto:
        return named.templates
    choice = read_choice(output)
    if choice is None:
        return recorded_prompts(output, named.templates)
    if job is not None and (found := dict(differences(choice["job"], dict(job)))):
        raise SettingsMismatch(output, found)
    tried = {prompt["sha256"] for prompt in choice["prompts"]}
    for template in named.extra:
        if template.sha256 not in tried:
            raise InputError(
                f"--hint-prompt: {template.name} was not among the prompts that {output} chose from:"
                " name another output folder, or leave it out"
            )
    return chosen_templates(choice)


def try_in_ledger(
    output: Path,
    templates: Sequence[HintTemplate],
    try_one: Try,
    replica: Replica,
    agreed: Mapping[str, Any],
    job: Mapping[str, Any],
    lease_seconds: float,
) -> tuple[HintTemplate, ...]:
    """Try the prompts together with all other launches on the folder, and return the ones that are chosen.

    Args:
        output: the folder.
        templates: the prompts.
        try_one: rows of the sample; all ranks of the replica call it together.
        replica: whose ranks these are.
        agreed: settings that launches must share, on the leading rank.
        job: see `prompts_of_folder`; on the leading rank.
        lease_seconds: of the ledger.
    """
    with ExitStack() as stack:
        ledger = None
        if replica.leads:
            settings = dict(agreed) | {"prompts": [{"name": t.name, "sha256": t.sha256} for t in templates]}
            ledger = stack.enter_context(Ledger(output / TRIAL, settings, len(templates), lease_seconds=lease_seconds))
        say_once = functools.cache(replica.print_once)
        wait = "> all prompts are tried or being tried: waiting for the others' trials"
        for number in program.claimed(ledger, replica.share, lambda finished: say_once(wait)):
            rows = try_one(templates[number])
            if ledger is not None:
                ledger.finish(number, functools.partial(program.write_part, rows=rows, schema=OUTCOME_SCHEMA))
        chosen = None
        if ledger is not None:
            found = [
                measure(template, pq.read_table(part).to_pylist())
                for template, part in zip(templates, ledger.parts(), strict=True)
            ]
            write_choice(output, found, templates, job)
            choice = read_choice(output)
            assert choice is not None
            for line in describe_trial(found, choose(found)):
                replica.print_once(f"> {line}")
            chosen = chosen_templates(choice)
    shared: tuple[HintTemplate, ...] = replica.share(chosen)
    return shared


def try_in_launch(
    templates: Sequence[HintTemplate], try_one: Try, replica: Replica, gather: Callable[[str, Any], list[Any]]
) -> tuple[HintTemplate, ...]:
    """The same for a launch that leaves nothing behind: its replicas share the prompts.

    Args:
        templates, try_one, replica: as above.
        gather: the values of the leading ranks of all replicas, on every rank.
    """
    mine = range(replica.number, len(templates), replica.count)
    numbers = {number: measure(templates[number], try_one(templates[number])) for number in mine}
    by_number: dict[int, PromptNumbers] = {
        int(number): part for parts in gather("prompts", numbers) for number, part in parts.items()
    }
    found = [by_number[number] for number in range(len(templates))]
    order = choose(found)
    for line in describe_trial(found, order):
        replica.print_once(f"> {line}")
    return tuple(templates[number] for number in order)


def describe_prompts(templates: Sequence[HintTemplate], folder: Path | None) -> str:
    """The prompts that no trial has to choose now, in a line for a person.

    Args:
        templates: the prompts.
        folder: where they were found; None: the flags name them.
    """
    names = ", then ".join(bounded(template.name) for template in templates)
    return f"hint prompt: {names}" + ("" if folder is None else f", as {folder} was begun")
