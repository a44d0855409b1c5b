"""Named objectives in code that torch.compile traces. Import it there only: the decorator imports the compiler."""

import torch

from megatron_idft.objectives import Objective, resolve_objective

_resolved: dict[str, Objective] = {}


def traced_objective(name: str) -> Objective:
    """`resolve_objective(name)`, as it is when a graph is made with it for the first time.

    Raises:
        ValueError: as `resolve_objective`, out of the compiler.
    """
    return _resolved[_resolve(name)]  # a look-up that can be traced, after a call that cannot


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _resolve(name: str) -> str:
    if name not in _resolved:  # replaced, it would invalidate the graphs that were made with it
        _resolved[name] = resolve_objective(name)
    return name
