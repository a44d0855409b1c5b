"""Our changes of Megatron: one table, and the only functions that make a change.

Nothing is changed by an import. A program changes what `CHANGES` lists for it when it starts; `megatron-idft doctor`
prints the list, docs/architecture.md has it as a table, and a test compares it with what a started program has changed.
What CPU mode answers in the place of `torch.cuda` stands in cpu.py. Where Megatron has training callbacks (0.20), its
events take the place of the changes that name one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_idft.errors import InstallationError

Where = Literal[
    "everywhere",
    "train and run",
    "train",
    "train, score, realign",
    "score and realign",
    "without Transformer Engine",
    "CPU mode",
]
Wrapper = Callable[[Callable[..., Any], inspect.BoundArguments], Any]


@dataclass(frozen=True)
class Change:
    """One name of upstream that is wrapped or replaced.

    Attributes:
        target: "module:name" or "module:Class.name", the name through which upstream calls it.
        where: the programs that make the change.
        why: what our function does there.
        without: what goes wrong where the change is not made.
        takes: the parameters of upstream's function that ours reads by name.
        event: the training callback that takes its place where Megatron has it.
    """

    target: str
    where: Where
    why: str
    without: str
    takes: tuple[str, ...] = ()
    event: str = ""


CALLBACKS = "megatron.training.training:normalize_callbacks"
_TRAINING, _CHECKPOINTING = "megatron.training.training", "megatron.training.checkpointing"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_SPECS = "megatron.core.models.hybrid.hybrid_layer_specs"

CHANGES = (
    # Repairs, which every program needs.
    Change(
        "megatron.core.datasets.utils:compile_helpers",
        "everywhere",
        "does nothing: the wheel has the dataset helpers compiled and ships no Makefile",
        "`make` fails, and rank 0 ends at the start",
    ),
    Change(
        f"{_OPTIMIZER}.sharded_state_dict",
        "without Transformer Engine",
        "gives torch's Adam a state before a checkpoint is loaded",
        "--use-distributed-optimizer cannot be resumed with torch's Adam",
    ),
    Change(
        f"{_OPTIMIZER}.load_state_dict",
        "without Transformer Engine",
        "gives every parameter a step of its own",
        "torch's Adam advances one shared step once for each parameter",
    ),
    Change(
        f"{_OPTIMIZER}._set_main_param_and_optimizer_states",
        "without Transformer Engine",
        "leaves the loaded step alone, and copies without gradients",
        "the step of before the load comes back; `dp_reshardable` checkpoints do not load",
    ),
    Change(
        "megatron.training.argument_utils:gpt_config_from_args",
        "everywhere",
        "lets --rope-scaling-factor reach the model",
        "every Llama 3 model gets the factor 8; Llama 3.2 has 32",
    ),
    Change(
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        "without Transformer Engine",
        "builds norms that run under sequence parallelism",
        "--sequence-parallel is refused",
    ),
    Change(
        f"{_SPECS}:hybrid_stack_spec",
        "without Transformer Engine",
        "builds HybridModel of local layers",
        "HybridModel cannot be built",
    ),
    Change(
        f"{_SPECS}:mamba_stack_spec",
        "without Transformer Engine",
        "the same under its old name",
        "HybridModel cannot be built",
    ),
    Change(
        "megatron.training.models.hybrid:default_hybrid_stack_spec",
        "without Transformer Engine",
        "the same where the trainer's builder took its own reference",
        "HybridModel cannot be built",
    ),
    Change(
        "megatron.core.transformer.multi_token_prediction:is_inference_column_parallel_linear",
        "without Transformer Engine",
        "says no, where Megatron asks (0.20): its own answer needs a class that is Transformer Engine's",
        "multi-token prediction cannot be built",
    ),
    # The loss in the trainer. The model itself is changed by `install` (loss/hook.py), instance by instance.
    Change(
        "megatron.training.arguments:parse_args",
        "train and run",
        "adds the flags and checks them",
        "the flags are unknown",
        takes=("extra_args_provider",),
    ),
    Change(
        f"{_CHECKPOINTING}:check_checkpoint_args",
        "train and run",
        "compares the settings with those of the checkpoint that is continued",
        "a changed loss or schedule goes unnoticed, or ends in an assertion without a remedy",
        takes=("checkpoint_args",),
    ),
    Change(
        f"{_CHECKPOINTING}:_load_base_checkpoint",
        "train and run",
        "lets --override-opt_param-scheduler change the learning rate",
        "the checkpoint's rates stay",
        takes=("args",),
    ),
    Change(
        f"{_TRAINING}:setup_model_and_optimizer",
        "train and run",
        "installs the hook on the finished model",
        "training keeps Megatron's own loss",
    ),
    Change(
        f"{_TRAINING}:train_step",
        "train and run",
        "opens and commits the step's metrics, moves lambda_t, proves that the hook was called",
        "no metrics; a model whose loss is not reached trains unnoticed",
        takes=("forward_step_func", "forward_backward_func", "iteration"),
    ),
    Change(
        f"{_TRAINING}:training_log",
        "train and run",
        "reports at the log interval",
        "no metrics",
        takes=("iteration",),
        event="on_log",
    ),
    Change(
        f"{_TRAINING}:evaluate",
        "train and run",
        "evaluates each validation set",
        "no metrics of validation sets",
        takes=("model", "config"),
    ),
    Change(
        f"{_TRAINING}:evaluate_and_print_results",
        "train and run",
        "reports each validation set",
        "no metrics of validation sets",
        takes=("data_iterator", "iteration"),
    ),
    Change(
        CALLBACKS,
        "train and run",
        "adds ours to the training callbacks of the script, where Megatron has them",
        "no metrics",
        takes=("callbacks",),
    ),
    # The training program.
    Change(
        f"{_TRAINING}:save_checkpoint_and_time",
        "train",
        "knows which checkpoint is the best, and exports to Hugging Face",
        "no --save-hf, no best checkpoints",
        takes=("iteration", "non_persistent_ckpt"),
    ),
    Change(
        f"{_TRAINING}:checkpoint_and_decide_exit",
        "train",
        "ends with the exit code of what happened",
        "a stopped training exits with 0",
        takes=("iteration",),
    ),
    Change(
        "megatron.core.dist_checkpointing:save",
        "train",
        "records every file's checksum",
        "a damaged checkpoint is found by its wrong values only",
        takes=("checkpoint_dir",),
    ),
    Change(
        f"{_TRAINING}:train",
        "train",
        "evaluates before the first step where that is asked for",
        "no evaluation of the untrained model",
        takes=("model", "forward_step_func", "valid_data_iterator", "process_non_loss_data_func", "config"),
    ),
    Change(
        "megatron.training.ft_integration:on_eval_step_start",
        "train",
        "asks before each step of an evaluation whether a signal has come",
        "SIGTERM waits for the end of the evaluation",
        event="on_eval_step_start",
    ),
    Change(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",
        "train",
        "a queue without a process of its own",
        "SIGTERM to the process group kills that process, and with it the checkpoint that is then saved",
    ),
    Change(
        "megatron.training.global_vars:_GLOBAL_SIGNAL_HANDLER",
        "train",
        "one handler for SIGTERM, SIGINT and SIGHUP, armed at the first step",
        "a signal ends the run without a checkpoint",
    ),
    Change(
        "torch.distributed.checkpoint:FileSystemReader.read_metadata",
        "train, score, realign",
        "reads `.metadata` by an unpickler that knows few classes",
        "a foreign checkpoint can run code",
    ),
    Change(
        "torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes",
        "train, score, realign",
        "reads objects with torch's weights-only unpickler",
        "a foreign checkpoint can run code",
    ),
    # CPU mode.
    Change(
        "megatron.training.initialize:_warmup_jit_function",
        "CPU mode",
        "does nothing: nothing is compiled",
        "its random inputs come from the generator that then initialises the weights",
    ),
    Change(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        "CPU mode",
        "takes CPU tensors for the split sizes of an all-to-all",
        "experts over several ranks fail",
    ),
    Change(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        "CPU mode",
        "sets the one generator that dropout draws from",
        "the state goes to CUDA generators that are not there",
    ),
)

_BY_TARGET = {change.target: change for change in CHANGES}
_upstream: dict[str, Any] = {}  # target -> upstream's own, of the changes that are in force in this process


def replace(target: str, value: Any) -> None:
    """Put `value` in the place of upstream's own. The target stands in `CHANGES`; a second change of it is replaced."""
    if target not in _BY_TARGET:
        raise KeyError(f"{target} is not listed in CHANGES: every change of upstream is")
    owner, name = _owner(target)
    _upstream.setdefault(target, inspect.getattr_static(owner, name))
    setattr(owner, name, value)


