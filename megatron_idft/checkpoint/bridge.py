"""Families without a table: Megatron-Bridge's own conversion, where that package is installed.

Not run here: Megatron-Bridge needs a CUDA build of its dependencies. The calls are those of its public `AutoBridge`
(`megatron/bridge/models/conversion/auto_bridge.py`: `import_ckpt`, `from_hf_pretrained`, `export_ckpt`). Its
checkpoints keep their settings in `run_config.yaml`; they are loaded by its own programs and by Megatron-LM with the
model's flags given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_idft.checkpoint.config import ConversionError, UnknownFamilyError


def _auto_bridge(because: UnknownFamilyError) -> Any:
    try:
        from megatron.bridge import AutoBridge
    except ImportError as error:
        raise UnknownFamilyError(
            f"{because}. Megatron-Bridge converts more families and is used when it is installed (pip install"
            f" megatron-bridge, or an NVIDIA NeMo container): {error}"
        ) from error
    return AutoBridge


def to_megatron(source: str | Path, target: str | Path, because: UnknownFamilyError) -> None:
    """Let Megatron-Bridge write the Hugging Face folder `source` as a Megatron checkpoint. Runs no code of the folder.

    Raises:
        UnknownFamilyError: it is not installed.
        ConversionError: `target` exists.
    """
    bridge = _auto_bridge(because)
    _refuse_existing(target)
    bridge.import_ckpt(str(source), str(target), trust_remote_code=False)


def to_hf(source: str | Path, target: str | Path, companions: str | Path, because: UnknownFamilyError) -> None:
    """Let Megatron-Bridge write a Megatron checkpoint as a Hugging Face folder like `companions`.

    Raises:
        UnknownFamilyError: it is not installed.
        ConversionError: `target` exists.
    """
    bridge = _auto_bridge(because)
    _refuse_existing(target)
    bridge.from_hf_pretrained(str(companions), trust_remote_code=False).export_ckpt(str(source), str(target))


def _refuse_existing(target: str | Path) -> None:
    if Path(target).exists():
        raise ConversionError(f"{target} exists already: nothing is overwritten. Remove it, or name another folder")
