"""The tokenizer beside a checkpoint: `convert` and `train` keep it in the checkpoint's folder `tokenizer`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_idft.checkpoint.folders import COMPANIONS
from megatron_idft.console import say
from megatron_idft.data.chat.tokenizer_files import holds_tokenizer
from megatron_idft.errors import ArgumentError

_HUGGING_FACE, _SENTENCEPIECE = "HuggingFaceTokenizer", "SentencePieceTokenizer"


def tokenizer_type(path: str) -> str:
    """Megatron's name for a tokenizer of such a path."""
    return _SENTENCEPIECE if path.endswith(".model") else _HUGGING_FACE


def own_tokenizer_flags(given: Mapping[str, str], *, of_script: bool = False) -> list[str]:
    """The flags of the tokenizer that lies beside the checkpoint to begin with, where none is given; rank 0 says so.

    Args:
        given: every flag with its value.
        of_script: the flags are another script's, which knows only Megatron's: nothing is added unless they ask for a
            tokenizer of this type.
    """
    if "--tokenizer-model" in given:
        return []
    for flag in ("--load", "--pretrained-checkpoint"):
        folder = Path(given.get(flag) or "") / COMPANIONS
        path = _tokenizer_in(folder) if given.get(flag) else None
        if path is None or (of_script and given.get("--tokenizer-type") != tokenizer_type(str(path))):
            continue
        added = ["--tokenizer-model", str(path)]
        template = folder / "chat_template.jinja"
        # A folder's own template is read with it.
        if path.is_file() and template.is_file() and "--chat-template" not in given and not of_script:
            added += ["--chat-template", str(template)]
        if int(os.environ.get("RANK", "0")) == 0:
            say(f"> {' '.join(added)}: the tokenizer kept beside the checkpoint of {flag}")
        return added
    return []


def require_tokenizer(args: argparse.Namespace) -> None:
    """Refuse flags without a tokenizer.

    Raises:
        ArgumentError: there is none, neither given nor beside a checkpoint.
    """
    if args.tokenizer_model is not None:
        return
    places = [str(Path(place) / COMPANIONS) for place in (args.load, args.pretrained_checkpoint) if place]
    there = f"; there is none in {' or '.join(places)}" if places else ""
    raise ArgumentError(
        "no tokenizer: pass --tokenizer-model with a Hugging Face folder or a sentencepiece .model file. It may be left"
        f" out where --load DIR has one in DIR/{COMPANIONS}, as `convert to-megatron` and `train` write it{there}"
    )


def _tokenizer_in(folder: Path) -> Path | None:
    """A Hugging Face folder, or the one sentencepiece model that lies in it; None where there is no tokenizer."""
    if not folder.is_dir() or not holds_tokenizer(folder):
        return None
    models = list(folder.glob("*.model"))
    hugging_face = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return models[0] if len(models) == 1 and not hugging_face else folder
