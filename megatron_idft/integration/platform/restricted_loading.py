"""Let Megatron read checkpoints without running code that they may hold.

A `torch_dist` checkpoint holds pickles in two places, and torch's reader unpickles both without limits: `.metadata`
(`FileSystemReader.read_metadata`), and the objects among the tensors, such as Megatron's arguments and random states
(`DefaultLoadPlanner.load_bytes`). All else Megatron reads by `torch.load`, whose default is `weights_only`.
"""

from __future__ import annotations

import collections
import functools
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from numpy._core.multiarray import _reconstruct
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import StorageMeta

from megatron_idft.checkpoint.dcp_metadata import NAME, read_metadata
from megatron_idft.errors import UnsafeCheckpointError
from megatron_idft.integration.platform import upstream

_LOAD_BYTES = "torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes"
_METADATA = "torch.distributed.checkpoint:FileSystemReader.read_metadata"


def restrict_checkpoint_reading() -> None:
    """From now on torch's reader refuses checkpoints that name anything but the classes checkpoints are made of.

    For objects those are torch's own and the ones that Megatron has registered (`megatron.core.safe_globals`); torch's
    variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 lifts the limit on them. Idempotent.
    """
    from megatron.core import rerun_state_machine
    from megatron.core.dist_checkpointing import serialization  # noqa: F401  registers Megatron's classes

    if upstream.in_force(_METADATA):
        return
    # Random states that were saved with numpy 1, and what a step that was not finite leaves, which Megatron 0.19 saves
    # and does not register.
    rerun = [getattr(rerun_state_machine, name) for name in ("Call", "Caller", "QuickStats", "RerunValidationStatus")]
    numpy_1 = (_reconstruct, "numpy.core.multiarray._reconstruct")
    torch.serialization.add_safe_globals([numpy_1, collections.defaultdict, *rerun])
    load_bytes = DefaultLoadPlanner.load_bytes

    @functools.wraps(FileSystemReader.read_metadata)
    def restricted_read_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        rank = kwargs.get("rank")
        metadata = read_metadata(Path(self.path), NAME if rank is None else f"__{rank}{NAME}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    @functools.wraps(load_bytes)
    def restricted_load_bytes(self: Any, read_item: Any, value: Any) -> None:
        try:
            torch.load(value, map_location="cpu")
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL (\S+)", str(error))
            raise UnsafeCheckpointError(
                f"the checkpoint's object {read_item.storage_index.fqn[:200]} "
                + (f"names {name[1][:200]}" if name else f"is damaged ({str(error)[:200]})")
                + ", which no object that Megatron saves does: it could run code when it is read. If you know where the"
                " checkpoint comes from, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"
            ) from error
        value.seek(0)
        load_bytes(self, read_item, value)

    upstream.replace(_METADATA, restricted_read_metadata)
    upstream.replace(_LOAD_BYTES, restricted_load_bytes)
