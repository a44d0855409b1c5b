"""The input of `realign`: the records by index, and the texts that other engines wrote for them."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_idft.corpus.formats import describe_forms
from megatron_idft.hinted_decoding.input.provided import Kind, Origin, ProvidedTexts
from megatron_idft.hinted_decoding.input.record_store import RecordStore, build_store, store_path
from megatron_idft.hinted_decoding.preview import describe_unreferenced
from megatron_idft.hinted_decoding.stages.tasks import RealignInput
from megatron_idft.integration.offline.replica import Replica
from megatron_idft.integration.platform.ranks import build_once
from megatron_idft.progress import byte_bar

_LOOKED_AT = 200  # records, spread over the corpus, for the notice at the start


class RealignInputs:
    """The records, opened on the leading rank of each replica. All ranks of the replica make the same calls.

    Args:
        args: the flags.
        replica: whose ranks these are.
        stack: closes what was opened.
        origin: what texts of other engines must have been made with.

    Raises:
        RecordError, InputError: the input cannot be used; the message names file and line.
    """

    def __init__(self, args: argparse.Namespace, replica: Replica, stack: ExitStack, origin: Origin) -> None:
        self._args, self._replica, self._origin = args, replica, origin
        self._samples: int = args.rollout_samples if args.regenerate else 1
        self._store = self._open_store(stack)
        for line in describe_forms(self._store.forms) if self._store is not None else ():
            replica.print_once(f"> {line}")
        self._rollouts = self._open_provided("rollouts", args.rollouts)
        self._analyses = self._open_provided("analyses", args.analyses)

    @property
    def fingerprint(self) -> str:
        """Of the records' content. On the leading rank."""
        assert self._store is not None
        return self._store.fingerprint

    def total(self) -> int:
        """The number of outcomes, on every rank: of records, or of their samples. A broadcast in the replica."""
        return int(self._replica.share(None if self._store is None else len(self._store))) * self._samples

    def read(self, indices: Sequence[int]) -> list[RealignInput] | None:
        """The records of these outcomes with the texts of other engines; None on the ranks that do not lead."""
        return None if self._store is None else [self._input(self._store, index) for index in indices]

    def describe_unreferenced(self, policy: str) -> str | None:
        """The fate of records without a reference, judged by a sample of them. On the leading rank."""
        assert self._store is not None
        total = len(self._store)
        some = [self._store[total * i // _LOOKED_AT] for i in range(_LOOKED_AT)] if total > _LOOKED_AT else None
        return describe_unreferenced(some or [self._store[i] for i in range(total)], total, policy)

    def provided_fingerprints(self) -> dict[str, str | None]:
        files = {"rollouts": self._rollouts, "analyses": self._analyses}
        return {name: None if file is None else file.fingerprint for name, file in files.items()}

    def _input(self, store: RecordStore, index: int) -> RealignInput:
        if self._args.regenerate:
            number, sample = divmod(index, self._samples)
            return RealignInput(index, store[number], sample=sample, samples=self._samples)
        record = store[index]
        rollouts = {} if self._rollouts is None else self._rollouts.get(record.id)
        analyses = {} if self._analyses is None else self._analyses.get(record.id)
        return RealignInput(index, record, rollouts, analyses)

    def _open_store(self, stack: ExitStack) -> RecordStore | None:
        """The records, on the leading rank; an estimate leaves nothing behind."""
        args = self._args
        source = (args.sft_data, args.limit, args.sft_bad_records)
        if args.estimate:
            if not self._replica.leads:
                return None
            path = store_path(Path(stack.enter_context(tempfile.TemporaryDirectory())), *source)
            build_store(path, *source)
            return RecordStore(path)
        path = store_path(Path(args.output), *source)

        def build(progress: bool) -> None:
            size = sum(Path(file).stat().st_size for file in args.sft_data)
            with byte_bar("reading records", size, progress) as bar:
                build_store(path, *source, on_bytes=bar.update)

        build_once("records", build)
        return RecordStore(path) if self._replica.leads else None

    def _open_provided(self, kind: Kind, path: str | None) -> ProvidedTexts | None:
        if path is None or self._store is None:
            return None
        file = ProvidedTexts(path, kind, None if self._args.limit else self._store.ids(), self._origin)
        self._replica.print_once(f"> --{kind} {path}: for {len(file):,} of {len(self._store):,} records")
        if file.unnamed:
            self._replica.print_once(
                f"> --{kind} {path}: {file.unnamed:,} of its lines name no tokenizer and template, so nothing says that"
                " they answer the prompts of this run"
            )
        return file
