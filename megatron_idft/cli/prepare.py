"""`prepare`: conversations tokenized, masked and packed once, for every later training."""

import os
import signal
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from megatron_idft import console
from megatron_idft.data import flags
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.platform import signals
from megatron_idft.parsing import Parser

if TYPE_CHECKING:
    from megatron_idft.data.reference.settings import ReferenceSettings


def _parser() -> Parser:
    parser = Parser(
        "megatron-idft prepare",
        description="Tokenizes conversations and packs them, in Megatron's .bin/.idx form with loss masks beside it. "
        "Runs in many processes, needs neither torchrun nor a GPU, and goes on where it was stopped: start the same "
        "command again. The files have the same bytes whatever the number of processes.",
    )
    add = parser.add_argument
    flags.add_data(parser)
    add("--output", required=True, metavar="PREFIX", help="of the files that are written: PREFIX.bin, PREFIX.idx, …")
    add("--tokenizer-model", required=True, metavar="PATH", help="a Hugging Face folder or a sentencepiece *.model")
    add("--chat-template", metavar="FILE", help="Jinja, or chatml or plain; default: the tokenizer's own")
    add("--seq-length", type=int, required=True, metavar="N", help="positions of a pack, as in training")
    add("--pad-multiple", type=int, default=1, metavar="N", help="give every document a multiple of N positions; under"
        " context parallelism 2 x its size; default 1")  # fmt: skip
    flags.add_truncation(parser)
    flags.add_bad_records(parser)
    flags.add_last_turn_only(parser)
    flags.add_prompt_weight(parser)
    flags.add_template_date(parser)
    flags.add_reference(parser)
    add(
        "--sft-reference-entropy",
        "--reference-entropy",
        action="store_true",
        help="keep the entropy of the"
        " reference's distribution at each trained token, too, for objectives that use it; `train` sees to that itself",
    )
    flags.add_reference_top_k(
        parser,
        "Keep the K most probable tokens of the reference at each trained token, with"
        " their log q, for objectives with a divergence from it: 8 K bytes a token. 20 is usual. Default none.",
    )
    add("--trust-remote-code", action="store_true", help="run Python code that a tokenizer brings")
    add("--workers", type=int, metavar="N", help="processes; default: one for each processor")
    add("--seed", type=int, default=1234, help="of the order of the packs; default 1234")
    add("--limit", type=int, metavar="N", help="only the first N records")
    add("--chunk-bytes", type=int, default=8 << 20, metavar="N",
        help="of text, the work of a process at a time, which a kill may undo; default 8 MiB")  # fmt: skip
    add("--keep-chunks", action="store_true", help="leave PREFIX.chunks in place")
    add("--show", type=int, metavar="N", help="print the first N packs, decoded, with their trained spans marked")
    add("--dry-run", action="store_true", help="print the first records (--show N, default 3) and write nothing")
    add("--no-progress", action="store_true", help="no progress bars")
    return parser


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(list(argv))
    with console.quiet("prepare", filled="kept"):
        return _prepare(args)


def _prepare(args: Namespace) -> int:
    # Before transformers is imported: the processes below keep all processors busy.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from megatron_idft.data.chat.tokenizer import load_tokenizer
    from megatron_idft.data.packed.pack_settings import PrepareSettings
    from megatron_idft.data.packed.prepare import prepare
    from megatron_idft.data.packed.preview import show_packs, show_records

    settings = PrepareSettings(
        tuple(args.sft_data or ()),
        args.seq_length,
        args.sft_truncation,
        args.sft_bad_records,
        args.sft_last_turn_only,
        args.limit,
        args.pad_multiple,
        args.seed,
        args.chunk_bytes,
        prompt_weight=args.sft_prompt_weight,
        reference=_reference(args),
    )
    tokenizer = load_tokenizer(args.tokenizer_model, args.chat_template, args.trust_remote_code, args.sft_template_date)
    if args.dry_run:
        for sample in show_records(settings, tokenizer, args.show or 3):
            console.say(f"{sample}\n")
        return 0
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    prepared = prepare(
        settings,
        tokenizer,
        args.output,
        workers=args.workers,
        keep_chunks=args.keep_chunks,
        progress=not args.no_progress,
    )
    console.say(prepared.report)
    for sample in show_packs(prepared.store, tokenizer, args.show or 0):
        console.say(f"\n{sample}")
    return 0


def _reference(args: Namespace) -> "ReferenceSettings | None":
    from megatron_idft.data.reference.columns import ReferenceColumns
    from megatron_idft.data.reference.settings import ReferenceSettings

    columns = ReferenceColumns(args.sft_reference_entropy, args.sft_reference_top_k or 0, args.sft_reference_dtype)
    if args.sft_reference is not None:
        return ReferenceSettings(args.sft_reference, columns)
    if columns != ReferenceColumns():
        raise ArgumentError("--sft-reference-… says what is kept of --sft-reference: name its SCORES, or drop the flag")
    return None


def _stop(number: int, _: object) -> NoReturn:
    console.complain(
        f"megatron-idft prepare: stopped by {signals.name_of(number)}; the finished chunks stand, and the same command"
        " goes on from there"
    )
    raise SystemExit(signals.exit_code(number))
