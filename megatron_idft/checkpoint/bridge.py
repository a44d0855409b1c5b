"""Families without a table: Megatron-Bridge's own conversion, where that package is installed.

The calls are those of its public `AutoBridge` (`megatron/bridge/models/conversion/auto_bridge.py`: `import_ckpt`,
`from_hf_pretrained`, `export_ckpt`); tests/bridge makes them where that package is there. It holds the whole model in
memory, and its checkpoints keep the model's settings in `run_config.yaml`, for its own programs: for Megatron-LM the
flags must be written by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_idft.checkpoint.safetensors_files import SafetensorsFolder
from megatron_idft.errors import ConversionError, UnknownFamilyError


def _auto_bridge(because: UnknownFamilyError) -> Any:
    try:
        from megatron.bridge import AutoBridge
    except ImportError as error:
        raise UnknownFamilyError(
            f"{because}. It is not installed here ({error}): pip install megatron-bridge, or use a NeMo container"
        ) from error
    return AutoBridge


def to_megatron(source: str | Path, target: str | Path, because: UnknownFamilyError) -> None:
    """Let Megatron-Bridge write the Hugging Face folder `source` as a Megatron checkpoint. Runs no code of the folder.

    Raises:
        UnknownFamilyError: it is not installed.
        ConversionError: `target` exists, or the weights are no safetensors.
    """
    bridge = _auto_bridge(because)
    _refuse_existing(target)
    SafetensorsFolder(Path(source))  # transformers, which reads it then, would take a pickle too
    bridge.import_ckpt(str(source), str(target), trust_remote_code=False, use_safetensors=True)


def to_hf(source: str | Path, target: str | Path, companions: str | Path, because: UnknownFamilyError) -> None:
    """Let Megatron-Bridge write a Megatron checkpoint as a Hugging Face folder like `companions`.

    Raises:
        UnknownFamilyError: it is not installed.
        ConversionError: `target` exists.
    """
    bridge = _auto_bridge(because)
    _refuse_existing(target)
    SafetensorsFolder(Path(companions))
    model = bridge.from_hf_pretrained(str(companions), trust_remote_code=False, use_safetensors=True)
    model.export_ckpt(str(source), str(target), strict=True)


def _refuse_existing(target: str | Path) -> None:
    if Path(target).exists():
        raise ConversionError(f"{target} exists already: nothing is overwritten. Remove it, or name another folder")
