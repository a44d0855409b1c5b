"""What tells whether two records say the same: hashes of their texts, equal up to white space."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from megatron_idft.corpus.records import Message, Record


def text_hashes(record: Record) -> tuple[str, str]:
    """Of all that the assistant is shown, tools too, and of what it says: 16 hexadecimal digits each."""
    assistant = [message for message in record.messages if message["role"] == "assistant"]
    others = [message for message in record.messages if message["role"] != "assistant"]
    return _text_hash(others, record.tools), _text_hash(assistant)


def _text_hash(messages: Sequence[Message], tools: Any = None) -> str:
    texts = [" ".join(str(message["content"]).split()) for message in messages]
    said = [[message.get("reasoning_content"), message.get("tool_calls")] for message in messages]
    if tools or any(part for parts in said for part in parts):
        texts.append(json.dumps([tools, said], ensure_ascii=False, sort_keys=True, default=str))
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
