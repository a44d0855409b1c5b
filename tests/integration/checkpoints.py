"""Read what a run left behind: every tensor of a torch_dist checkpoint, and every logged value of a step."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def load_tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Name -> global tensor, whatever layout wrote it. Optimizer states are included."""
    state: dict = {}
    _load_state_dict(
        state,
        storage_reader=dcp.FileSystemReader(folder / f"iter_{iteration:07d}"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            flat[prefix] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)

    walk("", state)
    return flat


def load_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Key -> iteration -> value, as written to TensorBoard (fp32, not the rounded console line)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        key: {event.step: event.value for event in events.Scalars(key)}
        for key in events.Tags()["scalars"]
        if not key.endswith(" vs samples")
    }
