"""The files of a Hugging Face tokenizer folder, looked at before transformers sees them.

An interrupted download, a git checkout without its large files and a wrong edit each leave a folder that transformers
reads with a traceback, or as an empty tokenizer of the right class. Here they are refused by the name of the file. No
code of the folder runs.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_idft.errors import InputError
from megatron_idft.links import leads_out, refuse_links_out

_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
             "additional_chat_templates/*", "*.model", "*.tiktoken", "tekken.json", "config.json")  # fmt: skip
# Any of these is a vocabulary; the first is the form that every fast tokenizer has.
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("tekken.json",))
_POINTER = b"version https://git-lfs.github.com/spec/"
_PROBE = "The quick brown fox jumps over 13 lazy dogs."
_MERGES_EXPECTED = 5000  # ids; below, a vocabulary may be one of letters
_SHOWN = 300  # characters of other programs' messages


def holds_tokenizer(folder: Path) -> bool:
    """Whether a file with a vocabulary lies in the folder, sound or not."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    models = {name for name in names if name.endswith((".model", ".tiktoken"))}
    return bool(models) or any(names.issuperset(vocabulary) for vocabulary in _VOCABULARIES)


def check_tokenizer_files(folder: Path) -> None:
    """Refuse a folder in which no tokenizer can be.

    Raises:
        InputError: names the file.
    """
    files = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)})
    refuse_links_out(folder, [*files, *folder.glob("additional_chat_templates")])
    if not holds_tokenizer(folder):
        names = {path.name for path in files if path.is_file()}
        there = f"only {', '.join(sorted(names))}" if names else "no file of a tokenizer"
        raise InputError(
            f"{folder}: tokenizer.json is missing; there is {there[:_SHOWN]}. Was the download interrupted? Download "
            "the folder again"
        )
    for path in files:
        if not path.is_file():
            continue
        with open(path, "rb") as file:
            check_head(path, file.read(len(_POINTER)))
        if path.suffix == ".json":
            _check_json(path)
        elif path.suffix in (".jinja", ".txt"):
            read_text(path)


def check_head(path: Path, head: bytes) -> None:
    """Refuse a file that is empty, or a pointer of git-lfs.

    Raises:
        InputError: a file with these first bytes is no tokenizer's.
    """
    if not head:
        raise InputError(f"{path} is empty: download it again")
    if head.startswith(_POINTER):
        raise InputError(
            f"{path} is a pointer of git-lfs, not the file itself: run `git lfs pull` in the folder, or download it"
        )


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): download it again, or save it as UTF-8"
        ) from None


def open_with(folder: Path, open_tokenizer: Callable[[], Any]) -> Any:
    """The result of `open_tokenizer`; any error of it becomes an InputError that names the file, if one is known."""
    try:
        return open_tokenizer()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        at = folder / "tokenizer.json"
        broken = _rust_error(at) if at.is_file() else None
        if broken is not None:
            raise InputError(f"{at} holds no tokenizer: {broken[:_SHOWN]}. Download it again") from None
        what = f"{type(error).__name__}: {error}"[:_SHOWN]
        raise InputError(
            f"{folder}: transformers makes no tokenizer of these files ({what}). Compare tokenizer_config.json and "
            "the vocabulary with those of the model's publisher"
        ) from None


def check_reads_text(
    path: Path, regular_ids: Sequence[int], encode: Callable[[str], Sequence[int]], decode: Callable[..., str]
) -> None:
    """Refuse a tokenizer that does not give back a text that it read: an English one, or one of its own pieces.

    Args:
        path: of the tokenizer.
        regular_ids: of its pieces, without special tokens.
        encode: text -> ids.
        decode: ids -> text.

    Raises:
        InputError: the text comes back changed.
    """
    if len(regular_ids) > _MERGES_EXPECTED and len(encode(_PROBE)) >= len(_PROBE.replace(" ", "")):
        raise InputError(
            f"{path}: the tokenizer has {len(regular_ids)} pieces but reads {_PROBE!r} letter by letter: its merges are"
            " missing (merges.txt, or `merges` of tokenizer.json). Download the folder again"
        )
    own = _letters(decode(list(regular_ids[:: len(regular_ids) // 256 + 1]))) if regular_ids else ""
    for text in (_PROBE, own):
        if _letters(text) and _letters(decode(encode(text))) == _letters(text):
            return
    back = decode(encode(_PROBE))[:80]
    raise InputError(
        f"{path}: this is no tokenizer of text: {_PROBE!r} becomes {len(encode(_PROBE))} tokens, and these {back!r}."
        " Its vocabulary is missing or damaged: download the folder again"
    )


def check_size(folder: Path, size: int) -> None:
    """Refuse a tokenizer of another model.

    Raises:
        InputError: the folder is a model's and the tokenizer has less than half of the model's rows.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    rows = config.get("vocab_size") if isinstance(config, dict) else None
    if isinstance(rows, int) and size < rows // 2:
        raise InputError(
            f"{folder}: the tokenizer has {size} ids, config.json says vocab_size {rows}: it is not this model's, or"
            " part of it is missing. Download the folder again"
        )


def _check_json(path: Path) -> None:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not JSON ({error or 'nested too deep'}): download it again"[:600]) from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a JSON object: download it again")
    if path.name == "tokenizer.json" and not isinstance(content.get("model"), dict):
        raise InputError(f"{path} has no `model`: it is not a file of the tokenizers library. Download it again")
    if path.name == "tokenizer_config.json":
        _check_config(path, content)


def _check_config(path: Path, config: dict[str, Any]) -> None:
    template = config.get("chat_template")
    listed = template if isinstance(template, list) else []
    named = [each for each in listed if isinstance(each, dict)]
    texts = [each.get("template") for each in named] if listed else [template]
    if template is not None and (len(named) != len(listed) or not all(isinstance(text, str) for text in texts)):
        raise InputError(
            f"{path}, chat_template: expected a text, or a list of {{name, template}}, found {str(template)[:80]!r}."
            " Mend it, or give a template with --chat-template FILE"
        )
    for key, value in config.items():
        named_text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and value is not None and not isinstance(named_text, str):
            raise InputError(f"{path}, {key}: expected a text, found {str(value)[:80]!r}")
        # transformers 4 opens tokenizer_file wherever it lies.
        elsewhere = path.parent / value if key.endswith("_file") and isinstance(value, str) else path
        if os.path.exists(elsewhere) and leads_out(path.parent, elsewhere):
            raise InputError(f"{path}, {key}: {str(value)[:_SHOWN]!r} leads out of the folder. Remove the field")


def _rust_error(path: Path) -> str | None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return str(error)
    return None


def _letters(text: str) -> str:
    """Without what tokenizers may change: blanks, case, marks; and without what bytes of other texts decode to."""
    return "".join(filter(str.isalnum, text.casefold()))
