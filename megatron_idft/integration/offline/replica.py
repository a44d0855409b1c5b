"""The ranks that hold one copy of the model together, in programs whose data-parallel replicas work independently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_idft.console import say


@dataclass(frozen=True, slots=True)
class Replica:
    """One data-parallel replica: the tensor-parallel ranks that hold the model together.

    Attributes:
        leads: this rank is its first.
    """

    number: int
    count: int
    leads: bool

    @classmethod
    def here(cls) -> Replica:
        from megatron.core import mpu

        leads = mpu.get_tensor_model_parallel_rank() == 0
        return cls(mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size(), leads)

    def share(self, value: Any) -> Any:
        """The leader's value on every rank of the replica."""
        from megatron.core import mpu

        if mpu.get_tensor_model_parallel_world_size() == 1:
            return value
        values = [value]
        source, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
        torch.distributed.broadcast_object_list(values, source, group=group)
        return values[0]

    def print_once(self, text: str) -> None:
        """Print on the first rank of the launch only."""
        if self.leads and self.number == 0:
            say(text)
