"""The realigning program: a Megatron checkpoint and records in, records in the model's own distribution out.

Every data-parallel replica works as a launch of its own: the first of its tensor-parallel ranks takes chunks of records
from a ledger in the output folder (corpus/ledger) and shares them within its tensor-parallel group; nothing is
exchanged with other replicas or launches. Of the output, `megatron-idft realign merge` makes one file to train on.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_idft import __version__
from megatron_idft.corpus.formats import describe_forms
from megatron_idft.corpus.ledger.ledger import Ledger
from megatron_idft.corpus.records import read_records
from megatron_idft.corpus.verification.leaks import LeakFilter
from megatron_idft.corpus.verification.verifier import Verifier
from megatron_idft.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from megatron_idft.data.model_rows import require_rows_of_records
from megatron_idft.errors import ArgumentError, InputError
from megatron_idft.hinted_decoding.named_prompts import NamedPrompts
from megatron_idft.hinted_decoding.output.former_names import current_settings
from megatron_idft.hinted_decoding.output.outcomes import OUTCOME_SCHEMA, OutcomeRow
from megatron_idft.hinted_decoding.output.results import begun_by_earlier_version, open_retry, read_settings
from megatron_idft.hinted_decoding.output.status import describe_status
from megatron_idft.hinted_decoding.preview import describe_estimate, render_prompts, summary_row
from megatron_idft.hinted_decoding.prompt_trial import trial_indices, trial_settings, trial_size
from megatron_idft.hinted_decoding.prompts import HintTemplate
from megatron_idft.hinted_decoding.settings import RealignSettings
from megatron_idft.hinted_decoding.stages.pipeline import Realigner
from megatron_idft.hinted_decoding.stages.scheduler import Engine
from megatron_idft.hinted_decoding.stages.tasks import RealignInput
from megatron_idft.inference.engine import DecodeEngine
from megatron_idft.integration.offline import program
from megatron_idft.integration.offline.realign_arguments import add_realign_arguments, describe_renamed
from megatron_idft.integration.offline.realign_inputs import RealignInputs
from megatron_idft.integration.offline.realign_paper import apply_paper
from megatron_idft.integration.offline.realign_prompts import (
    RememberingEngine,
    describe_prompts,
    prompts_of_folder,
    try_in_launch,
    try_in_ledger,
)
from megatron_idft.integration.offline.realign_settings import (
    WHOLE_NUMBERS_FROM_1,
    check_realign_arguments,
    resolve_origin,
    resolve_prompts,
    resolve_settings,
)
from megatron_idft.integration.offline.replica import Replica
from megatron_idft.integration.platform.ranks import from_rank_0, print_on_rank_0
from megatron_idft.progress import Done, Progress

_ESTIMATED_RECORDS = 200


def realign() -> None:
    """Realign as `sys.argv` says. `prepare_process` must have run."""
    program.stop_on_sigterm()
    args = program.parse(add_realign_arguments, WHOLE_NUMBERS_FROM_1, check_realign_arguments)
    apply_paper(args)  # once more: Megatron has parsed anew
    for line in describe_renamed(args):
        print_on_rank_0(f"> {line}")
    tokenizer = load_tokenizer(
        args.tokenizer_model,
        chat_template=args.chat_template,
        trust_remote_code=args.trust_remote_code,
        template_date=args.sft_template_date,
    )
    on_error = None if args.sft_bad_records == "stop" else lambda error: None
    require_rows_of_records(read_records(args.sft_data, on_error=on_error), tokenizer, args.sft_loss_vocab_size)
    named = resolve_prompts(args)
    if args.dry_run:
        _show_first(args, tokenizer, named)
        return
    with ExitStack() as stack:
        job = _Job(args, tokenizer, named, stack)
        if args.estimate:
            job.estimate()
        else:
            job.run()


def _show_first(args: argparse.Namespace, tokenizer: ChatTokenizer, named: NamedPrompts) -> None:
    on_error = None if args.sft_bad_records == "stop" else lambda error: None
    record = next(iter(read_records(args.sft_data, on_error=on_error)), None)
    if record is None:
        raise ArgumentError(f"{', '.join(args.sft_data)}: no record in there")
    for line in describe_forms([(record.file, record.form, 1)]):
        print_on_rank_0(f"> {line}")
    if _compares(args):
        print_on_rank_0(f"> {_verifier(args).describe()}")
    print_on_rank_0(render_prompts(record, tokenizer, named, args.seq_length))


def _verifier(args: argparse.Namespace) -> Verifier:
    return Verifier(plugin=args.verifier_plugin, workers=args.verify_workers, timeout_seconds=args.verify_timeout)


def _compares(args: argparse.Namespace) -> bool:
    """Whether responses are compared with references."""
    return not args.regenerate or args.only_right


class _Job:
    """The model, the records and the verifier, opened from the flags; `stack` closes them."""

    def __init__(
        self, args: argparse.Namespace, tokenizer: ChatTokenizer, named: NamedPrompts, stack: ExitStack
    ) -> None:
        self.args, self.tokenizer, self.named = args, tokenizer, named
        self.replica = Replica.here()
        self.begun = from_rank_0(lambda: begun_by_earlier_version(Path(args.output)))
        self.leaks = LeakFilter() if args.leak_phrases is None else LeakFilter.from_file(args.leak_phrases)
        self.inputs = RealignInputs(args, self.replica, stack, resolve_origin(args, tokenizer, named.templates))
        self.verifier = self._open_verifier(stack)
        self.engine = self._load()

    def run(self) -> None:
        """Realign every chunk that is left, and print the outcome."""
        args = self.args
        opened = self._folder()
        if opened is None:
            self.replica.print_once("> no record ended as an error: there is nothing to try again")
            return
        folder, indices = opened
        self._begin(self._prompts(Path(args.output)))
        work = _Work(self.realigner, len(indices), args.chunk_records)
        with ExitStack() as stack:
            ledger = None
            if self.replica.leads:
                agreed = self._agreed(self.settings, indices)
                ledger = stack.enter_context(
                    Ledger(folder, agreed, work.chunks, lease_seconds=args.lease_seconds, current=current_settings)
                )
                work.set_finished(ledger.finished())
            shown = ledger is not None and self.replica.number == 0
            progress = stack.enter_context(Progress("realigning", work.total, None, work.look, shown=shown))
            for first in program.claimed(ledger, self.replica.share, work.set_finished, progress):
                claims = program.claims_from(first, ledger, self.replica.share)

                def more(claims: Callable[[], int | None] = claims) -> tuple[int, list[RealignInput]] | None:
                    chunk = claims()
                    return None if chunk is None else (chunk, self._read([indices[i] for i in work.numbers(chunk)]))

                for chunk, rows in self.realigner.realign_chunks(more):
                    if ledger is not None:
                        write = functools.partial(program.write_part, rows=rows, schema=OUTCOME_SCHEMA)
                        ledger.finish(chunk, write)
                        work.set_finished(ledger.finished(), rows)
            if ledger is not None:
                work.set_finished(ledger.finished())
        torch.distributed.barrier()
        self.replica.print_once(f"> {self.engine.describe_prompts()}")
        self.replica.print_once(_summary(Path(args.output)))

    def estimate(self) -> None:
        """Realign some records; each replica takes its share of them."""
        total, replica = self.inputs.total(), self.replica
        self._begin(self._prompts(None))
        spread = sorted({int(i) for i in np.linspace(0, total - 1, min(total, _ESTIMATED_RECORDS))})
        mine = spread[replica.number :: replica.count]
        work = _Work(self.realigner, len(mine), max(len(mine), 1))
        start = time.monotonic()
        with Progress("estimating", work.total, None, work.look, shown=replica.leads and replica.number == 0):
            rows = self.realigner.realign(self._read(mine))
            work.set_finished([0], rows)
        found = {"seconds": time.monotonic() - start, "rows": [summary_row(row) for row in rows]}
        parts = self._gather("estimate", found)
        seconds = max(part["seconds"] for part in parts)
        self.replica.print_once(
            describe_estimate([row for part in parts for row in part["rows"]], seconds, total, replica.count)
        )

    def _begin(self, templates: tuple[HintTemplate, ...]) -> None:
        """Be ready to realign with these prompts."""
        self.settings = self._resolved(templates)
        self.realigner = self._realigner(self.settings)

    def _resolved(self, templates: tuple[HintTemplate, ...]) -> RealignSettings:
        return resolve_settings(self.args, templates, self.args.sft_loss_vocab_size, self.begun)

    def _prompts(self, output: Path | None) -> tuple[HintTemplate, ...]:
        """The prompts that the flags or the folder name, or a trial chooses. output: None where nothing is kept."""
        if self.args.regenerate:
            return ()
        job = self._trial_job()
        looked_at = Path(self.args.output)
        there = None
        if self.replica.leads:
            there = prompts_of_folder(looked_at, self.named, None if self.args.retry_errors else job)
        there = self.replica.share(there)
        if there is not None:
            self.replica.print_once(f"> {describe_prompts(there, looked_at if self.named.auto else None)}")
            found: tuple[HintTemplate, ...] = there
            return found
        total = self.inputs.total()
        indices = trial_indices(total, trial_size(total, self.args.prompt_trial_records))
        candidates = self.named.templates
        base = self._resolved(candidates)
        self.replica.print_once(
            f"> trying {len(candidates)} prompts on {len(indices):,} of {total:,} records each: up to"
            f" {len(candidates) * len(indices):,} responses, and an analysis for each prompt that asks for one"
            " (--prompt-trial-records; --hint-prompt NAME tries none)"
        )

        engine = RememberingEngine(self.engine)

        def try_one(template: HintTemplate) -> list[OutcomeRow]:
            realigner = self._realigner(trial_settings(base, template), engine)
            work = _Work(realigner, len(indices), len(indices))
            shown = self.replica.leads and self.replica.number == 0
            with Progress(f"trying {template.name}", work.total, None, work.look, shown=shown):
                given = self.inputs.read(indices)
                rows = realigner.realign(self.replica.share(given and [replace(g, rollouts={}) for g in given]))
                work.set_finished([0])
            return rows

        if output is None:
            return try_in_launch(candidates, try_one, self.replica, self._gather)
        agreed = {**self._agreed(base, indices), "trial_records": len(indices)} if self.replica.leads else {}
        return try_in_ledger(output, candidates, try_one, self.replica, agreed, job, self.args.lease_seconds)

    def _trial_job(self) -> dict[str, Any]:
        """What a choice of prompts holds for; empty on ranks that do not lead."""
        if not self.replica.leads:
            return {}
        return {
            **program.model_settings(self.args),
            "data_fingerprint": self.inputs.fingerprint,
            "tokenizer": self.tokenizer.fingerprint(),
        }

    def _gather(self, name: str, value: Any) -> list[Any]:
        """The values of the leading ranks of all replicas, as JSON gives them back; on every rank."""
        # By the store: no collective's timeout limits by how much the replicas' times may differ.
        store, replica = torch.distributed.distributed_c10d._get_default_store(), self.replica
        if replica.leads:
            store.set(f"megatron-idft/{name}/{replica.number}", json.dumps(value))
        keys = [f"megatron-idft/{name}/{number}" for number in range(replica.count)]
        store.wait(keys, timedelta(days=7))
        parts = [json.loads(store.get(key)) for key in keys]
        torch.distributed.barrier()  # the store ends with the rank that holds it
        return parts

    def _read(self, indices: Sequence[int]) -> list[RealignInput]:
        """These records. All ranks of the replica call it together."""
        found: list[RealignInput] = self.replica.share(self.inputs.read(indices))
        return found

    def _folder(self) -> tuple[Path, Sequence[int]] | None:
        """The folder of the ledger, and the indices of its records; None where there is nothing to do."""
        output = Path(self.args.output)
        if not self.args.retry_errors:
            return output, range(self.inputs.total())

        def open_errors() -> tuple[Path, Sequence[int]] | None:
            begun = read_settings(output)
            if begun["data_fingerprint"] != self.inputs.fingerprint:
                raise InputError(f"--sft-data and --limit are not those that {output} was begun with: pass those")
            if begun["tokenizer"] != self.tokenizer.fingerprint():
                raise InputError(
                    f"tokenizer and chat template are not those that {output} was begun with, and records with the ids"
                    " of both could not be trained together: pass those, or realign all to another folder"
                )
            self._require_same_outcomes(begun, output)
            return open_retry(output)

        return from_rank_0(open_errors)  # once for all replicas: the errors that are left change while they work

    def _require_same_outcomes(self, begun: Mapping[str, Any], output: Path) -> None:
        """Indices of outcomes must mean what they did."""
        samples = begun["rollouts"]["samples"] if begun.get("regenerate") else None
        if samples != (self.args.rollout_samples if self.args.regenerate else None):
            was = "without --regenerate" if samples is None else f"with --regenerate --rollout-samples {samples}"
            raise InputError(f"{output} was begun {was}: pass the same")

    def _agreed(self, settings: RealignSettings, indices: Sequence[int]) -> dict[str, Any]:
        """The settings in which all launches on one output folder must agree."""
        args = self.args
        try:
            math_verify: str | None = version("math-verify")
        except PackageNotFoundError:
            math_verify = None
        verifier = {
            "plugin": args.verifier_plugin,
            "math_verify": None if args.verifier_plugin else math_verify,
            "timeout_seconds": args.verify_timeout,
        }
        return {
            **program.model_settings(args),
            "data": [Path(path).name for path in args.sft_data],
            "data_fingerprint": self.inputs.fingerprint,
            "records": len(indices),
            "chunk_records": args.chunk_records,
            "tokenizer": self.tokenizer.fingerprint(),
            **settings.describe(),
            "verifier": verifier if _compares(args) else None,
            "leak_phrases": hashlib.sha256("\n".join(self.leaks.phrases).encode()).hexdigest(),
            "files": self.inputs.provided_fingerprints(),
        }

    def _open_verifier(self, stack: ExitStack) -> Verifier | None:
        if not self.replica.leads or not _compares(self.args):
            return None
        args, verifier = self.args, _verifier(self.args)
        self.replica.print_once(f"> {verifier.describe()}")
        policy = "model" if args.verifier == "model" else args.unverified
        if (said := self.inputs.describe_unreferenced(policy)) is not None:
            self.replica.print_once(said)
        return stack.enter_context(verifier)

    def _load(self) -> DecodeEngine:
        args = self.args
        model = program.load_model(args)
        if self.tokenizer.vocab_size > args.padded_vocab_size:
            raise ArgumentError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens but the model {args.padded_vocab_size} rows:"
                " pass the tokenizer that the model was trained with as --tokenizer-model"
            )
        on_gpu = next(model[0].parameters()).is_cuda and torch.cuda.is_available()
        engine = DecodeEngine(
            model,
            min(args.sft_loss_vocab_size, self.tokenizer.vocab_size),  # some models have rows that no token uses
            max_positions=args.seq_length,
            max_rows=args.max_rows or (64 if on_gpu else 32),
            memory_bytes=None if args.kv_memory_gb is None else int(args.kv_memory_gb * 2**30),
            tell=lambda line: self.replica.print_once(f"> {line}"),
        )
        self.replica.print_once(f"> {engine.describe()}")
        return engine

    def _realigner(self, settings: RealignSettings, engine: Engine | None = None) -> Realigner:
        return Realigner(
            engine or self.engine,
            self.tokenizer,
            settings,
            self.verifier,
            self.leaks,
            _provenance(self.args),
            share=self.replica.share,
            leads=self.replica.leads,
            rejected_texts=self.args.rejected_texts,
        )


class _Work:
    """The chunks of records: how many records are done, by this launch and by others, and what is being done here."""

    def __init__(self, realigner: Realigner, total: int, chunk_records: int) -> None:
        self._stage = realigner.progress
        self.total, self._chunk_records = total, chunk_records
        self.chunks = -(-total // chunk_records)
        self._finished = self._kept = self._here = 0

    def numbers(self, chunk: int) -> range:
        """Of the records of a chunk."""
        return range(chunk * self._chunk_records, min((chunk + 1) * self._chunk_records, self.total))

    def set_finished(self, chunks: Sequence[int], rows: Sequence[OutcomeRow] = ()) -> None:
        """These chunks are finished.

        Args:
            chunks: their numbers.
            rows: of the last one that was finished here.
        """
        self._finished = sum(len(self.numbers(chunk)) for chunk in chunks)
        self._kept += sum(row["status"] == "kept" for row in rows)
        self._here += len(rows)

    def look(self) -> Done:
        stage = self._stage
        at_hand = min(stage.records, self.total - self._finished)
        kept = f"{self._kept / self._here:.0%} kept here" if self._here else ""
        records = self._finished + int(at_hand * stage.settled / max(stage.turns, 1))
        share = (self._finished + at_hand * stage.share) / max(self.total, 1)
        return Done(records, stage.tokens(), share, ", ".join(filter(None, [kept, stage.describe()])))


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    name = args.hf_model or args.load or args.pretrained_checkpoint
    return {
        "model": Path(name).resolve().name,
        "iteration": args.iteration,
        "versions": {
            "megatron_idft": __version__,
            "megatron-core": version("megatron-core"),
            "torch": version("torch"),
        },
    }


def _summary(output: Path) -> str:
    return (
        "\n".join(f"> {line}" for line in describe_status(output).splitlines())
        + f"\n> next: megatron-idft realign merge {output} --output FILE.jsonl; megatron-idft realign report {output}"
    )
