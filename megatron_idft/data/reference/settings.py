"""Where the numbers of a reference model come from, and what they must agree with before any is read."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_idft.corpus.ledger.files import finished_parts
from megatron_idft.corpus.ledger.manifest import read_manifest
from megatron_idft.data.reference.columns import ReferenceColumns
from megatron_idft.errors import InputError
from megatron_idft.files import describe_source

RECORDS = "records"  # in the place of a path: the columns stand in the records themselves
DTYPES = ("float32", "float16")
_FOOTER_BYTES = 1 << 14  # of a part's end: Parquet has the sizes and the range of every column there


@dataclass(frozen=True, slots=True)
class ReferenceSettings:
    """The flags of a reference model.

    Args:
        scores: a folder of `score`, a file that another engine wrote, or RECORDS.
        columns: what is kept of it.

    Raises:
        InputError: values that cannot be used.
    """

    scores: str
    columns: ReferenceColumns = field(default_factory=ReferenceColumns)

    def __post_init__(self) -> None:
        if self.columns.top_k < 0:
            raise InputError(f"--sft-reference-top-k must not be negative, got {self.columns.top_k}")
        if self.columns.dtype not in DTYPES:
            raise InputError(f"--sft-reference-dtype must be one of {DTYPES}, got {self.columns.dtype!r}")

    def described(self) -> dict[str, Any]:
        """All that the packs depend on, as JSON."""
        columns = self.columns
        found = {"entropy": columns.entropy, "top_k": columns.top_k, "dtype": columns.dtype}
        return {"scores": open_scores(self.scores).fingerprint} | found


@dataclass(frozen=True, slots=True)
class Scores:
    """What is known of scores before they are read.

    Attributes:
        path: of the folder or file; None: they stand in the records.
        parts: the files of a folder of `score`, in order.
        recorded: its settings; empty for all others, which do not say theirs.
        fingerprint: of the content, without reading all of it.
    """

    path: Path | None
    parts: tuple[Path, ...]
    recorded: Mapping[str, Any]
    fingerprint: str

    @property
    def model(self) -> str:
        """The reference model, for a person."""
        if self.path is None:
            return "not named, its numbers stand in the records"
        if not self.recorded:
            return f"not named, its numbers are from {self.path.name}"
        named: str | None = self.recorded["hf_model"]
        return named or f"{self.recorded['model']}, iteration {self.recorded['iteration']}"

    def require(self, tokenizer_fingerprint: str, columns: ReferenceColumns) -> None:
        """Refuse scores of another tokenizer or template, or without a column, where they say so.

        Raises:
            InputError: names the difference and the remedy.
        """
        then = self.recorded.get("tokenizer", tokenizer_fingerprint)  # earlier versions do not say
        if then != tokenizer_fingerprint:
            raise InputError(
                f"{self.path}: these scores were made with another tokenizer or chat template: fingerprint"
                f" {then[:16]}… in the scores, {tokenizer_fingerprint[:16]}… now. Score the data with this tokenizer"
                " and template: any reference model that has the same tokenizer will do"
            )
        if self.recorded and self.recorded.get("reference_top_k", 0) < columns.top_k:
            raise InputError(
                f"{self.path} holds the {self.recorded.get('reference_top_k', 0)} most probable tokens of each place,"
                f" fewer than --sft-reference-top-k {columns.top_k}: score with --reference-top-k {columns.top_k} into"
                " another folder, or ask for fewer"
            )


def open_scores(scores: str) -> Scores:
    """What `--sft-reference` names.

    Raises:
        InputError: there are no scores, or not yet all of them.
    """
    if scores == RECORDS:
        return Scores(None, (), {}, RECORDS)
    path = Path(scores)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise InputError(
            f"--sft-reference {scores}: there is no such file or folder. Name the --output folder of `score`, a file of"
            f" another engine, or `{RECORDS}` where the records hold the column"
        )
    return Scores(path, (), {}, _digest([describe_source(path)]))


def _folder(path: Path) -> Scores:
    if not (path / "manifest.json").is_file():
        raise InputError(f"--sft-reference {path}: it is no --output folder of `score`, it holds no manifest.json")
    manifest = read_manifest(path)
    if not manifest["settings"].keys() >= {"model", "iteration", "hf_model", "tokens"}:
        raise InputError(f"--sft-reference {path}: it belongs to another program than `score`")
    parts = finished_parts(path / "parts", manifest["part_suffix"])
    if len(parts) < manifest["num_chunks"]:
        raise InputError(
            f"--sft-reference {path}: {len(parts)} of {manifest['num_chunks']} chunks are scored. Start the same"
            f" `score` command again (`megatron-idft score status {path}` says how far it is)"
        )
    files = [[part.name, part.stat().st_size, _footer(part)] for part in parts.values()]
    settings = manifest["settings"]
    return Scores(path, tuple(parts.values()), settings, _digest([settings, files]))


def _footer(part: Path) -> str:
    with open(part, "rb") as file:
        file.seek(max(0, part.stat().st_size - _FOOTER_BYTES))
        return hashlib.sha256(file.read()).hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
