"""Read what a run left behind: everything in a torch_dist checkpoint, and every logged value of a step."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def load_checkpoint(folder: Path, iteration: int) -> dict[str, object]:
    """Everything in a checkpoint by path, whatever layout wrote it: model, optimizer, scheduler, random states."""
    state: dict = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(folder / f"iter_{iteration:07d}"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return dict(_leaves(state))


def load_weights(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """The model's tensors alone."""
    parts = ("embedding.", "decoder.", "output_layer.", "mtp.")
    saved = load_checkpoint(folder, iteration)
    return {
        name: value
        for name, value in saved.items()
        if isinstance(value, torch.Tensor) and name.removeprefix("/").startswith(parts)
    }


def differences(a: dict[str, object], b: dict[str, object]) -> list[str]:
    """Paths that are not the same to the bit. The arguments are left out: they hold folders."""
    names = [name for name in a.keys() | b.keys() if not name.endswith("/args")]
    return [name for name in names if name not in a or name not in b or not _equal(a[name], b[name])]


def load_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Key -> iteration -> value, as written to TensorBoard (fp32, not the rounded console line)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        key: {event.step: event.value for event in events.Scalars(key)}
        for key in events.Tags()["scalars"]
        if not key.endswith(" vs samples")
    }


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for key, inner in enumerate(value):
            yield from _leaves(inner, f"{path}/{key}")
    else:
        yield path, value


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return a.getvalue() == b.getvalue() if isinstance(a, io.BytesIO) else a == b
