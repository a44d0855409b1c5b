"""Objectives by name, by a user's `module:function`, or as they are."""

import inspect
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from megatron_idft.objectives.objective import Objective

_REGISTRY: dict[str, Callable[..., Objective]] = {}


def register(constructor: Callable[..., Objective]) -> Callable[..., Objective]:
    """Make the function's name a name of an objective, for `resolve_objective` and `--sft-loss`."""
    _REGISTRY[constructor.__name__] = constructor
    return constructor


def objective_names() -> tuple[str, ...]:
    """Names that `resolve_objective` accepts, in the order of this file."""
    return tuple(_REGISTRY)


def resolve_objective(
    objective: str | Objective,
    *,
    weight_floor: float | None = None,
    exempt_token_ids: Iterable[int] | None = None,
    **hyperparameters: Any,
) -> Objective:
    """An `Objective` from a name, an `Objective`, or a user's function given as "module:function".

    Args:
        objective: a name such as "idft"; an `Objective`; or "package.module:function", where function maps
            `TokenStatistics` to a weight [...], or is itself an `Objective`.
        weight_floor, exempt_token_ids: modifiers that go with every objective; None leaves them as they are.
        hyperparameters: arguments of a named objective, for example beta=1.0.

    Raises:
        ValueError, TypeError: the specification does not name an objective, or does not take these hyper-parameters.
    """
    if isinstance(objective, str) and ":" not in objective:
        resolved = _build(objective, hyperparameters)
    else:
        if hyperparameters:
            raise TypeError(
                f"hyper-parameters {', '.join(sorted(hyperparameters))} go with a named objective "
                f"({', '.join(_REGISTRY)}) only; set them where {objective!r} is built"
            )
        if isinstance(objective, str):
            resolved = _load(objective)
        elif isinstance(objective, Objective):
            resolved = objective
        else:
            raise TypeError(
                f"objective must be a name ({', '.join(_REGISTRY)}), an Objective or 'module:function', got "
                f"{type(objective).__name__}; wrap a function as Objective(name, function)"
            )
    if weight_floor is not None:
        resolved = resolved.with_weight_floor(weight_floor)
    if exempt_token_ids is not None:
        resolved = resolved.with_exempt_tokens(exempt_token_ids)
    return resolved


def _build(name: str, hyperparameters: dict[str, Any]) -> Objective:
    constructor = _REGISTRY.get(name)
    if constructor is None:
        raise ValueError(
            f"unknown objective {name!r}: choose from {', '.join(_REGISTRY)}, or give your own as 'module:function'"
        )
    accepted = inspect.signature(constructor).parameters
    unknown = sorted(set(hyperparameters) - set(accepted))
    if unknown:
        raise TypeError(
            f"objective {name!r} has no hyper-parameter {', '.join(unknown)}; it takes {', '.join(accepted) or 'none'}"
        )
    return constructor(**hyperparameters)


def _load(spec: str) -> Objective:
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"objective {spec!r} must read 'module:function', for example 'my_losses:my_weight'")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"objective {spec!r}: cannot import {module_name!r} ({error}); put its folder on PYTHONPATH"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        raise ValueError(f"objective {spec!r}: module {module_name!r} ({module.__file__}) has no {attribute!r}")
    if isinstance(function, Objective):
        return function
    if not callable(function):
        raise ValueError(
            f"objective {spec!r}: {attribute!r} is a {type(function).__name__}; it must be a function "
            "f(statistics: TokenStatistics) -> weight, or an Objective"
        )
    return Objective(spec, function)
