"""The scoring program: a Megatron checkpoint and records in, per-record statistics under the model out.

Launches need not know of each other. Each takes chunks of records from a ledger in the output folder (corpus/ledger.py)
and writes one Parquet part per chunk; whoever finds all chunks finished merges them and writes the report.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_idft.errors import UserError
from megatron_idft.integration import hf_model
from megatron_idft.integration.arguments import ArgumentError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from megatron_idft.corpus.ledger import Ledger
    from megatron_idft.data import ChatTokenizer, TokenCache
    from megatron_idft.integration.scoring import ModelScorer

_POLL_SECONDS = 5.0
# What Megatron must not do here, and what it insists on though nothing is trained.
_MEGATRON_DEFAULTS = {"micro_batch_size": 1, "no_load_optim": True, "no_load_rng": True, "skip_train": True}


class Terminated(UserError):
    """SIGTERM arrived: what was in flight is given back."""

    exit_code = 143


def add_score_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of scoring to Megatron's parser."""
    group = parser.add_argument_group(title="score")
    group.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        default=None,
        help="Records: JSONL (also .gz, .zst) or Parquet, with `messages` or with `prompt` and `response`.",
    )
    group.add_argument(
        "--output",
        metavar="DIR",
        default=None,
        help="Where the scores go. Any number of launches with the same settings may share it; a stopped one goes on.",
    )
    hf_model.add_hf_model_arguments(group)
    group.add_argument(
        "--per-token",
        action="store_true",
        help="Keep log_prob, entropy and phi of every response token in scores.parquet. The parts have them anyway.",
    )
    group.add_argument("--limit", type=int, default=None, metavar="N", help="Score only the first N records.")
    group.add_argument(
        "--chunk-records",
        type=int,
        default=512,
        help="Records that a launch takes at a time; what a killed launch loses. Default 512.",
    )
    group.add_argument(
        "--tokens-per-batch",
        type=int,
        default=16384,
        help="Padded tokens in one forward pass. Records of like length go together. Default 16384.",
    )
    group.add_argument(
        "--lease-seconds",
        type=float,
        default=120.0,
        help="A launch that gives no sign for so long has lost its chunk to the others. Default 120.",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="Read the records, show the first with its scored spans, and stop."
    )
    group.add_argument(
        "--estimate",
        action="store_true",
        help="Score 200 records spread over the corpus, and print the time and the statistics to expect.",
    )
    group.add_argument(
        "--calibrate",
        type=int,
        default=None,
        metavar="N",
        help="Have the model answer N prompts of the corpus itself, at temperatures 1 and 0.3, and score the answers:"
        " the null that the report compares with. phi is 0 on average at temperature 1, by definition.",
    )
    group.add_argument(
        "--calibrate-max-tokens", type=int, default=256, help="Longest of these answers, in tokens. Default 256."
    )
    group.add_argument(
        "--truncation",
        choices=("truncate", "drop", "error"),
        default="truncate",
        help="What to do with a conversation longer than --seq-length: cut its end, leave it out, or stop.",
    )
    group.add_argument(
        "--bad-records",
        choices=("stop", "skip"),
        default="stop",
        help="What to do with a record that cannot be read: stop, naming file and line, or write it to an errors file.",
    )
    group.add_argument(
        "--template-date", metavar="YYYY-MM-DD", default=None, help="The date for chat templates that write today's."
    )
    group.add_argument(
        "--token-cache",
        metavar="DIR",
        default=None,
        help="Where the tokenized records are kept. Default: `.megatron-idft-cache` beside the first file.",
    )
    group.add_argument(
        "--sft-loss-backend",
        choices=("auto", "reference", "triton"),
        default="auto",
        help="Implementation of the statistics, as in training. Default auto.",
    )
    group.add_argument(
        "--sft-loss-vocab-size",
        type=int,
        default=None,
        help="Rows of the true vocabulary; columns above are Megatron's padding. Default: the tokenizer's size.",
    )
    group.add_argument("--cpu", action="store_true", help="Score on the CPU with gloo even where a GPU is present.")
    return parser