def exists(target: str) -> bool:
    """Whether this Megatron has the name: some that are changed came with 0.20."""
    try:
        _owner(target)
    except InstallationError:
        return False
    return True


def event_of(target: str) -> str:
    """The training callback that stands for the change where Megatron has it, or ""."""
    return _BY_TARGET[target].event


def events() -> frozenset[str]:
    """The events of Megatron's training callbacks; none before 0.20."""
    if not exists(CALLBACKS):
        return frozenset()
    valid: frozenset[str] = importlib.import_module("megatron.training.callbacks").CallbackManager().events
    return valid


def wrap(target: str, wrapper: Wrapper) -> None:
    """Let `wrapper(original, bound_arguments)` stand for a function, of whatever signature it has in this version."""
    owner, name = _owner(target)
    original = getattr(owner, name)
    signature = inspect.signature(original)
    if lost := [parameter for parameter in _BY_TARGET[target].takes if parameter not in signature.parameters]:
        raise _moved(f"{target.replace(':', '.')} takes no {', '.join(lost)}")

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, signature.bind(*args, **kwargs))

    replace(target, replacement)


def restore(target: str) -> None:
    """Give upstream its own back."""
    owner, name = _owner(target)
    setattr(owner, name, _upstream.pop(target))


def original(target: str) -> Any:
    """Upstream's own, whether it is in its place or not."""
    return _upstream[target] if target in _upstream else getattr(*_owner(target))


def in_force(target: str) -> bool:
    """Whether this change has been made in this process."""
    return target in _upstream


def changed() -> tuple[Change, ...]:
    """The changes that are in force in this process, in the order of the table."""
    return tuple(change for change in CHANGES if change.target in _upstream)


def _owner(target: str) -> tuple[Any, str]:
    """The module or class that holds the name, and the name.

    Raises:
        InstallationError: this Megatron does not have it.
    """
    module, _, path = target.partition(":")
    *classes, name = path.split(".")
    try:
        owner = functools.reduce(getattr, classes, importlib.import_module(module))
        inspect.getattr_static(owner, name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise _moved(f"there is no {target.replace(':', '.')}") from error
    return owner, name


def _moved(what: str) -> InstallationError:
    from megatron_idft.integration.platform.compatibility import REMEDY  # noqa: PLC0415  imports this module

    return InstallationError(f"this Megatron is not one that is served, though its version is: {what}. {REMEDY}.")
