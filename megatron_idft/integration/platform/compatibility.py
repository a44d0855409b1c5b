"""Where Megatron comes from, which versions are served, and repairs of the installed Megatron that every run needs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_idft.errors import InstallationError
from megatron_idft.integration.platform import upstream

# 0.20 as Megatron-LM's main has it: there is no release yet. What the trainer needs of it is looked up by name.
SUPPORTED = ((0, 19), (0, 20))
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
REMEDY = 'pip install "megatron-core[training]>=0.19.0,<0.20" and take any Megatron-LM checkout off PYTHONPATH'


def repair_compile_helpers() -> None:
    """Let rank 0 start when Megatron comes from the wheel.

    training/initialize.py compiles the dataset helpers with `make`; the wheel has them compiled but ships no
    Makefile, and core/datasets/utils.py ends the process when `make` fails.
    """
    utils: Any = importlib.import_module("megatron.core.datasets.utils")
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError as error:
        if (Path(utils.__file__).parent / "Makefile").exists():
            return  # a checkout: upstream compiles them
        raise InstallationError(
            f"megatron.core.datasets.helpers_cpp does not import ({error}) and cannot be compiled, for "
            f"{Path(utils.__file__).parent} has no Makefile. Reinstall Megatron for this Python: {REMEDY}."
        ) from error
    upstream.replace("megatron.core.datasets.utils:compile_helpers", lambda: None)


def repair_distributed_optimizer_load() -> None:
    """Let `--use-distributed-optimizer` resume with torch's Adam (no Transformer Engine, no APEX).

    optimizer/distrib_optimizer.py is written for FusedAdam, which has one step for all. It reads the step from the
    parameters' states before it loads a checkpoint, where torch's Adam has none yet; then hands all of them one
    tensor, which torch's Adam advances once per parameter, and overwrites it with the value from before the load.
    """
    module: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer_class = module.DistributedOptimizer
    if module.HAVE_APEX_OR_TE or upstream.in_force(f"{_OPTIMIZER}.load_state_dict"):
        return
    import torch  # noqa: PLC0415  the doctor does without

    upstream_sharded = optimizer_class.sharded_state_dict
    upstream_load = optimizer_class.load_state_dict
    upstream_set = optimizer_class._set_main_param_and_optimizer_states

    @functools.wraps(upstream_sharded)
    def sharded_state_dict(
        self: Any, model_sharded_state_dict: Any = None, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if is_loading and isinstance(self.optimizer, torch.optim.Adam):  # the state after no step; will be overwritten
            for parameter in (parameter for group in self.optimizer.param_groups for parameter in group["params"]):
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return upstream_sharded(self, model_sharded_state_dict or {}, is_loading, *args, **kwargs)

    @functools.wraps(upstream_load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        upstream_load(self, state_dict)
        if isinstance(self.optimizer, torch.optim.Adam):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    @torch.no_grad()  # upstream's dp_reshardable path copies into fp32 parameters with gradients on
    @functools.wraps(upstream_set)
    def set_states(self: Any, model_param: Any, tensors: Any) -> None:
        # None leaves the step alone: it was loaded with the groups.
        upstream_set(self, model_param, {**tensors, "step": None})

    upstream.replace(f"{_OPTIMIZER}.sharded_state_dict", sharded_state_dict)
    upstream.replace(f"{_OPTIMIZER}._set_main_param_and_optimizer_states", set_states)
    upstream.replace(f"{_OPTIMIZER}.load_state_dict", load_state_dict)


def repair_rope_scaling_factor() -> None:
    """Let `--rope-scaling-factor` reach the model.

    training/argument_utils.py makes the model's config from the arguments and leaves this one out, so every model
    gets 8, Llama 3.1's; Llama 3.2 has 32.
    """
    target = "megatron.training.argument_utils:gpt_config_from_args"
    if upstream.in_force(target):
        return
    original = upstream.original(target)

    @functools.wraps(original)
    def gpt_config_from_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        config = original(args, *rest, **kwargs)
        if getattr(args, "use_rope_scaling", False) and hasattr(config, "rope_scaling_factor"):
            config.rope_scaling_factor = args.rope_scaling_factor
        return config

    upstream.replace(target, gpt_config_from_args)


@dataclass(frozen=True)
class MegatronOrigin:
    """Where the two halves of Megatron were found."""

    core: Path
    training: Path
    version: str

    @property
    def root(self) -> Path:
        """The folder that holds `megatron/`."""
        return self.core.parent.parent

    def describe(self) -> str:
        """One line for the start of a run."""
        return f"megatron {self.version} (core and training) from {self.root}"


def check_megatron_origin() -> MegatronOrigin:
    """Find megatron.core and megatron.training without importing them.

    `megatron` is a namespace package: a checkout on `sys.path` and an installed wheel mix without a word, each
    supplying the subpackages that the other was not asked for yet. Call it once more after a script has imported
    what it needs.

    Raises:
        InstallationError: they do not come from one root, or their version is not served.
    """
    core, training = _folder("core"), _folder("training")
    if core.parent != training.parent:
        raise InstallationError(
            f"megatron.core comes from {core} but megatron.training from {training}: two installations are mixed. "
            f"Keep one of them: {REMEDY}, or put only the checkout on PYTHONPATH."
        )
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        parts = name.split(".")
        if file and parts[0] == "megatron" and len(parts) > 1 and parts[1] in _MEGATRON_LM:
            if Path(file).is_relative_to(core.parent):
                continue  # most of them, by hundreds, and every link that is resolved is a question to the disk
            found = Path(file).resolve()
            if not found.is_relative_to(core.parent):
                raise InstallationError(
                    f"{name} was imported from {found} but megatron.core comes from {core}: two installations are "
                    "mixed. "
                    f"Keep one of them: {REMEDY}, or put only the checkout on PYTHONPATH."
                )
    version, numbers = _version(core)
    if numbers[:2] not in SUPPORTED:
        served = " and ".join(".".join(map(str, numbers)) + ".x" for numbers in SUPPORTED)
        raise InstallationError(f"Megatron {version} at {core}: the trainer is served for {served} only: {REMEDY}.")
    return MegatronOrigin(core, training, version)


def megatron_version() -> tuple[int, ...]:
    """The installed megatron.core's, without importing it.

    Raises:
        InstallationError: there is none.
    """
    return _version(_folder("core"))[1]


# Megatron-LM's own packages in the namespace; megatron.bridge, megatron.energon and others may live elsewhere.
_MEGATRON_LM = frozenset({"core", "training", "post_training", "rl", "inference", "legacy"})


def _folder(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(f"megatron.{name}")
    except ModuleNotFoundError:  # no megatron at all
        spec = None
    if spec is None or spec.origin is None:
        raise InstallationError(f"megatron.{name} is not installed: {REMEDY}.")
    return Path(spec.origin).resolve().parent


def _version(core: Path) -> tuple[str, tuple[int, ...]]:
    """The version that core/package_info.py states, read as text: importing it imports all of megatron.core."""
    text = (core / "package_info.py").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE)\s*=\s*['\"]?(\w*)", text, flags=re.MULTILINE))
    numbers = tuple(int(found[key]) for key in ("MAJOR", "MINOR", "PATCH"))
    return ".".join(map(str, numbers)) + found.get("PRE_RELEASE", ""), numbers
