"""Settings that must be in place before any kernel is imported."""

import os
from pathlib import Path

import pytest

# Tests run as many processes as there are cores, on small tensors: threads would only wait for each other, and burn the
# cores that others want meanwhile.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Where there is no GPU, Triton kernels run under Triton's interpreter, which is chosen at import.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# Folders of the files that take longest: begun last, one of them would run when nothing else is left.
LONG = ("integration", "real", "examples", "loss", "faults", "benchmarks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders of long files first; within a folder everything stays in its order."""
    tests = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(tests).parts[0]
        return LONG.index(folder) if folder in LONG else len(LONG)

    items.sort(key=place)
