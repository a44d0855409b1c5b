"""The training program: chat records -> Megatron's `pretrain()`, on the megatron-core wheel alone."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_idft.checkpoint.best import BestCheckpoints
from megatron_idft.data.validation_sets import named_sets
from megatron_idft.integration import endings, hf_model, run_checkpoints, workers
from megatron_idft.integration.arguments import ArgumentError
from megatron_idft.integration.evaluation import (
    ValidationSet,
    add_evaluation_arguments,
    as_only_set,
    best_checkpoints,
    reported_sources,
    validate_evaluation_arguments,
)
from megatron_idft.integration.packed_batches import check_attention
from megatron_idft.integration.packed_data import PackedData, prepared_data
from megatron_idft.integration.publishing import print_rank_last
from megatron_idft.integration.shared_build import build_once
from megatron_idft.integration.trainer import TrainerIntegration

if TYPE_CHECKING:
    import torch

    from megatron_idft.data import ChatTokenizer, TokenCache

NEVER = 10**9  # an interval, in iterations, that no training reaches


def add_data_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of the chat data to Megatron's parser."""
    group = parser.add_argument_group(title="sft data")
    group.add_argument(
        "--sft-data",
        nargs="+",
        metavar="FILE",
        default=None,
        help="Training records: JSONL (also .gz, .zst) or Parquet, with `messages` or with `prompt` and `response`. Or"
        " packs that `prepare` has made, as PREFIX[:weight] …: an epoch visits each pack of a prefix `weight` times,"
        " by default once.",
    )
    add_evaluation_arguments(group)
    group.add_argument(
        "--sft-last-turn-only",
        action="store_true",
        help="Train the last assistant turn of each conversation only; the earlier ones are context. For corpora that"
        " repeat a conversation once for each of its turns, and for templates that edit earlier turns.",
    )
    group.add_argument(
        "--sft-template-date",
        metavar="YYYY-MM-DD",
        default=None,
        help="The date for chat templates that write today's: tokens must not depend on the day they are made. Without"
        " it such templates fall back to their fixed date, or are refused.",
    )
    group.add_argument(
        "--train-epochs",
        type=int,
        default=None,
        help="Passes over the training records, each record exactly once per pass. Instead of --train-iters.",
    )
    group.add_argument(
        "--sft-truncation",
        choices=("truncate", "drop", "error"),
        default="truncate",
        help="What to do with a conversation longer than --seq-length: cut its end, leave it out, or stop. Counted and"
        " reported. Default truncate.",
    )
    group.add_argument(
        "--sft-bad-records",
        choices=("stop", "skip"),
        default="stop",
        help="What to do with a record that cannot be read: stop, naming file and line, or write it to an errors file"
        " and go on. Default stop.",
    )
    group.add_argument(
        "--sft-cache",
        metavar="DIR",
        default=None,
        help="Where the tokenized records are kept, under a fingerprint of data, tokenizer, template and length."
        " Default: the folder `.megatron-idft-cache` beside the first training file.",
    )
    run_checkpoints.add_checksum_argument(group)
    endings.add_signal_argument(group)
    hf_model.add_hf_model_arguments(group)
    hf_model.add_save_hf_argument(group)
    # A length that the data decides, unless the user does.
    parser.set_defaults(eval_iters=None)
    return parser


