"""Backends on devices: every test of the loss that takes an `engine` runs on each of them.

On a machine without a GPU the Triton kernels run interpreted. The tests marked `gpu` run them compiled:
`python -m pytest -m gpu tests/loss`.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_idft import Objective, Reference, vocab_parallel_loss
from megatron_idft.loss import triton_backend
from tests.loss.intermediate import as_intermediate, bits
from tests.loss.oracle import VARIANTS, reads_reference, reference_of


class Engine(NamedTuple):
    backend: str
    device: str

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor on this device, with its strides, offset and overlaps."""
        storage = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
        return storage.to(self.device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def loss(self, logits: Tensor, labels: Tensor, objective: str | Objective = "idft", **settings: Any) -> Any:
        if reads_reference(objective):  # a name is passed on: a compiler resolves it as it would a user's
            log_prob, entropy, *_ = reference_of(labels.cpu())
            settings["reference"] = Reference(log_prob.to(self.device), entropy.to(self.device))
        objective = VARIANTS.get(objective, objective) if isinstance(objective, str) else objective
        return vocab_parallel_loss(logits, labels, objective, backend=self.backend, **settings)

    def run(
        self,
        logits: Tensor,
        labels: Tensor,
        objective: str | Objective = "idft",
        vocab_size: int | None = None,
        upstream: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Outputs and the gradient with respect to `logits`, found to be the same when it overwrites them."""
        leaf = self.place(logits).requires_grad_()
        labels = self.place(labels)
        upstream = torch.ones(labels.shape) if upstream is None else upstream
        upstream = self.place(upstream)
        copying = self._loss_and_grad(leaf, labels, objective, vocab_size, upstream, overwrite_logits=False)
        if 0 not in logits.stride():  # expanded logits cannot be overwritten
            intermediate = as_intermediate(leaf)
            overwriting = self._loss_and_grad(intermediate, labels, objective, vocab_size, upstream, True)
            assert overwriting["grad"].data_ptr() == intermediate.data_ptr()
            assert overwriting["grad"].stride() == logits.stride()
            for name, value in copying.items():
                assert torch.equal(bits(overwriting[name]), bits(value)), name
        return {name: value.cpu() for name, value in copying.items()}

    def _loss_and_grad(
        self,
        logits: Tensor,
        labels: Tensor,
        objective: str | Objective,
        vocab_size: int | None,
        upstream: Tensor,
        overwrite_logits: bool,
    ) -> dict[str, Tensor]:
        out = self.loss(logits, labels, objective, vocab_size=vocab_size, overwrite_logits=overwrite_logits)
        (grad,) = torch.autograd.grad(out.loss, logits, upstream)
        values = {name: value.detach() for name, value in out._asdict().items() if value is not None}
        return {**values, "grad": grad}


REFERENCE = Engine("reference", "cpu")
# For kernels on the CPU. A process has one or the other: on a machine with a GPU, tests/run.sh asks for the interpreter
# and `pytest -m gpu` for the compiler.
interpreted = pytest.mark.skipif(
    not triton_backend.INTERPRETED, reason="Triton compiles in this process; TRITON_INTERPRET=1 runs kernels on the CPU"
)
TRITON_ENGINES = [
    pytest.param(Engine("triton", "cpu"), id="triton interpreted", marks=interpreted),
    pytest.param(Engine("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
]
ENGINES = [
    pytest.param(REFERENCE, id="reference"),
    pytest.param(Engine("reference", "cuda"), id="reference on a GPU", marks=pytest.mark.gpu),
    *TRITON_ENGINES,
]
