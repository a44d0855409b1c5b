"""Print what `doctor` finds on a pretended node of 8 GPUs with the real Transformer Engine, as JSON."""

import dataclasses
import json
import types

import torch

from megatron_idft.integration.platform import doctor

H100 = types.SimpleNamespace(major=9, minor=0, total_memory=80 << 30, name="NVIDIA H100")
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 8
torch.cuda.get_device_properties = lambda *_: H100
print(json.dumps([dataclasses.asdict(finding) for finding in doctor.examine()]))