class ChatTraining(TrainerIntegration):
    """The trainer with the loss, fed by chat records."""

    def __init__(self) -> None:
        super().__init__(end_of_turn_ids=self._corpus_end_of_turn_ids)
        self.tokenizer: ChatTokenizer | None = None
        self.train_cache: TokenCache | None = None
        self.valid_caches: dict[str, TokenCache] = {}  # by the names of validation sets
        self.packs: PackedData | None = None
        self._prepared: tuple[dict[str, Fraction], dict[str, list[str]]] | None = None
        self._validation_sets: list[ValidationSet] = []
        self._source_names: tuple[str, ...] = ()
        self._best: BestCheckpoints | None = None
        self._export: hf_model.HuggingFaceExport | None = None
        self._last_saved: int | None = None
        self.checkpoints = run_checkpoints.RunCheckpoints()
        self.endings = endings.Endings(self.checkpoints)

    @property
    def trains_packs(self) -> bool:
        """Whether the flags name packs rather than records. Known when they are parsed."""
        return self._prepared is not None

    def attach(self) -> ChatTraining:
        from megatron.core import dist_checkpointing
        from megatron.training import training

        super().attach()
        self._wrap(training, "save_checkpoint_and_time", self._save_checkpoint)
        self._wrap(training, "checkpoint_and_decide_exit", self._decide_exit)
        self._wrap(dist_checkpointing, "save", self.checkpoints.around_save)
        self._wrap(training, "train", self._train)
        return self

    def _parse_args(self, original: Callable, call: inspect.BoundArguments) -> argparse.Namespace:
        call.arguments["extra_args_provider"] = add_data_arguments
        args = super()._parse_args(original, call)
        _validate_data_arguments(args)
        self._prepared = prepared_data(args)
        self._export = hf_model.HuggingFaceExport(args)
        self.endings.postpone_signal_handler(args)
        if args.sft_loss is not None and args.sft_loss_vocab_size is None:
            args.sft_loss_vocab_size = hf_model.recorded_vocab_size(args)
        return args

    def _setup_model_and_optimizer(self, original: Callable, call: inspect.BoundArguments) -> Any:
        # The length of training may follow from the data, and the learning-rate schedule follows from that length.
        from megatron.training import get_args

        args = get_args()
        workers.keep_results_queue(args)
        self.checkpoints.before_loading(args)
        self._open_data(args)
        assert self._export is not None and self.tokenizer is not None
        hf_model.convert_before_loading(args)
        self._export.keep_companions(args, self.tokenizer.template.source)
        result = super()._setup_model_and_optimizer(original, call)
        if self.packs is not None:
            check_attention(args, result[0])
        return result

    def _save_checkpoint(self, original: Callable, call: inspect.BoundArguments) -> None:
        from megatron.training import get_args

        with self.endings.saving():
            original(*call.args, **call.kwargs)
        call.apply_defaults()
        if not call.arguments["non_persistent_ckpt"]:
            assert self._export is not None
            self._last_saved = call.arguments["iteration"]
            self.checkpoints.after_save(get_args(), self._last_saved)
            self._export.after_save(get_args(), self._last_saved)
            if self._best is not None:
                self._best.save(self._last_saved)
                self._prune()

    def _decide_exit(self, original: Callable, call: inspect.BoundArguments) -> bool:
        from megatron.training import get_args

        leaving = original(*call.args, **call.kwargs)
        if leaving:
            self.endings.note_signal(get_args())
        return leaving

    def _train_step(self, original: Callable, call: inspect.BoundArguments) -> Any:
        from megatron.training import get_args

        self.endings.arm_signal_handler(get_args())
        result = super()._train_step(original, call)
        _, skipped, _, _, _, gradient_norm, *_ = result
        self.endings.check_step(get_args(), call.arguments["iteration"] + 1, skipped, gradient_norm)
        return result

    def finish(self) -> None:
        """What is left to do on every rank when `pretrain()` has returned."""
        from megatron.training import get_args

        assert self._export is not None
        self._export.after_training(get_args(), self._last_saved)

    def _open_data(self, args: argparse.Namespace) -> None:
        from megatron.training.utils import print_rank_0

        from megatron_idft.data import load_tokenizer, render_sample

        self.tokenizer = load_tokenizer(
            args.tokenizer_model,
            chat_template=args.chat_template,
            trust_remote_code=args.trust_remote_code,
            template_date=args.sft_template_date,
        )
        if self.tokenizer.vocab_size > args.padded_vocab_size:
            raise ArgumentError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens but the model {args.padded_vocab_size} output"
                " rows. Pass the tokenizer that the model was trained with as --tokenizer-model"
            )
        if self._prepared is not None:
            self.packs = PackedData(args, self.tokenizer, *self._prepared)
            print_rank_0(self.packs.report())
            first, unit, fingerprint = self.packs.first_document(), "packs", self.packs.fingerprint
            samples = self.packs.samples(args.train_epochs or 1)
        else:
            self.train_cache = self._cache(args, "--sft-data", args.sft_data)
            first, unit, fingerprint = self.train_cache[0], "records", self.train_cache.path.name
            samples = (args.train_epochs or 1) * len(self.train_cache)
        args.sft_data_fingerprint = fingerprint  # recorded in checkpoints
        print_rank_0("> first sample, trained spans in brackets:\n" + render_sample(*first, self.tokenizer))
        if args.train_epochs is not None:
            args.train_iters = math.ceil(samples / args.global_batch_size)
            each = f"{samples / args.train_epochs:.12g}"
            print_rank_0(f"> {args.train_epochs} epochs of {each} {unit}: {args.train_iters} iterations")
        self._open_validation_sets(args)
        if args.eval_interval is None:  # evaluate once more, after training
            args.eval_interval = args.train_iters or NEVER

    def _open_validation_sets(self, args: argparse.Namespace) -> None:
        if self.packs is not None:
            sizes, sources = self.packs.valid_packs, self.packs.sources
        else:
            assert self.train_cache is not None
            self.valid_caches = {
                name: self._cache(args, f"--sft-valid-data {name}".rstrip(), paths)
                for name, paths in named_sets(args.sft_valid_data or ()).items()
            }
            sizes = {name: len(cache) for name, cache in self.valid_caches.items()}
            sources = [name for cache in (self.train_cache, *self.valid_caches.values()) for name in cache.sources]
        for name, size in sizes.items():
            whole = math.ceil(size / args.eval_global_batch_size)
            iterations = whole if args.eval_iters is None else min(whole, args.eval_iters)
            if iterations:  # --eval-iters 0 switches evaluation off
                self._validation_sets.append(ValidationSet(name, size, iterations))
        args.eval_iters = sum(each.iterations for each in self._validation_sets)
        self._source_names = reported_sources(args, sources)
        self._best = best_checkpoints(args, self._validation_sets)

    def _sources(self) -> tuple[str, ...]:
        return self._source_names

    def forward_step(self, data_iterator: Any, model: torch.nn.Module) -> Any:
        """The `forward_step_func` of `pretrain()`: one micro-batch of records or of packs."""
        from megatron_idft.integration import batches, packed_batches

        step = packed_batches.forward_step if self.trains_packs else batches.forward_step
        return step(data_iterator, model, self._note_sources if self._source_names else None)

    def _note_sources(self, sources: torch.Tensor | None) -> None:
        for hook in self._hooks:
            hook.token_sources = sources

    def _train(self, original: Callable, call: inspect.BoundArguments) -> Any:
        """Megatron's training loop, behind an evaluation of the model that it begins with."""
        from megatron.training import get_args, training

        args = get_args()
        if args.do_valid and args.iteration == 0 and not args.start_eval_at_iter:
            call.apply_defaults()
            given = call.arguments
            hooked = training.should_disable_forward_pre_hook(args)
            if hooked:  # as the loop does: nothing was stepped yet that would have to be gathered
                training.disable_forward_pre_hook(given["model"], param_sync=False)
            training.evaluate_and_print_results(
                "iteration 0",
                given["forward_step_func"],
                given["valid_data_iterator"],
                given["model"],
                0,
                given["process_non_loss_data_func"],
                given["config"],
                non_loss_data_func=given["non_loss_data_func"],
                pg_collection=given["pg_collection"],
                p2p_communicator=given["p2p_communicator"],
            )
            if hooked:
                training.enable_forward_pre_hook(given["model"])
            if args.num_experts is not None:
                training.get_moe_metrics_tracker().clear()
        return original(*call.args, **call.kwargs)

    def _evaluate_and_print_results(self, original: Callable, call: inspect.BoundArguments) -> None:
        from megatron.training import get_args

        args, iterator = get_args(), call.arguments["data_iterator"]
        self._measured = {}
        for each in self._validation_sets:
            with as_only_set(args, each):
                call.arguments["data_iterator"] = [iterator] if each.name else iterator
                super()._evaluate_and_print_results(original, call)
            if not self._evaluated:  # --exit-duration-in-mins has passed
                return
        if self._best is not None:
            self._best.measure(call.arguments["iteration"], self._measured)
            self._prune()

    def _prune(self) -> None:
        assert self._best is not None
        deleted = self._best.prune()
        if deleted:
            best = ", ".join(f"{i} ({self._best.measured[i]:.6g})" for i in self._best.best())
            print_rank_last(
                f"> the best checkpoints by {self._best.metric}: iterations {best}; deleted"
                f" {', '.join(map(str, deleted))}"
            )

    def _cache(self, args: argparse.Namespace, flag: str, paths: Sequence[str]) -> TokenCache:
        """The tokenized records."""
        from megatron.training.utils import print_rank_0

        from megatron_idft.data import open_token_cache

        settings = {
            "tokenizer": self.tokenizer,
            "seq_length": args.seq_length,
            "cache_dir": args.sft_cache or str(Path(paths[0]).resolve().parent / ".megatron-idft-cache"),
            "truncation": args.sft_truncation,
            "on_bad_record": args.sft_bad_records,
            "last_turn_only": args.sft_last_turn_only,
        }
        build_shared_token_cache(flag, paths, settings)
        cache = open_token_cache(list(paths), **settings)
        print_rank_0(cache.report())
        return cache

    def _compare_with_checkpoint(self, args: argparse.Namespace) -> None:
        from megatron.training.utils import print_rank_0

        super()._compare_with_checkpoint(args)
        then = getattr(self._checkpoint_args, "sft_data_fingerprint", args.sft_data_fingerprint)
        if then != args.sft_data_fingerprint:
            print_rank_0(
                f"WARNING: this run continues a checkpoint that was trained on {then}, now on"
                f" {args.sft_data_fingerprint}: the records (or only their files' times), the tokenizer, its template,"
                " --seq-length, --sft-truncation or --sft-last-turn-only have changed, so samples may be repeated or"
                " left out. If the data is another on purpose, --finetune starts its epochs at the beginning"
            )

    def _corpus_end_of_turn_ids(self) -> Sequence[int]:
        if self.packs is not None:
            return self.packs.end_of_turn_ids
        assert self.train_cache is not None
        return self.train_cache.end_of_turn_ids

    def datasets(self, num_samples: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, None]:
        """The `train_valid_test_datasets_provider` of `pretrain()`: (train, validation, no test set)."""
        from megatron.core import mpu
        from megatron.core.datasets.utils import Split
        from megatron.training import get_args

        from megatron_idft.data import ChatDataset, RepeatedRounds, ShuffledEpochs

        args = get_args()
        # Every launch begins with a whole round, wherever and with whatever batch size the last one stopped.
        args.consumed_valid_samples = 0
        if mpu.get_tensor_model_parallel_rank() != 0:
            return None, None, None  # its batches come by broadcast
        numbers = {name: number for number, name in enumerate(self._source_names)} or None
        train: Any
        valid: Any = None
        sets: Mapping[str, Any]
        if self.packs is not None:
            train, sets = self.packs.datasets(args, num_samples[0], vp_stage, numbers)
        else:
            assert self.train_cache is not None and self.tokenizer is not None
            shape = args.seq_length, self.tokenizer.pad_id
            train = ShuffledEpochs(
                ChatDataset(self.train_cache, *shape, numbers),
                seed=args.seed,
                num_samples=num_samples[0],
                num_epochs=args.train_epochs,
            )
            sets = {name: ChatDataset(cache, *shape, numbers) for name, cache in self.valid_caches.items()}
        if self._validation_sets:
            size = args.eval_global_batch_size
            valid = RepeatedRounds(
                [(sets[each.name], each.iterations * size) for each in self._validation_sets],
                # Megatron counts neither the evaluation before the first step nor the one after the last.
                num_samples=num_samples[1] + 2 * args.eval_iters * size,
            )
            valid.split = Split.valid  # Megatron then reads it with the evaluation's batch sizes
        return train, valid, None


