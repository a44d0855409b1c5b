"""What a started training program has changed of Megatron and torch's checkpoints: `changes_probe.py RESULT.json`."""

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import megatron_idft
from megatron_idft.integration.platform import upstream
from megatron_idft.integration.platform.start import prepare_process

HOME = str(Path(megatron_idft.__file__).parent)


def is_ours(value: Any, objects: set[int]) -> bool:
    """Code of ours, an object of a class of ours, or one that a module of ours holds."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if value is torch.compile:  # CPU mode's, which Megatron holds as `jit_fuser`
        return False
    if inspect.isfunction(value):
        wrapped = getattr(value, "__wrapped__", None)  # torch.no_grad() around a function of ours, say
        return value.__code__.co_filename.startswith(HOME) or (wrapped is not None and is_ours(wrapped, objects))
    return not inspect.ismodule(value) and (type(value).__module__.startswith("megatron_idft") or id(value) in objects)


def objects_of_ours() -> set[int]:
    """Of the instances in the modules of this package: no functions, classes or constants that are upstream's."""
    found = set()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron_idft"):
            for value in vars(module).values():
                if type(value).__name__ == "ModuleSpec":
                    found.add(id(value))
    return found


def changed(module: Any, objects: set[int]) -> Iterator[str]:
    for name, value in list(vars(module).items()):
        if is_ours(value, objects):
            yield f"{module.__name__}:{name}"
        elif inspect.isclass(value) and value.__module__ == module.__name__:
            members = ((member, vars(value)[member]) for member in list(vars(value)))
            yield from (f"{module.__name__}:{name}.{member}" for member, own in members if is_ours(own, objects))


def main() -> None:
    result = sys.argv[1]
    prepare_process("changes_probe", [], force_cpu=True)
    from megatron_idft.integration.platform.restricted_loading import restrict_checkpoint_reading
    from megatron_idft.integration.training.program import ChatTraining

    restrict_checkpoint_reading()
    training = ChatTraining().attach()
    events = sorted(upstream.events())
    absent = [change.target for change in upstream.CHANGES if not upstream.exists(change.target)]
    for module in {change.target.partition(":")[0] for change in upstream.CHANGES}:
        importlib.import_module(module)
    upstreams = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(("megatron.", "torch.distributed.checkpoint")) and module is not None
    ]
    objects = objects_of_ours()
    found = sorted({target for module in upstreams for target in changed(module, objects)})
    in_force = [change.target for change in upstream.changed()]
    training.detach()
    left = [change.target for change in upstream.changed()]
    Path(result).write_text(
        json.dumps({"found": found, "in force": in_force, "left": left, "events": events, "absent": absent})
    )


main()