def score() -> None:
    """Score as `sys.argv` says. `prepare_process` must have run."""
    signal.signal(signal.SIGTERM, _raise_terminated)
    args = _parse()
    from megatron.training.utils import print_rank_0

    tokenizer, cache = _open_data(args)
    if args.dry_run:
        from megatron_idft.data import render_sample

        print_rank_0("> first record, scored spans in brackets:\n" + render_sample(*cache[0], tokenizer))
        return
    scorer = _load_scorer(args)
    total = min(len(cache), args.limit or len(cache))
    if args.estimate:
        _estimate(args, scorer, tokenizer, cache, total)
        return
    _score_chunks(args, scorer, tokenizer, cache, total)
    if args.calibrate is not None:
        _calibrate(args, scorer, tokenizer, cache, total)


def _raise_terminated(*_: object) -> None:
    raise Terminated("stopped by SIGTERM; the finished chunks stand, and the same command goes on from there")


def _parse() -> argparse.Namespace:
    from megatron.training import arguments as megatron_arguments
    from megatron.training.initialize import initialize_megatron

    args = megatron_arguments.parse_args(add_score_arguments)
    if not args.data or not args.output:
        raise ArgumentError("pass the records as --data FILE [FILE …] and a folder as --output DIR")
    if args.load is None and args.pretrained_checkpoint is None:
        raise ArgumentError(
            "no model: pass a Hugging Face folder as --hf-model DIR, or its checkpoint as --load DIR with the model's"
            " flags as in training"
        )
    if args.tokenizer_model is None:
        raise ArgumentError(
            "no tokenizer: pass --tokenizer-model with a Hugging Face folder or a sentencepiece .model file"
        )
    for name in ("limit", "chunk_records", "tokens_per_batch", "calibrate", "calibrate_max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} {value}: pass a whole number from 1")
    flags = [f"--{name.replace('_', '-')}" for name in _MEGATRON_DEFAULTS]
    sys.argv += ["--micro-batch-size", "1"] * (args.micro_batch_size is None)
    sys.argv += [flag for flag in (*flags[1:], "--exit-on-missing-checkpoint") if flag not in sys.argv]
    if args.tokenizer_type is None:
        is_sentencepiece = args.tokenizer_model.endswith(".model")
        sys.argv += ["--tokenizer-type", "SentencePieceTokenizer" if is_sentencepiece else "HuggingFaceTokenizer"]
    args = megatron_arguments.parse_and_validate_args(add_score_arguments)
    if args.sft_loss_vocab_size is None:
        args.sft_loss_vocab_size = hf_model.recorded_vocab_size(args)
    initialize_megatron()
    return args


def _open_data(args: argparse.Namespace) -> tuple[ChatTokenizer, TokenCache]:
    from megatron.training.utils import print_rank_0

    from megatron_idft.data import load_tokenizer, open_token_cache
    from megatron_idft.integration.program import build_shared_token_cache

    tokenizer = load_tokenizer(
        args.tokenizer_model,
        chat_template=args.chat_template,
        trust_remote_code=args.trust_remote_code,
        template_date=args.template_date,
    )
    settings = {
        "tokenizer": tokenizer,
        "seq_length": args.seq_length,
        "cache_dir": args.token_cache or str(Path(args.data[0]).resolve().parent / ".megatron-idft-cache"),
        "truncation": args.truncation,
        "on_bad_record": args.bad_records,
    }
    build_shared_token_cache("--data", args.data, settings)
    cache = open_token_cache(args.data, **settings)
    print_rank_0(cache.report())
    return tokenizer, cache


def _load_scorer(args: argparse.Namespace) -> ModelScorer:
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        hybrid_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.training import setup_model_and_optimizer

    from megatron_idft.integration.scoring import ModelScorer
    from megatron_idft.integration.trainer import true_vocab_size

    hf_model.convert_before_loading(args)
    model_config = gpt_config_from_args(args) if args.hybrid_layer_pattern is None else hybrid_config_from_args(args)
    model, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, model_config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    args.sft_loss_vocab_size = true_vocab_size(args)
    return ModelScorer(model, args.sft_loss_vocab_size, args.tokens_per_batch, args.sft_loss_backend)


