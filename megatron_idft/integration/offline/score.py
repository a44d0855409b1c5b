"""The scoring program: a Megatron checkpoint and records in, per-record statistics under the model out.

Launches need not know of each other. Each takes chunks of records from a ledger in the output folder
(corpus/ledger/ledger.py) and writes one Parquet part per chunk; whoever finds all finished merges them and writes
the report.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_idft.console import say
from megatron_idft.corpus.ledger.ledger import Ledger
from megatron_idft.corpus.scored_folder import OWN_SAMPLE_TEMPERATURES, OWN_SAMPLES, describe_own_samples, finish_scores
from megatron_idft.corpus.scores.rows import (
    TOKEN_SCHEMA,
    TOP_SCHEMA,
    ScoredRow,
    scored_record,
    top_columns,
)
from megatron_idft.data.chat.show import render_sample
from megatron_idft.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from megatron_idft.data.model_rows import require_rows
from megatron_idft.data.packed.records import TokenizedRecords
from megatron_idft.errors import ArgumentError, UnservedModelError
from megatron_idft.inference.engine import DecodeEngine
from megatron_idft.inference.served import require_served, require_served_layout
from megatron_idft.integration.offline import program
from megatron_idft.integration.offline.score_arguments import add_score_arguments
from megatron_idft.integration.offline.scorer import ModelScorer
from megatron_idft.integration.platform.ranks import gather, print_on_rank_0
from megatron_idft.integration.training.checkpoints import loaded_digest
from megatron_idft.integration.training.data import shared_records
from megatron_idft.progress import Done, Progress

_CALIBRATION_ROWS = 64  # own answers decoded at once
_IDENTITY = ("tokenizer", "seq_length", "last_turn_only", "checkpoint")  # of the reference model that scores are of


def score() -> None:
    """Score as `sys.argv` says. `prepare_process` must have run."""
    program.stop_on_sigterm()
    args = _parse()
    if args.calibrate is not None:
        with _calibration_refused_with_its_remedy():
            require_served_layout(args.sequence_parallel)
    tokenizer, records = _open_data(args)
    others = records.meta.get("weights", {}).get("prompt_records", 0)
    if args.calibrate is not None and others:
        raise ArgumentError(
            f"--calibrate: own samples are answers, and {others:,} records also train messages of users, the system or"
            " tools, whose distance they cannot calibrate. Leave --calibrate out, or score to another --output without"
            " --sft-prompt-weight and the `loss` of such messages"
        )
    if args.dry_run:
        print_on_rank_0("> first record, scored spans in brackets:\n" + render_sample(*records[0], tokenizer))
        return
    scorer = _load_scorer(args)
    if args.calibrate is not None:
        with _calibration_refused_with_its_remedy():
            require_served(scorer.model)
    total = min(len(records), args.limit or len(records))
    if args.estimate:
        _estimate(args, scorer, tokenizer, records, total)
        return
    _score_chunks(args, scorer, tokenizer, records, total)
    if args.calibrate is not None:
        _calibrate(args, scorer, tokenizer, records, total)


@contextmanager
def _calibration_refused_with_its_remedy() -> Iterator[None]:
    try:
        yield
    except UnservedModelError as error:
        raise UnservedModelError(
            f"--calibrate: {error}. Leave --calibrate out to score here; where a reason names another layout, the same"
            " command with --calibrate in that layout, on the same --output, keeps the scores and adds the answers"
        ) from None


def _parse() -> argparse.Namespace:
    return program.parse(add_score_arguments, ("tokens_per_batch", "calibrate", "calibrate_max_tokens"))


def _open_data(args: argparse.Namespace) -> tuple[ChatTokenizer, TokenizedRecords]:
    tokenizer = load_tokenizer(
        args.tokenizer_model,
        chat_template=args.chat_template,
        trust_remote_code=args.trust_remote_code,
        template_date=args.sft_template_date,
    )
    records = shared_records(args, tokenizer, "--sft-data", args.sft_data)
    require_rows(records, tokenizer, args.sft_loss_vocab_size)
    print_on_rank_0(records.report())
    return tokenizer, records


def _load_scorer(args: argparse.Namespace) -> ModelScorer:
    model = program.load_model(args)
    on_gpu = next(model[0].parameters()).is_cuda and torch.cuda.is_available()
    tokens_per_batch = args.tokens_per_batch or (16384 if on_gpu else 1024)
    top_k = args.sft_reference_top_k or 0
    if not 0 <= top_k <= args.sft_loss_vocab_size:
        raise ArgumentError(f"--sft-reference-top-k {top_k}: the vocabulary has {args.sft_loss_vocab_size} tokens")
    return ModelScorer(model, args.sft_loss_vocab_size, tokens_per_batch, args.sft_loss_backend, top_k)


def _leads() -> bool:
    """Whether this rank is the one of its launch that receives the statistics, keeps the ledger and writes."""
    from megatron.core import mpu

    return bool(
        mpu.is_pipeline_last_stage(ignore_virtual=True)
        and mpu.get_tensor_model_parallel_rank() == 0
        and mpu.get_data_parallel_rank() == 0
    )


def _print_on_leader(line: str) -> None:
    if _leads():
        say(f"> {line}")


def _from_leader(value: Any) -> Any:
    """The leader's value, on every rank of the launch."""
    return next(value for leads, value in gather((_leads(), value)) if leads)


