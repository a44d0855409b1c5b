"""Settings that must be in place before any kernel is imported."""

import os

import torch

# Where there is no GPU, Triton kernels run under Triton's interpreter, which is chosen at import.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
