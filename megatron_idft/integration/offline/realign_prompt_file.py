"""`realign prompts`: from the flags to the file of prompts. Neither a model nor a process group is made."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_idft.corpus.formats import describe_forms
from megatron_idft.data.chat.tokenizer import load_tokenizer
from megatron_idft.errors import ArgumentError
from megatron_idft.hinted_decoding import prompt_rows
from megatron_idft.hinted_decoding.input.provided import ProvidedTexts
from megatron_idft.hinted_decoding.input.record_store import RecordStore, build_store
from megatron_idft.hinted_decoding.stages.tasks import RealignInput
from megatron_idft.integration.offline.realign_arguments import describe_renamed
from megatron_idft.integration.offline.realign_settings import (
    check_realign_arguments,
    resolve_origin,
    resolve_prompts,
    resolve_settings,
)
from megatron_idft.integration.platform import flag_checks

_STAGES = {"own": "own responses", "analysis": "analyses", "hinted": "hinted responses"}


def write_prompts(args: argparse.Namespace) -> Iterator[str]:
    """Write the file; yields the lines for the console.

    Raises:
        ArgumentError, InputError: flags or files that cannot be used.
    """
    yield from (f"> {line}" for line in describe_renamed(args))
    _check(args)
    tokenizer = load_tokenizer(
        args.tokenizer_model or args.hf_model, args.chat_template, args.trust_remote_code, args.sft_template_date
    )
    named = resolve_prompts(args)
    settings = resolve_settings(args, named.templates, tokenizer.vocab_size)
    templates = () if named.auto else named.templates
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records"
        build_store(path, args.sft_data, args.limit, args.sft_bad_records)
        store = RecordStore(path)
        yield from (f"> {line}" for line in describe_forms(store.forms))
        analyses = None
        if args.analyses is not None:
            origin = resolve_origin(args, tokenizer, templates)
            analyses = ProvidedTexts(args.analyses, "analyses", None if args.limit else store.ids(), origin)
        given = (_given(index, store, analyses) for index in range(len(store)))
        counts = prompt_rows.write_prompts(given, tokenizer, settings, templates, args.output)
    for stage, name in _STAGES.items():
        yield f"> {counts.pop(stage, 0):,} prompts of {name}"
    if named.auto:
        yield "> none of a hint: with --hint-prompt auto a trial of `realign` chooses it; name one for its prompts"
    yield from (f"> no prompt for {count:,}: {why}" for why, count in counts.most_common())
    yield f"> {args.output}; next: tools/vllm_rollouts.py, then realign with the same flags and its files"


def _check(args: argparse.Namespace) -> None:
    if not args.sft_data:
        raise ArgumentError("pass the records as --sft-data FILE [FILE …]")
    if args.tokenizer_model is None and args.hf_model is None:
        raise ArgumentError("no tokenizer: pass --hf-model DIR, or --tokenizer-model with a folder or a .model file")
    for name in ("seq_length", "limit", "max_new_tokens", "analysis_max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} {value}: pass a whole number from 1")
    if args.regenerate:
        raise ArgumentError("--regenerate reads no texts of another engine: drop it")
    check_realign_arguments(args)
    flag_checks.check_files("--sft-data", args.sft_data)


def _given(index: int, store: RecordStore, analyses: ProvidedTexts | None) -> RealignInput:
    record = store[index]
    return RealignInput(index, record, {}, {} if analyses is None else analyses.get(record.id))
