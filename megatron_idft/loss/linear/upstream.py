"""Whether backward starts from the gradient that forward has counted on."""

from typing import NamedTuple

import torch
from torch import Tensor

# Of the upstream gradient, relative: a few roundings in fp32 on the way to it.
TOLERANCE = 1e-6


class UpstreamWatch:
    """How backward compares the upstream gradient with the expected one, and what came of it.

    Args:
        on_host: the host looks at the result, which waits for the device, and a misfit is made good by computing the
            difference. False: nothing waits; a misfit raises `misfits` and turns the gradients into NaN, so that
            nobody can train on them.
        misfits: 0-dim int32 on the device of the loss, where `on_host` is False.

    Attributes:
        fitted: what the host saw last; None: it has not looked.
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


class UpstreamFit(NamedTuple):
    """upstream = factor expected + residual.

    Attributes:
        factor: 0-dim fp32.
        residual: [n] fp32.
        misfit: 0-dim bool, whether the residual is more than rounding.
    """

    factor: Tensor
    residual: Tensor
    misfit: Tensor


def fit_upstream(upstream: Tensor, expected: Tensor, any_factor: bool) -> UpstreamFit:
    """Compare [n] fp32 gradients; `any_factor`: the expected one may be off by a common factor. No host sync."""
    factor = expected.new_ones(())
    if any_factor and expected.numel():
        largest = expected.abs().argmax(keepdim=True)
        ours, given = (value.gather(0, largest)[0] for value in (expected, upstream))  # a tensor in [] would be read
        factor = torch.where(ours != 0, given / ours, 1.0)
    scaled = factor * expected
    residual = upstream - scaled
    # In this form NaN is a misfit.
    return UpstreamFit(factor, residual, ~(residual.abs() <= TOLERANCE * scaled.abs()).all())
