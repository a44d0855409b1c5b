"""Conversations -> tokens and loss masks -> datasets. No Megatron here, and torch only for the datasets."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_idft.data.conversations import encode_conversation
    from megatron_idft.data.dataset import ChatDataset, RepeatedRounds, ShuffledEpochs
    from megatron_idft.data.inspect import render_sample
    from megatron_idft.data.template import BUILTIN_TEMPLATES, ConversationError, TemplateError
    from megatron_idft.data.token_cache import CacheError, TokenCache, build_token_cache, open_token_cache
    from megatron_idft.data.tokenizer import ChatTokenizer, load_tokenizer

_HOME = {
    "BUILTIN_TEMPLATES": "template",
    "CacheError": "token_cache",
    "ChatDataset": "dataset",
    "ChatTokenizer": "tokenizer",
    "ConversationError": "template",
    "RepeatedRounds": "dataset",
    "ShuffledEpochs": "dataset",
    "TemplateError": "template",
    "TokenCache": "token_cache",
    "build_token_cache": "token_cache",
    "encode_conversation": "conversations",
    "load_tokenizer": "tokenizer",
    "open_token_cache": "token_cache",
    "render_sample": "inspect",
}

__all__ = [
    "BUILTIN_TEMPLATES",
    "CacheError",
    "ChatDataset",
    "ChatTokenizer",
    "ConversationError",
    "RepeatedRounds",
    "ShuffledEpochs",
    "TemplateError",
    "TokenCache",
    "build_token_cache",
    "encode_conversation",
    "load_tokenizer",
    "open_token_cache",
    "render_sample",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"megatron_idft.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'megatron_idft.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