def _leads() -> bool:
    """Whether this rank is the one of its launch that receives the statistics, keeps the ledger and writes."""
    from megatron.core import mpu

    return (
        mpu.is_pipeline_last_stage(ignore_virtual=True)
        and mpu.get_tensor_model_parallel_rank() == 0
        and mpu.get_data_parallel_rank() == 0
    )


def _from_leader(value: Any) -> Any:
    """The leader's value, on every rank of the launch."""
    import torch

    leaders: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(leaders, (_leads(), value))
    return next(value for leads, value in leaders if leads)


def _rows(
    scorer: ModelScorer, tokenizer: ChatTokenizer, cache: TokenCache, samples: Sequence[int]
) -> list[dict[str, Any]] | None:
    """Scored rows of these samples on the leading rank, None elsewhere."""
    return _score_sequences(scorer, tokenizer, cache, samples, [cache[index] for index in samples])


def _score_sequences(
    scorer: ModelScorer,
    tokenizer: ChatTokenizer,
    cache: TokenCache,
    samples: Sequence[int],
    sequences: Sequence[tuple[NDArray[np.int32], NDArray[np.uint8]]],
) -> list[dict[str, Any]] | None:
    """The same for (token ids, mask) that belong to these samples."""
    from megatron_idft.corpus.scoring import scored_record

    statistics = scorer.score([ids for ids, _ in sequences])
    if statistics is None or not _leads():
        return None
    rows = []
    for index, (ids, mask), (log_prob, entropy), record in zip(
        samples, sequences, statistics, cache.records(samples), strict=True
    ):
        try:
            row = scored_record(
                ids,
                mask,
                log_prob,
                entropy,
                decode=tokenizer.decode,
                end_of_turn_ids=cache.end_of_turn_ids,
                special_ids=tokenizer.special_ids.values(),
            )
        except FloatingPointError as error:
            raise ArgumentError(f"{record['file']}, line {record['line']}: {error}") from error
        rows.append({"index": index, **record, **row})
    return rows