def build_shared_token_cache(name: str, paths: Sequence[str], settings: dict[str, Any]) -> None:
    """`build_token_cache` on one process per file system; afterwards every rank can open it."""
    from megatron_idft.data import build_token_cache

    def build(progress: bool) -> None:
        try:
            build_token_cache(list(paths), progress=progress, **settings)
        except PermissionError as error:
            raise ArgumentError(f"the tokenized records cannot be kept ({error}): pass --sft-cache DIR") from error

    build_once(name, build)


def _validate_data_arguments(args: argparse.Namespace) -> None:
    if not args.sft_data:
        raise ArgumentError("no training records: pass --sft-data FILE [FILE …]")
    if args.tokenizer_model is None:
        raise ArgumentError(
            "no tokenizer: pass --tokenizer-model with a Hugging Face folder or a sentencepiece .model file"
        )
    if args.train_epochs is not None:
        if args.train_iters is not None or args.train_samples is not None:
            raise ArgumentError("--train-epochs and --train-iters or --train-samples are two lengths: pass one of them")
        if args.train_epochs < 1:
            raise ArgumentError(f"--train-epochs {args.train_epochs}: pass a whole number from 1")
    elif args.train_iters is None and args.train_samples is None:
        raise ArgumentError("no length of training: pass --train-epochs, --train-iters or --train-samples")
    refusals = {
        "sft": "it reads another data format and needs Transformer Engine. Drop --sft; --sft-data is read without it",
        "mock_data": "drop --mock-data",
        "data_path": "the records come from --sft-data; drop --data-path",
        "full_validation": "every evaluation already reads all of --sft-valid-data; drop --full-validation",
        "multiple_validation_sets": "name the sets as --sft-valid-data NAME=FILE …; drop --multiple-validation-sets",
        "validation_set_names": "name the sets as --sft-valid-data NAME=FILE …; drop --validation-set-names",
        "hybrid_context_parallel": "it needs packed sequences; drop --hybrid-context-parallel",
        "dataloader_inter_document_masking": "records are not packed here; drop --dataloader-inter-document-masking",
        "overlap_moe_expert_parallel_comm": "this program does not build schedule plans; drop"
        " --overlap-moe-expert-parallel-comm, or use `run` with a script that does",
    }
    for name, why in refusals.items():
        if getattr(args, name, None):
            raise ArgumentError(f"--{name.replace('_', '-')} cannot be combined with --sft-data: {why}")
    if args.dataloader_type not in (None, "single"):
        raise ArgumentError(
            f"--dataloader-type {args.dataloader_type}: records are shuffled by --seed and epoch; drop the flag"
        )
    validate_evaluation_arguments(args)
    if args.save and args.save_interval is None:
        args.save_interval = NEVER  # once, after training
    if args.tokenizer_type is None:
        is_sentencepiece = args.tokenizer_model.endswith(".model")
        args.tokenizer_type = "SentencePieceTokenizer" if is_sentencepiece else "HuggingFaceTokenizer"


def train() -> None:
    """Fine-tune as `sys.argv` says. `prepare_process` must have run."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        hybrid_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    workers.die_with_agent()
    workers.use_fresh_store()
    training = ChatTraining().attach()
    args = parse_and_validate_args()
    model_config = gpt_config_from_args(args) if args.hybrid_layer_pattern is None else hybrid_config_from_args(args)

    def datasets_provider(num_samples: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, None]:
        return training.datasets(num_samples, vp_stage)

    datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # called on every rank, not only TP rank 0
    with training.endings.explaining(args):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            datasets_provider,
            ModelType.encoder_or_decoder,
            training.forward_step,
        )
        training.finish()