def _rows(
    scorer: ModelScorer,
    tokenizer: ChatTokenizer,
    records: TokenizedRecords,
    samples: Sequence[int],
    on_done: Callable[[Sequence[int]], None] = lambda samples: None,
) -> list[ScoredRow] | None:
    """Scored rows of these samples on the leading rank, None elsewhere. on_done: is told of samples that are done."""
    return _score_sequences(scorer, tokenizer, records, samples, [records[index] for index in samples], on_done)


def _score_sequences(
    scorer: ModelScorer,
    tokenizer: ChatTokenizer,
    records: TokenizedRecords,
    samples: Sequence[int],
    sequences: Sequence[tuple[NDArray[np.int32], NDArray[np.uint8]]],
    on_done: Callable[[Sequence[int]], None] = lambda samples: None,
) -> list[ScoredRow] | None:
    """The same for (token ids, mask) that belong to these samples."""
    statistics = scorer.score(
        [ids for ids, _ in sequences],
        [mask for _, mask in sequences],
        lambda indices: on_done([samples[index] for index in indices]),
    )
    if statistics is None or not _leads():
        return None
    rows: list[ScoredRow] = []
    for index, (ids, mask), (log_prob, entropy, *top), record in zip(
        samples, sequences, statistics, records.records(samples), strict=True
    ):
        try:
            row = scored_record(
                ids,
                mask,
                log_prob,
                entropy,
                decode=tokenizer.decode,
                end_of_turn_ids=records.end_of_turn_ids,
                special_ids=tokenizer.special_ids.values(),
            )
        except FloatingPointError as error:
            raise ArgumentError(f"{record['file']}, line {record['line']}: {error}") from error
        rows.append({"index": index, **record, **row, **top_columns(mask, *top)})
    return rows


