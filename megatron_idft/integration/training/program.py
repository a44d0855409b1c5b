"""The training program: chat records -> Megatron's `pretrain()`, on nothing but the megatron-core wheel."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron_idft.checkpoint.best import BestCheckpoints
from megatron_idft.data.chat.show import render_sample
from megatron_idft.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from megatron_idft.data.model_rows import require_rows
from megatron_idft.data.reference.columns import KEYS
from megatron_idft.errors import ArgumentError
from megatron_idft.integration.loss.negative_weights import check_negative_weights
from megatron_idft.integration.loss.publishing import print_rank_last
from megatron_idft.integration.loss.trainer import TrainerIntegration
from megatron_idft.integration.platform import flag_checks, hf_model, upstream
from megatron_idft.integration.platform.ranks import print_on_rank_0
from megatron_idft.integration.platform.restricted_loading import restrict_checkpoint_reading
from megatron_idft.integration.platform.settings_lines import training_lines
from megatron_idft.integration.training import batches, checkpoints, elastic, stops
from megatron_idft.integration.training.arguments import NEVER, add_data_arguments, validate_data_arguments
from megatron_idft.integration.training.data import NamedData, TrainingData, named_data
from megatron_idft.integration.training.evaluation import (
    EvaluationInterrupted,
    ValidationSet,
    abandon_evaluation,
    as_only_set,
    best_checkpoints,
    evaluate_before_training,
    evaluation_rounds,
    reported_sources,
    validation_sets,
)
from megatron_idft.integration.training.packed_attention import check_attention
from megatron_idft.integration.training.trained_tokens import TrainedTokenCounter, trained_token_counter
from megatron_idft.statistics import Reference


class ChatTraining(TrainerIntegration):
    """The trainer with the loss, fed by chat records."""

    def __init__(self) -> None:
        super().__init__(end_of_turn_ids=self._corpus_end_of_turn_ids)
        self.tokenizer: ChatTokenizer | None = None
        self.data: TrainingData | None = None
        self._normalization = batches.PER_TOKEN  # of this step
        self._count_trained: TrainedTokenCounter | None = None
        self._named: NamedData | None = None  # until the flags are parsed
        self._validation_sets: list[ValidationSet] = []
        self._source_names: tuple[str, ...] = ()
        self._best: BestCheckpoints | None = None
        self._export: hf_model.HuggingFaceExport | None = None
        self._last_saved: int | None = None
        self._evaluated_at: int | None = None
        self._finished = False
        self.checkpoints = checkpoints.RunCheckpoints()
        self.stops = stops.Stops(self.checkpoints)

    @property
    def trains_packs(self) -> bool:
        """Whether samples hold several documents. Known when the flags are parsed."""
        return self._named is not None and self._named.packed

    def wrappers(self) -> dict[str, upstream.Wrapper]:
        return super().wrappers() | {
            "megatron.training.training:save_checkpoint_and_time": self._save_checkpoint,
            "megatron.training.training:checkpoint_and_decide_exit": self._decide_exit,
            "megatron.core.dist_checkpointing:save": self.checkpoints.around_save,
            "megatron.training.training:train": self._train,
            "megatron.training.ft_integration:on_eval_step_start": self._evaluation_step,
        }

    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        return super().callbacks() | {"on_eval_step_start": lambda context: self._leave_if_stopped()}

    def _parse_args(self, original: Callable[..., Any], call: inspect.BoundArguments) -> argparse.Namespace:
        call.arguments["extra_args_provider"] = add_data_arguments
        args = super()._parse_args(original, call)
        validate_data_arguments(args)
        self._named = named_data(args)
        flag_checks.check_train(args, reads_records=self._named.prefixes is None)
        self._export = hf_model.HuggingFaceExport(args)
        self.stops.postpone_signal_handler(args)
        return args

    def _setup_model_and_optimizer(self, original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        # The length of training may follow from the data, and the learning-rate schedule follows from that length.
        from megatron.training import get_args

        args = get_args()
        elastic.keep_results_queue(args)
        if args.log_interval == 1:
            print_on_rank_0("> --log-interval 1: metrics with every step, the default of `train`")
        self.checkpoints.before_loading(args)
        self._open_data(args)
        assert self._export is not None and self.tokenizer is not None
        hf_model.convert_before_loading(args)
        self._export.keep_companions(args, self.tokenizer.template.source)
        result = super()._setup_model_and_optimizer(original, call)
        if self.trains_packs:
            check_attention(args, result[0])
        self._count_trained = trained_token_counter(args)
        return result

    def _save_checkpoint(self, original: Callable[..., Any], call: inspect.BoundArguments) -> None:
        from megatron.training import get_args

        with self.stops.saving():
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

    def _decide_exit(self, original: Callable[..., Any], call: inspect.BoundArguments) -> bool:
        if original(*call.args, **call.kwargs):
            return True
        # A signal that came while it was saved. Without, nobody would look before the end of another step.
        return self._last_saved == call.arguments["iteration"] and self.stops.stopped()

    def _train_step(self, original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        from megatron.training import get_args

        self.stops.arm_signal_handler(get_args())
        assert self.data is not None
        self._normalization = self.data.normalizations.at(call.arguments["iteration"])
        result = super()._train_step(original, call)
        _, skipped, _, _, _, gradient_norm, *_ = result
        self.stops.check_step(get_args(), call.arguments["iteration"] + 1, skipped, gradient_norm)
        return result

    def finish(self) -> None:
        """The end of the training on every rank, when `pretrain()` has returned."""
        from megatron.training import get_args
        from megatron.training.utils import print_rank_0

        assert self._export is not None
        args = get_args()
        self.stops.after_training()
        if self._finished:
            self._export.complete(args, args.iteration)
        else:
            self._export.after_training(args, self._last_saved)
        if args.save is not None and not args.skip_train:
            next_step = "" if args.save_hf else f". next: megatron-idft convert to-hf {args.save} DIR, for transformers"
            print_rank_0(f"> finished: {args.save} holds iteration {self.checkpoints.continues_at}{next_step}")

    def _open_data(self, args: argparse.Namespace) -> None:
        from megatron.training.utils import print_rank_0

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
        assert self._named is not None
        self.data = TrainingData(args, self.tokenizer, self._named)
        for opened in self.data.opened:
            require_rows(opened, self.tokenizer, args.sft_loss_vocab_size or hf_model.recorded_vocab_size(args))
        print_rank_0(self.data.report())
        warning = check_negative_weights(args, self.data.negative_tokens)
        if warning is not None:
            print_rank_0(f"WARNING: {warning}")
        args.sft_data_fingerprint = self.data.fingerprint  # recorded in checkpoints
        print_rank_0(
            "> first sample, trained spans in brackets:\n" + render_sample(*self.data.first_document(), self.tokenizer)
        )
        if args.train_epochs is not None:
            samples = self.data.samples(args.train_epochs)
            args.train_iters = math.ceil(samples / args.global_batch_size)
            each = f"{samples / args.train_epochs:.12g}"
            print_rank_0(f"> {args.train_epochs} epochs of {each} {self.data.unit}: {args.train_iters} iterations")
        self._validation_sets = validation_sets(args, self.data.validation_sizes)
        args.eval_iters = sum(each.iterations for each in self._validation_sets)
        self._source_names = reported_sources(args, self.data.sources)
        self._best = best_checkpoints(args, self._validation_sets)
        if args.eval_interval is None:
            args.eval_interval = NEVER  # Megatron evaluates after training in any case

    def _sources(self) -> tuple[str, ...]:
        return self._source_names

    def forward_step(self, data_iterator: Any, model: torch.nn.Module) -> Any:
        """The `forward_step_func` of `pretrain()`: one micro-batch of records or of packs."""
        assert self.data is not None
        return batches.forward_step(
            data_iterator,
            model,
            limits=self.data.limits,
            sources=bool(self._source_names),
            reference=self.data.reference,
            on_batch=self._note_batch,
            normalization=self._normalization,
            count_trained=self._count_trained,
        )

    def _note_batch(self, batch: Mapping[str, Any]) -> None:
        """Give the hooks what they need of a micro-batch and the model does not pass on."""
        columns = {name: batch[key] for name, key in KEYS.items()}
        for hook in self._hooks:
            hook.token_sources = batch["sources"]
            hook.reference = None if columns["log_prob"] is None else Reference(**columns)
            hook.num_trained, hook.token_factors = batch["num_trained"], batch["token_factors"]

    def _train(self, original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        """Megatron's training loop, after an evaluation of the model that it begins with."""
        from megatron.training import get_args

        args = get_args()
        call.apply_defaults()
        if args.do_valid and args.iteration == 0 and not args.start_eval_at_iter:
            evaluate_before_training(args, call.arguments)
        if not self._finished and not args.skip_train:
            assert self.data is not None
            lines = training_lines(args, self.data.unit, str(self.data.normalizations))
            print_on_rank_0("\n".join(["> this training", *(f">   {line}" for line in lines)]))
        return original(*call.args, **call.kwargs)

    def _evaluate_and_print_results(self, original: Callable[..., Any], call: inspect.BoundArguments) -> None:
        from megatron.training import get_args

        args, iterator, iteration = get_args(), call.arguments["data_iterator"], call.arguments["iteration"]
        if iteration == self._evaluated_at:
            return  # after training, what --eval-interval has measured at its last step
        self._measured = {}
        for each in self._validation_sets:
            with as_only_set(args, each):
                call.arguments["data_iterator"] = [iterator] if each.name else iterator
                super()._evaluate_and_print_results(original, call)
            if not self._evaluated:  # stopped: by a signal, or because --exit-duration-in-mins has passed
                return
        self._evaluated_at = iteration
        if self._best is not None:
            self._best.measure(iteration, self._measured)
            self._prune()

    def _evaluation_step(self, original: Callable[..., Any], call: inspect.BoundArguments) -> None:
        self._leave_if_stopped()
        original(*call.args, **call.kwargs)

    def _leave_if_stopped(self) -> None:
        """Called on all ranks before each step of an evaluation."""
        if self.stops.stopped():
            raise EvaluationInterrupted

    def _evaluate(self, original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        try:
            return super()._evaluate(original, call)
        except EvaluationInterrupted:
            abandon_evaluation(call.arguments["model"], call.arguments["config"])
            return None, None, True  # as if Megatron's time limit had come; the training loop then saves

    def _prune(self) -> None:
        assert self._best is not None
        deleted = self._best.prune()
        if deleted:
            best = ", ".join(f"{i} ({self._best.measured[i]:.6g})" for i in self._best.best())
            print_rank_last(
                f"> the best checkpoints by {self._best.metric}: iterations {best}; deleted"
                f" {', '.join(map(str, deleted))}"
            )

    def _compare_with_checkpoint(self, args: argparse.Namespace) -> None:
        from megatron.training.utils import print_rank_0

        super()._compare_with_checkpoint(args)
        then = getattr(self._checkpoint_args, "sft_data_fingerprint", args.sft_data_fingerprint)
        if then != args.sft_data_fingerprint:
            print_rank_0(
                f"WARNING: this run continues a checkpoint that was trained on {then}, now on"
                f" {args.sft_data_fingerprint}: the records (or only their files' times), the tokenizer, its template,"
                " --seq-length, --sft-truncation, --sft-last-turn-only, --sft-prompt-weight, --sft-packing or the"
                " scores of --sft-reference have changed, so samples may be repeated or left out. If the data is new"
                " on purpose, --finetune starts its epochs at the beginning"
            )

    def _token_ids(self) -> Mapping[str, int]:
        assert self.tokenizer is not None
        return self.tokenizer.special_ids

    def _corpus_end_of_turn_ids(self) -> Sequence[int]:
        assert self.data is not None
        return self.data.end_of_turn_ids

    def datasets(self, num_samples: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, None]:
        """The `train_valid_test_datasets_provider` of `pretrain()`: (train, validation, no test set)."""
        from megatron.core import mpu
        from megatron.training import get_args

        args = get_args()
        # Every launch begins with a whole round, wherever and with whatever batch size the last one stopped.
        args.consumed_valid_samples = 0
        finished = self._is_finished(args)
        if mpu.get_tensor_model_parallel_rank() != 0:
            return None, None, None  # its batches come by broadcast
        if finished:
            args.eval_iters = 0
            return None, None, None
        assert self.data is not None
        numbers = {name: number for number, name in enumerate(self._source_names)} or None
        train, sets = self.data.datasets(args, num_samples[0], vp_stage, numbers)
        valid = evaluation_rounds(args, self._validation_sets, sets, num_samples[1])
        return train, valid, None

    def _is_finished(self, args: argparse.Namespace) -> bool:
        """Whether the checkpoint that was loaded is the last one of this training: it has been started again."""
        from megatron.training.utils import print_rank_0

        samples = args.train_samples or args.train_iters * args.global_batch_size
        if args.skip_train or (args.iteration < args.train_iters and args.consumed_train_samples < samples):
            return False
        if self.checkpoints.continues_at != args.iteration:
            raise ArgumentError(
                f"--load {args.load} is at iteration {args.iteration} of {args.train_iters}, so nothing is left to"
                " train: add --finetune to begin a new training with its weights, or ask for a longer one"
            )
        if not self._finished:
            print_rank_0(
                f"> training is finished: {args.save} holds iteration {args.iteration} of {args.train_iters}. For more"
                " pass a longer training with --override-opt_param-scheduler, or another --save"
            )
        self._finished = True
        return True


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

    elastic.die_with_agent()
    elastic.use_fresh_store()
    restrict_checkpoint_reading()
    training = ChatTraining().attach()
    args = parse_and_validate_args()
    model_config = gpt_config_from_args(args) if args.hybrid_layer_pattern is None else hybrid_config_from_args(args)

    def datasets_provider(num_samples: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, None]:
        return training.datasets(num_samples, vp_stage)

    datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # called on every rank, not only TP rank 0
    with training.stops.explaining(args):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            datasets_provider,
            ModelType.encoder_or_decoder,
            training.forward_step,
        )
        training.finish()
