"""Settings that must be in place before any kernel is imported."""

import os

# Tests run as many processes as there are cores, on small tensors: threads would only wait for each other, and burn the
# cores that others want meanwhile.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Where there is no GPU, Triton kernels run under Triton's interpreter, which is chosen at import.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
