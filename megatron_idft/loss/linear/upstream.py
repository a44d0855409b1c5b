"""Whether backward starts from the gradient that forward has counted on."""

import torch
from torch import Tensor

# Of the upstream gradient, relative: a few roundings in fp32 on the way to it.
TOLERANCE = 1e-6


class UpstreamWatch:
    """How backward compares the upstream gradient with the expected one, and what came of it.

    Args:
        on_host: the host looks at the result, which waits for the device, and after a misfit the gradients are
            computed again. False: nothing waits; a misfit raises `misfits` and turns the gradients into NaN, so that
            nobody can train on them.
        misfits: 0-dim int32 on the device of the loss, where `on_host` is False.

    Attributes:
        fitted: whether all that the host has seen was as expected; None: it has not looked.
        forwards, backwards: passes that computed their gradients in forward, and how many of them came back.
    """

    def __init__(self, *, on_host: bool = True, misfits: Tensor | None = None) -> None:
        if misfits is None and not on_host:
            raise ValueError("UpstreamWatch(on_host=False) counts on the device: pass misfits=torch.zeros((), int32)")
        self.on_host = on_host
        self.misfits = misfits
        self.fitted: bool | None = None
        self.forwards = 0
        self.backwards = 0


def fit_upstream(upstream: Tensor, expected: Tensor, any_factor: bool) -> tuple[Tensor, Tensor]:
    """Compare upstream with a factor of the expected gradient, each [n] fp32: 1, or with `any_factor` any.

    Returns:
        the factor, 0-dim fp32, and whether they differ by more than rounding, 0-dim bool. No host sync.
    """
    factor = expected.new_ones(())
    if any_factor and expected.numel():
        largest = expected.abs().argmax(keepdim=True)
        ours, given = (value.gather(0, largest)[0] for value in (expected, upstream))  # a tensor in [] would be read
        factor = torch.where(ours != 0, given / ours, 1.0)
    scaled = factor * expected
    # In this form NaN is a misfit.
    return factor, ~((upstream - scaled).abs() <= TOLERANCE * scaled.abs()).all()
