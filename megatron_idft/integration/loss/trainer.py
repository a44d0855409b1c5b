"""Attach the loss to `megatron.training`, for the programs `train` and `run`.

Functions of Megatron's trainer are wrapped by name in the modules that call them (platform/upstream.py lists them with
their reasons). Each is called through its module's global name, so the wrappers are reached from any script, whether it
builds its model from a config or from a model_provider. Where Megatron has training callbacks, ours are added to the
script's for the events that serve.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from megatron_idft.errors import ArgumentError, UnsupportedModelError
from megatron_idft.inference.captured_collectives import leave_graphs_unregistered
from megatron_idft.integration.loss import arguments, flags
from megatron_idft.integration.loss.alarms import PhiAlarm, ReferenceAlarm, stopping_warning
from megatron_idft.integration.loss.description import loss_line
from megatron_idft.integration.loss.hook import LossHook, install, installed_hooks
from megatron_idft.integration.loss.metrics import LossMetrics, MetricsReport
from megatron_idft.integration.loss.publishing import print_rank_last, publish_evaluation, publish_training
from megatron_idft.integration.platform import compatibility, flag_checks, hf_model, upstream
from megatron_idft.integration.platform.continued_schedule import check_schedule, take_new_rates
from megatron_idft.integration.platform.script_data import check_script_data
from megatron_idft.objectives import LambdaSchedule


class TrainerIntegration:
    """One training run's loss: parsed flags, the hook on the model, metrics and schedule.

    Args:
        end_of_turn_ids: gives the token ids whose mean weight is reported as `sft weight end of turn`, once Megatron
            is initialised; None takes the end-of-document id of Megatron's tokenizer.
    """

    def __init__(self, end_of_turn_ids: Callable[[], Sequence[int]] | None = None) -> None:
        self._end_of_turn_ids = end_of_turn_ids or _end_of_document_ids
        self._attached: dict[str, upstream.Wrapper] = {}
        self._checkpoint_args: argparse.Namespace | None = None
        self._loads_release = False
        self._hooks: list[LossHook] = []
        self._metrics: LossMetrics | None = None
        self._evaluation_metrics: LossMetrics | None = None
        # Of the validation sets of one evaluation, in order; and what the last evaluation measured, by metric key.
        self._evaluated: list[tuple[MetricsReport | None, dict[str, torch.Tensor]]] = []
        self._measured: dict[str, float] = {}
        self._schedule: LambdaSchedule | None = None
        self._gamma_lambda: torch.Tensor | None = None
        self._lambda_value = 1.0
        self._iteration = 0  # that the last step has finished
        self._group: torch.distributed.ProcessGroup | None = None
        self._told_unmasked = False
        self._told_stopping = False
        self._alarms = (PhiAlarm(), ReferenceAlarm())

    def attach(self) -> Self:
        """Wrap the trainer's functions that have no event. Undone by `detach`."""
        events = upstream.events()
        self._attached = {t: wrapper for t, wrapper in self.wrappers().items() if upstream.event_of(t) not in events}
        if events:
            self._attached[upstream.CALLBACKS] = self._add_callbacks
        for target, wrapper in self._attached.items():
            upstream.wrap(target, wrapper)
        return self

    def detach(self) -> None:
        """Give the trainer its own functions back."""
        for target in self._attached:
            upstream.restore(target)

    def wrappers(self) -> dict[str, upstream.Wrapper]:
        """The wrapper of each target of `upstream.CHANGES`, which says why."""
        return {
            "megatron.training.arguments:parse_args": self._parse_args,
            "megatron.training.checkpointing:check_checkpoint_args": self._check_checkpoint_args,
            "megatron.training.checkpointing:_load_base_checkpoint": self._load_base_checkpoint,
            "megatron.training.training:setup_model_and_optimizer": self._setup_model_and_optimizer,
            "megatron.training.training:train_step": self._train_step,
            "megatron.training.training:training_log": self._training_log,
            "megatron.training.training:evaluate": self._evaluate,
            "megatron.training.training:evaluate_and_print_results": self._evaluate_and_print_results,
        }

    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        """What to do at events of Megatron's training callbacks, which take the place of wrappers."""
        return {"on_log": lambda context: self._report(self._iteration)}

    def _add_callbacks(self, original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        from megatron.training.callbacks import CallbackManager

        manager = original(*call.args, **call.kwargs) or CallbackManager()
        for event, function in self.callbacks().items():
            if event in manager.events:
                manager.register(event, function)
        return manager

    def _parse_args(self, original: Callable[..., Any], call: inspect.BoundArguments) -> argparse.Namespace:
        compatibility.check_megatron_origin()  # once more: by now the script has imported what it uses
        # Megatron's own default stays for runs that keep Megatron's own loss.
        wants_loss = any(word == "--sft-loss" or word.startswith("--sft-loss=") for word in sys.argv[1:])
        call.arguments["extra_args_provider"] = flags.compose_providers(
            call.arguments.get("extra_args_provider"),
            per_token_loss_default=flags.wants_per_token_loss(sys.argv[1:]),
        )
        args: argparse.Namespace = original(*call.args, **call.kwargs)
        if not hasattr(args, "sft_loss"):
            arguments.refuse_yaml(wants_loss)
            args.sft_loss = None
            return args
        arguments.validate_arguments(args)
        flag_checks.check_layout(args)
        flag_checks.check_logits(args)
        if args.sft_loss is not None and args.sft_loss_vocab_size is None:
            args.sft_loss_vocab_size = hf_model.recorded_vocab_size(args)
        if args.sft_loss is not None and args.rank == 0:
            check_script_data(args)
        if arguments.cuda_graph_flag(args) and torch.cuda.is_available():
            leave_graphs_unregistered(Path(sys.argv[0]).name)
        return args

    def _check_checkpoint_args(self, original: Callable[..., Any], call: inspect.BoundArguments) -> None:
        from megatron.training import get_args

        original(*call.args, **call.kwargs)
        self._checkpoint_args = call.arguments["checkpoint_args"]
        if not self._loads_release:
            check_schedule(get_args(), self._checkpoint_args)

    def _load_base_checkpoint(self, original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        from megatron.training import get_args

        loaded = original(*call.args, **call.kwargs)
        state, _, self._loads_release, _ = loaded  # a release has only weights
        if call.arguments["args"].override_opt_param_scheduler and state and "optimizer" in state and "args" in state:
            take_new_rates(state["optimizer"], get_args(), state["args"])
        return loaded

    def _setup_model_and_optimizer(self, original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        from megatron.training import get_args

        result = original(*call.args, **call.kwargs)
        args = get_args()
        if args.sft_loss is not None:
            ids = arguments.resolve_exempt_tokens(args.sft_loss_exempt_tokens, self._end_of_turn_ids, self._token_ids())
            args.sft_loss_exempt_tokens = ids
        self._compare_with_checkpoint(args)
        if args.sft_loss is not None:
            self._install(args, result[0])
        return result

    def _install(self, args: argparse.Namespace, model: list[torch.nn.Module]) -> None:
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.utils import get_attr_wrapped_model
        from megatron.training.utils import print_rank_0

        # args.train_iters is known only now when training is counted in samples.
        self._schedule = arguments.resolve_schedule(args)
        device = next(model[0].parameters()).device
        self._gamma_lambda = torch.ones((), dtype=torch.float32, device=device)
        objective = arguments.build_objective(args, self._gamma_lambda)
        args.sft_loss_vocab_size = true_vocab_size(args)
        end_of_turn_ids = tuple(sorted(set(self._end_of_turn_ids())))
        self._metrics = LossMetrics(
            device=device,
            end_of_turn_ids=end_of_turn_ids,
            gamma_limits=(args.idft_gamma_min, args.idft_gamma_max) if args.sft_loss == "idft" else None,
            sources=self._sources(),
            reference=bool(objective.reference_statistics) or objective.kl_coefficient is not None,
            reference_kl=objective.kl_coefficient is not None,
            negative_weights=objective.negative_weights,
        )
        self._evaluation_metrics = LossMetrics(device=device, sources=self._sources())
        install(
            model,
            objective,
            vocab_size=args.sft_loss_vocab_size,
            backend=args.sft_loss_backend,
            metrics=self._metrics,
            evaluation_metrics=self._evaluation_metrics,
            head=args.sft_loss_head,
            chunk_tokens=args.sft_loss_chunk_tokens,
        )
        self._hooks = installed_hooks(model)
        groups = get_attr_wrapped_model(model[0], "pg_collection") or ProcessGroupCollection.use_mpu_process_groups()
        # Ranks that share a token split its vocabulary; every other rank of the last stage holds other tokens.
        self._group = getattr(groups, "dp_cp_gtp_remat", None) or groups.dp_cp
        print_rank_0(loss_line(args, objective, device, self._schedule, end_of_turn_ids))

    def _sources(self) -> tuple[str, ...]:
        """Names of the sources that metrics are kept for, once Megatron is initialised."""
        return ()

    def _token_ids(self) -> Mapping[str, int]:
        """The ids of tokens that flags may name, by their text."""
        return {}

    def _compare_with_checkpoint(self, args: argparse.Namespace) -> None:
        """Keep the schedule of the checkpoint that is continued, and say where its loss was another."""
        from megatron.training.utils import print_rank_0

        before = self._checkpoint_args
        if before is None:
            return
        # The checkpoint's weights have seen iterations, not shares: they stay when --train-iters changes.
        if (
            getattr(before, "idft_lambda_warmup_iters", None) is not None
            and before.idft_lambda_warmup == args.idft_lambda_warmup
            and before.idft_lambda_ramp == args.idft_lambda_ramp
        ):
            args.idft_lambda_warmup_iters = before.idft_lambda_warmup_iters
            args.idft_lambda_ramp_iters = before.idft_lambda_ramp_iters
        recorded = argparse.Namespace(**vars(before))
        if args.sft_loss_vocab_size is None:  # resolved later; compare only what was asked for
            recorded.sft_loss_vocab_size = None
        differences = arguments.differences_from_checkpoint(args, recorded)
        if differences:
            print_rank_0(
                "WARNING: this run continues a checkpoint with another loss: " + "; ".join(differences) + ". If that"
                " is meant, nothing needs doing; otherwise pass the checkpoint's settings"
            )

    def _train_step(self, original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        if self._metrics is None:
            return original(*call.args, **call.kwargs)
        assert self._schedule is not None and self._gamma_lambda is not None
        call.apply_defaults()
        iteration = call.arguments["iteration"]
        self._lambda_value = self._schedule.value(iteration)
        self._gamma_lambda.fill_(self._lambda_value)
        forward_backward = call.arguments["forward_backward_func"]
        metrics = self._metrics
        heads = [hook.fused_head for hook in self._hooks if hook.fused_head is not None]
        for head in heads:
            head.grad_scale_func = call.arguments["config"].grad_scale_func

        @functools.wraps(forward_backward)
        def fresh_forward_backward(*args: Any, **kwargs: Any) -> Any:
            metrics.begin_step()  # the rerun machine may come here more than once per step
            found = forward_backward(*args, **kwargs)
            for head in heads:
                head.end_step()
            return found

        call.arguments["forward_backward_func"] = fresh_forward_backward
        call.arguments["forward_step_func"] = _require_token_count(call.arguments["forward_step_func"])
        result = original(*call.args, **call.kwargs)
        for hook in self._hooks:
            if not hook.calls:
                raise UnsupportedModelError(
                    "a training step passed without the --sft-loss hook being called: the model computes its loss"
                    " somewhere else, so --sft-loss would have no effect. Use a script whose model is called with"
                    " labels, as Megatron's pretrain_gpt.py does, or train without --sft-loss"
                )
        metrics.commit_step()
        self._iteration = iteration + 1
        return result

    def _training_log(self, original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        result = original(*call.args, **call.kwargs)
        self._report(call.arguments["iteration"])
        return result

    def _report(self, iteration: int) -> None:
        from megatron.training import get_args

        args = get_args()
        if self._hooks and iteration % args.log_interval == 0:
            assert self._metrics is not None
            report = self._metrics.report(self._group, self._lambda_value)
            self._refuse_bad_interval(args, report)
            self._publish(args, iteration, report)

    def _refuse_bad_interval(self, args: argparse.Namespace, report: MetricsReport) -> None:
        if not report.micro_batches:
            raise UnsupportedModelError(
                "no micro-batch of this log interval went through the --sft-loss hook, so it had no effect. Train"
                " without --sft-loss, or report the model and flags"
            )
        if report.invalid_labels:
            raise ArgumentError(
                f"{report.invalid_labels} labels of this log interval are at or above the vocabulary size"
                f" {args.sft_loss_vocab_size}. The data was made with another tokenizer, or --sft-loss-vocab-size is"
                " too small: make the data again, or correct the flag"
            )

    def _publish(self, args: argparse.Namespace, iteration: int, report: MetricsReport) -> None:
        if report.unmasked_micro_batches and not self._told_unmasked:
            self._told_unmasked = True
            print_rank_last(
                "WARNING: the model is called without a loss_mask, so padding and prompts cannot be told from trained"
                " text: the loss is trained, but there are no sft metrics. Pass loss_mask=... to the model in"
                " forward_step, as Megatron's pretrain_gpt.py does"
            )
        publish_training(iteration, args.train_iters, report)
        for line in filter(None, (alarm.line(report.scalars) for alarm in self._alarms)):
            print_rank_last(line)
        if not self._told_stopping and (warning := stopping_warning(report.scalars)) is not None:
            self._told_stopping = True
            print_rank_last(f"WARNING: {warning}")

    def _evaluate(self, original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        """One validation set. Its results wait in `_evaluated` for `_evaluate_and_print_results`."""
        metrics = self._evaluation_metrics
        if metrics is not None:
            metrics.begin_step()
        losses, other, out_of_time = original(*call.args, **call.kwargs)
        report = None
        if metrics is not None and self._hooks:
            metrics.commit_step()
            report = metrics.report(self._group, 1.0)
        if not out_of_time:
            self._evaluated.append((report, losses))
        return losses, other, out_of_time

    def _evaluate_and_print_results(self, original: Callable[..., Any], call: inspect.BoundArguments) -> None:
        from megatron.training import get_args

        args = get_args()
        self._evaluated = []
        original(*call.args, **call.kwargs)
        for index, (report, losses) in enumerate(self._evaluated):
            # As Megatron names the set.
            name = args.validation_set_names[index] if args.validation_set_names else index
            suffix = f"-{name}" if args.multiple_validation_sets else ""
            measured = {f"{key} validation{suffix}": value.item() for key, value in losses.items()}
            if report is not None and report.lm_loss is not None:
                measured |= publish_evaluation(call.arguments["iteration"], suffix, report)
            self._measured |= measured


def true_vocab_size(args: argparse.Namespace) -> int:
    from megatron.training import get_tokenizer

    size = args.sft_loss_vocab_size
    if size is None:
        size = getattr(get_tokenizer(), "vocab_size", None)
    if size is None or not 0 < size <= args.padded_vocab_size:
        problem = "is not known from the tokenizer" if size is None else f"{size} is not within the model's"
        raise ArgumentError(
            f"the true vocabulary size {problem}{'' if size is None else f' {args.padded_vocab_size} output rows'}, so"
            " padding columns cannot be told from tokens. Pass it as --sft-loss-vocab-size"
        )
    return int(size)


def _end_of_document_ids() -> list[int]:
    from megatron.training import get_tokenizer
    from megatron.training.utils import print_rank_0

    try:
        end = get_tokenizer().eod
    except (AttributeError, NotImplementedError, TypeError):  # which of them depends on the tokenizer's class
        end = None
    if end is None:
        print_rank_0("> the tokenizer names no end-of-document token: `sft weight end of turn` is left out")
        return []
    return [int(end)]


def _require_token_count(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """`forward_step`, refusing loss functions that do not return their number of tokens."""

    @functools.wraps(forward_step)
    def checked_forward_step(*args: Any, **kwargs: Any) -> Any:
        output, loss_func = forward_step(*args, **kwargs)

        @functools.wraps(loss_func)
        def checked_loss_func(*loss_args: Any, **loss_kwargs: Any) -> Any:
            result = loss_func(*loss_args, **loss_kwargs)
            if len(result) != 3:
                raise UnsupportedModelError(
                    "the script's loss_func returns (loss, metrics) without a token count, so the loss cannot be"
                    " normalised by trained tokens. Return (sum of losses, number of tokens as int tensor, metrics), as"
                    " Megatron's pretrain_gpt.py does"
                )
            return result

        return output, checked_loss_func

    return checked_forward_step
