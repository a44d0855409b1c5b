"""What the output layer answers with while nobody needs its logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


class DeferredLogits:
    """Stands for logits [s, b, V/tp] that were not computed: what they are the product of.

    A product with a number, as models under MuP take it, stays deferred. Everything else that is done with it computes
    the logits, once, and goes on with them.

    Args:
        hidden: the output layer's input.
        weight: [V/tp, H].
        compute: the output layer's own forward, without the scale.
        scale: what the logits are multiplied with.

    Attributes:
        touched: whether somebody needed the logits.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, compute: Callable[[], Tensor], scale: float = 1.0) -> None:
        self.hidden, self.weight, self.scale = hidden, weight, scale
        self._compute = compute
        self._logits: Tensor | None = None

    @property
    def touched(self) -> bool:
        return self._logits is not None

    def logits(self) -> Tensor:
        """The tensor, differentiable as it is from the output layer. Collectives: the layer's own, the first time."""
        if self._logits is None:
            logits = self._compute()
            self._logits = logits if self.scale == 1 else logits * self.scale
        return self._logits

    def __mul__(self, factor: Any) -> Any:
        if isinstance(factor, float | int) and not self.touched:
            return DeferredLogits(self.hidden, self.weight, self._compute, self.scale * factor)
        return self.logits() * factor

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.logits(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.logits()[index]

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return function(*map(computed, args), **{name: computed(value) for name, value in (kwargs or {}).items()})


def computed(value: Any) -> Any:
    """`value`, with the logits in the place of deferred ones."""
    return value.logits() if isinstance(value, DeferredLogits) else value