def _score_chunks(
    args: argparse.Namespace, scorer: ModelScorer, tokenizer: ChatTokenizer, cache: TokenCache, total: int
) -> None:
    from tqdm import tqdm

    from megatron_idft.corpus.ledger import Ledger
    from megatron_idft.corpus.scored import finish_scores

    chunks = -(-total // args.chunk_records)
    with ExitStack() as stack:
        ledger = None
        if _leads():
            settings = _settings(args, cache, total)
            ledger = stack.enter_context(Ledger(args.output, settings, chunks, lease_seconds=args.lease_seconds))
        bar = tqdm(total=chunks, desc="scoring", unit="chunk", disable=ledger is None, file=sys.stderr, mininterval=1.0)
        stack.callback(bar.close)
        tokens = 0
        for chunk in _claimed(ledger):
            samples = range(chunk * args.chunk_records, min((chunk + 1) * args.chunk_records, total))
            rows = _rows(scorer, tokenizer, cache, samples)
            if ledger is None or rows is None:
                continue
            ledger.finish(chunk, functools.partial(_write_part, rows=rows))
            tokens += sum(len(cache[index][0]) for index in samples)
            bar.n = len(ledger.parts())
            bar.set_postfix_str(f"{tokens / bar.format_dict['elapsed']:,.0f} tokens/s in this launch", refresh=False)
            bar.refresh()
        bar.close()
        if ledger is not None:
            print(finish_scores(Path(args.output), ledger.parts(), per_token=args.per_token), flush=True)


def _claimed(ledger: Ledger | None) -> Iterator[int]:
    """Chunks for this launch until all are finished, the same on every rank. Waits for those that others hold."""
    while True:
        chunk = ledger.claim() if ledger is not None else None
        chunk, finished = _from_leader((chunk, ledger is not None and chunk is None and ledger.all_finished()))
        if finished:
            return
        if chunk is None:
            time.sleep(_POLL_SECONDS)
        else:
            yield chunk


def _write_part(path: Path, *, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from megatron_idft.corpus.scoring import TOKEN_SCHEMA

    pq.write_table(pa.Table.from_pylist(rows, TOKEN_SCHEMA), path, compression="zstd")


def _settings(args: argparse.Namespace, cache: TokenCache, total: int) -> dict[str, Any]:
    """What must agree between launches on one output folder. Layouts may differ: they change rounding alone."""
    return {
        "model": str(Path(args.load or args.pretrained_checkpoint).resolve()),
        "hf_model": None if args.hf_model is None else Path(args.hf_model).resolve().name,
        "data": [Path(path).name for path in args.data],
        "iteration": args.iteration,
        "tokens": cache.path.name,  # the fingerprint of records, tokenizer, template and length
        "records": total,
        "chunk_records": args.chunk_records,
        "precision": str(args.params_dtype),
        "vocab_size": args.sft_loss_vocab_size,
    }


def _calibrate(
    args: argparse.Namespace, scorer: ModelScorer, tokenizer: ChatTokenizer, cache: TokenCache, total: int
) -> None:
    """Own answers to prompts spread over the corpus, scored like records: a ledger with one part per temperature."""
    import numpy as np

    from megatron_idft.corpus.ledger import Ledger
    from megatron_idft.corpus.scored import OWN_SAMPLE_TEMPERATURES, OWN_SAMPLES, describe_own_samples
    from megatron_idft.inference.decoding import RecomputingDecoder

    decoder = RecomputingDecoder(
        scorer.model, args.sft_loss_vocab_size, args.tokens_per_batch, max_positions=args.seq_length
    )
    samples = sorted({int(index) for index in np.linspace(0, total - 1, min(total, args.calibrate))})
    prompts = [ids[: int(np.flatnonzero(mask)[0])] for ids, mask in (cache[index] for index in samples)]
    with ExitStack() as stack:
        ledger = None
        if _leads():
            settings = _settings(args, cache, total) | {
                "answers": len(samples),
                "max_tokens": args.calibrate_max_tokens,
                "seed": args.seed,
                "temperatures": list(OWN_SAMPLE_TEMPERATURES),
            }
            folder, count = Path(args.output) / OWN_SAMPLES, len(OWN_SAMPLE_TEMPERATURES)
            ledger = stack.enter_context(Ledger(folder, settings, count, lease_seconds=args.lease_seconds))
        for chunk in _claimed(ledger):
            answers = decoder.generate(
                prompts,
                [str(index) for index in samples],
                max_tokens=args.calibrate_max_tokens,
                temperature=OWN_SAMPLE_TEMPERATURES[chunk],
                seed=args.seed,
                stop_ids={*cache.end_of_turn_ids, tokenizer.eos_id},
            )
            answered = [(i, p, a) for i, p, a in zip(samples, prompts, answers, strict=True) if len(a)]
            sequences = [
                (np.concatenate([p, a]).astype(np.int32), np.repeat([0, 1], [len(p), len(a)]).astype(np.uint8))
                for _, p, a in answered
            ]
            rows = _score_sequences(scorer, tokenizer, cache, [index for index, _, _ in answered], sequences)
            if ledger is not None and rows is not None:
                ledger.finish(chunk, functools.partial(_write_part, rows=rows))
    if ledger is not None:
        print(describe_own_samples(Path(args.output)), flush=True)


def _estimate(
    args: argparse.Namespace, scorer: ModelScorer, tokenizer: ChatTokenizer, cache: TokenCache, total: int
) -> None:
    import numpy as np

    samples = sorted({int(index) for index in np.linspace(0, total - 1, min(total, 200))})
    _rows(scorer, tokenizer, cache, samples[:1])  # compiles and allocates
    start = time.monotonic()
    rows = _rows(scorer, tokenizer, cache, samples)
    elapsed = time.monotonic() - start
    if rows is None:
        return
    tokens = sum(len(cache[index][0]) for index in samples)
    all_tokens = int(cache.lengths()[:total].sum())
    phi = np.array([row["phi_mean"] for row in rows])
    print(
        f"> {len(rows)} records, {tokens:,} tokens in {elapsed:.1f} s: {tokens / elapsed:,.0f} tokens/s\n"
        f"> {total:,} records, {all_tokens:,} tokens: about {all_tokens / tokens * elapsed / 3600:.2f} hours\n"
        f"> mean of phi over records {phi.mean():+.4f} ± {phi.std() / max(len(phi), 1) ** 0.5:.4f} (standard error)",
        flush=True,
    )