class _Work:
    """The chunks of records: how much of them is done, by this launch and by others."""

    def __init__(self, records: TokenizedRecords, total: int, chunk_records: int) -> None:
        self._lengths, self._chunk_records = records.lengths()[:total], chunk_records
        self.total, self.tokens = total, int(self._lengths.sum())
        self.chunks = -(-total // chunk_records)
        self._finished, self._at_hand = (0, 0), (0, 0)  # records and tokens

    def samples(self, chunk: int) -> range:
        return range(chunk * self._chunk_records, min((chunk + 1) * self._chunk_records, self.total))

    def set_finished(self, chunks: Sequence[int]) -> None:
        """These chunks are finished, and none is at hand."""
        samples = [self.samples(chunk) for chunk in chunks]
        tokens = sum(int(self._lengths[part.start : part.stop].sum()) for part in samples)
        self._finished, self._at_hand = (sum(map(len, samples)), tokens), (0, 0)

    def add(self, samples: Sequence[int]) -> None:
        """Samples of the chunk at hand are done."""
        records, tokens = self._at_hand
        self._at_hand = records + len(samples), tokens + sum(int(self._lengths[index]) for index in samples)

    def look(self) -> Done:
        (finished, finished_tokens), (records, tokens) = self._finished, self._at_hand
        return Done(finished + records, finished_tokens + tokens, (finished_tokens + tokens) / max(self.tokens, 1))


def _score_chunks(
    args: argparse.Namespace, scorer: ModelScorer, tokenizer: ChatTokenizer, records: TokenizedRecords, total: int
) -> None:
    work = _Work(records, total, args.chunk_records)
    schema = TOP_SCHEMA if args.sft_reference_top_k else TOKEN_SCHEMA
    with ExitStack() as stack:
        ledger = None
        if _leads():
            ledger = stack.enter_context(_ledger(args, Path(args.output), _settings(args, records, total), work.chunks))
            work.set_finished(ledger.finished())
        progress = Progress("scoring", total, work.tokens, work.look, shown=ledger is not None)
        with progress:
            for chunk in program.claimed(ledger, _from_leader, work.set_finished, progress):
                samples = work.samples(chunk)
                rows = _rows(scorer, tokenizer, records, samples, work.add)
                if ledger is not None and rows is not None:
                    ledger.finish(chunk, functools.partial(program.write_part, rows=rows, schema=schema))
                    work.set_finished(ledger.finished())
            if ledger is not None:
                work.set_finished(ledger.finished())
        if ledger is not None:
            say(finish_scores(Path(args.output), ledger.parts(), per_token=args.per_token))


def _settings(args: argparse.Namespace, records: TokenizedRecords, total: int) -> dict[str, Any]:
    """Settings that must agree between launches on one output folder."""
    return (
        program.model_settings(args)
        | {
            "data": [Path(path).name for path in args.sft_data],
            "tokens": records.path.name,  # the fingerprint of records, tokenizer, template and length
            "records": total,
            "chunk_records": args.chunk_records,
        }
        | _identity(args, records)
    )


def _identity(args: argparse.Namespace, records: TokenizedRecords) -> dict[str, Any]:
    """What `prepare --sft-reference` compares, and whose scores they are."""
    made = records.meta["settings"]
    top = {"reference_top_k": args.sft_reference_top_k} if args.sft_reference_top_k else {}
    return {key: made[key] for key in _IDENTITY[:-1]} | {"checkpoint": loaded_digest(args)} | top


def _ledger(args: argparse.Namespace, folder: Path, settings: dict[str, Any], count: int) -> Ledger:
    """Of a folder that an earlier version has begun, too: that did not record the identity, of which `tokens` says all
    but the checkpoint's."""

    def current(there: dict[str, Any]) -> dict[str, Any]:
        return {key: settings[key] for key in _IDENTITY} | there

    return Ledger(folder, settings, count, lease_seconds=args.lease_seconds, current=current)


class _Answers:
    """The own answers of all temperatures: how many are written, by this launch and by others."""

    def __init__(self, engine: DecodeEngine, of_each: int) -> None:
        self._engine, self._of_each = engine, of_each
        self.total, self.done, self.stage = of_each * len(OWN_SAMPLE_TEMPERATURES), 0, ""

    def set_finished(self, temperatures: Sequence[int]) -> None:
        self.done = self._of_each * len(temperatures)

    def count(self) -> None:
        self.done += 1

    def look(self) -> Done:
        return Done(self.done, self._engine.decoded_tokens, self.done / max(self.total, 1), self.stage)


def _calibrate(
    args: argparse.Namespace, scorer: ModelScorer, tokenizer: ChatTokenizer, records: TokenizedRecords, total: int
) -> None:
    """Own answers to prompts spread over the corpus, scored like records: a ledger with one part per temperature."""
    engine = DecodeEngine(
        scorer.model,
        args.sft_loss_vocab_size,
        max_positions=args.seq_length,
        max_rows=_CALIBRATION_ROWS,
        tell=_print_on_leader,
    )
    _print_on_leader(engine.describe())
    samples = sorted({int(index) for index in np.linspace(0, total - 1, min(total, args.calibrate))})
    prompts = [ids[: int(np.flatnonzero(mask)[0])] for ids, mask in (records[index] for index in samples)]
    with ExitStack() as stack:
        ledger = None
        if _leads():
            settings = _settings(args, records, total) | {
                "answers": len(samples),
                "max_tokens": args.calibrate_max_tokens,
                "seed": args.seed,
                "temperatures": list(OWN_SAMPLE_TEMPERATURES),
            }
            folder, count = Path(args.output) / OWN_SAMPLES, len(OWN_SAMPLE_TEMPERATURES)
            ledger = stack.enter_context(_ledger(args, folder, settings, count))
        work = _Answers(engine, len(samples))
        if ledger is not None:
            work.set_finished(ledger.finished())
        progress = stack.enter_context(
            Progress("own samples", work.total, None, work.look, shown=ledger is not None, unit="answers")
        )
        for chunk in program.claimed(ledger, _from_leader, work.set_finished, progress):
            work.stage = f"at temperature {OWN_SAMPLE_TEMPERATURES[chunk]:g}"
            answers = engine.generate(
                prompts,
                [str(index) for index in samples],
                max_tokens=args.calibrate_max_tokens,
                temperature=OWN_SAMPLE_TEMPERATURES[chunk],
                seed=args.seed,
                stop_ids={*records.end_of_turn_ids, tokenizer.eos_id},
                on_done=work.count,
            )
            answered = [(i, p, a) for i, p, a in zip(samples, prompts, answers, strict=True) if len(a)]
            sequences = [
                (np.concatenate([p, a]).astype(np.int32), np.repeat([0, 1], [len(p), len(a)]).astype(np.uint8))
                for _, p, a in answered
            ]
            rows = _score_sequences(scorer, tokenizer, records, [index for index, _, _ in answered], sequences)
            if ledger is not None and rows is not None:
                ledger.finish(chunk, functools.partial(program.write_part, rows=rows, schema=TOKEN_SCHEMA))
                work.set_finished(ledger.finished())
    if ledger is not None:
        say(describe_own_samples(Path(args.output)))


def _estimate(
    args: argparse.Namespace, scorer: ModelScorer, tokenizer: ChatTokenizer, records: TokenizedRecords, total: int
) -> None:
    samples = sorted({int(index) for index in np.linspace(0, total - 1, min(total, 200))})
    _rows(scorer, tokenizer, records, samples[:1])  # compiles and allocates
    start = time.monotonic()
    rows = _rows(scorer, tokenizer, records, samples)
    elapsed = time.monotonic() - start
    if rows is None:
        return
    tokens = sum(len(records[index][0]) for index in samples)
    all_tokens = int(records.lengths()[:total].sum())
    phi = np.array([row["phi_mean"] for row in rows])
    say(
        f"> {len(rows)} records, {tokens:,} tokens in {elapsed:.1f} s: {tokens / elapsed:,.0f} tokens/s\n"
        f"> {total:,} records, {all_tokens:,} tokens: about {all_tokens / tokens * elapsed / 3600:.2f} hours\n"
        f"> mean of phi over records {phi.mean():+.4f} ± {phi.std() / max(len(phi), 1) ** 0.5:.4f} (standard error)"
    )
