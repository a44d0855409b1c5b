"""Models between Hugging Face safetensors folders and Megatron checkpoints."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_idft.checkpoint.config import ConversionError, UnknownFamilyError
    from megatron_idft.checkpoint.convert import to_hf, to_megatron

_HOME = {
    "ConversionError": "config",
    "UnknownFamilyError": "config",
    "to_hf": "convert",
    "to_megatron": "convert",
}

__all__ = ["ConversionError", "UnknownFamilyError", "to_hf", "to_megatron"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"megatron_idft.checkpoint.{_HOME[name]}"), name)
    raise AttributeError(f"module 'megatron_idft.checkpoint' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
