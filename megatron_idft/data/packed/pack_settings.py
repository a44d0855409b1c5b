"""The settings of `prepare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from megatron_idft.corpus.messages import LEAST_WEIGHT, is_weight
from megatron_idft.data.reference.columns import ReferenceColumns
from megatron_idft.data.reference.settings import ReferenceSettings
from megatron_idft.errors import InputError
from megatron_idft.files import describe_source

CHUNK_FORMAT = 3  # raise it whenever the same corpus would give other bytes
Truncation = Literal["truncate", "drop", "error"]
BadRecords = Literal["stop", "skip"]


@dataclass(frozen=True, slots=True)
class PrepareSettings:
    """The settings of `prepare` that decide its output.

    Args:
        paths: the record files, in order.
        seq_length: a pack holds at most so many input positions; a document of n tokens takes n - 1, since its last
            token is only a label. Longer ones are cut on the right (`truncate`), left out (`drop`) or end the run
            (`error`).
        bad_records: `stop` at the first malformed record, or `skip` them and write them down.
        last_turn_only: no assistant turn is trained but the last.
        prompt_weight: in the loss, of the messages of users and the system that say nothing of their own.
        limit: only the first so many records.
        pad_multiple: a document takes up a multiple of so many positions; context parallelism needs 2 x its size.
        seed: of the order of the packs, and of the choice among documents of one length.
        chunk_bytes: records are cut into chunks of about so many bytes of text, each the work of one process.
        packing: False puts one document in each pack, in the order of the input, and writes an index of the records.
        reference: where the numbers of a reference model come from; None keeps none.

    Raises:
        InputError: values that cannot be used.
    """

    paths: tuple[str, ...]
    seq_length: int
    truncation: Truncation = "truncate"
    bad_records: BadRecords = "stop"
    last_turn_only: bool = False
    limit: int | None = None
    pad_multiple: int = 1
    seed: int = 1234
    chunk_bytes: int = 8 << 20
    packing: bool = True
    prompt_weight: float = 0.0
    reference: ReferenceSettings | None = None

    def __post_init__(self) -> None:
        if not self.paths:
            raise InputError("no record files given: name them with --sft-data FILE …")
        for name, value in (("truncation", Truncation), ("bad_records", BadRecords)):
            if getattr(self, name) not in get_args(value):
                raise InputError(f"{name} must be one of {get_args(value)}, got {getattr(self, name)!r}")
        for name in ("seq_length", "pad_multiple", "chunk_bytes", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not is_weight(self.prompt_weight):
            raise InputError(
                f"--sft-prompt-weight {self.prompt_weight} is no weight: it must be 0 or of a size between"
                f" {LEAST_WEIGHT:.1e} and 3e38"
            )
        if self.seq_length % self.pad_multiple:
            raise InputError(
                f"seq_length {self.seq_length} is no multiple of pad_multiple {self.pad_multiple}: the longest "
                "documents would fit into no pack"
            )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The settings whose `asdict` was written as JSON."""
        reference = values["reference"]
        if reference is not None:
            reference = ReferenceSettings(reference["scores"], ReferenceColumns(**reference["columns"]))
        return cls(**values | {"paths": tuple(values["paths"]), "reference": reference})

    def of_chunks(self, tokenizer_fingerprint: str) -> dict[str, Any]:
        """All that the chunks depend on. Not bad_records: a chunk that is finished has the same bytes either way."""
        return {"chunk_bytes": self.chunk_bytes} | self._of_documents(tokenizer_fingerprint)

    def of_packs(self, tokenizer_fingerprint: str) -> dict[str, Any]:
        """All that the packs depend on."""
        return self._of_documents(tokenizer_fingerprint) | {"pad_multiple": self.pad_multiple, "seed": self.seed}

    def _of_documents(self, tokenizer_fingerprint: str) -> dict[str, Any]:
        return {
            "format": CHUNK_FORMAT,
            "sources": [describe_source(Path(path)) for path in self.paths],
            "tokenizer": tokenizer_fingerprint,
            "seq_length": self.seq_length,
            "truncation": self.truncation,
            "last_turn_only": self.last_turn_only,
            "limit": self.limit,
            # What packs of earlier versions do not say is left out.
            **({} if self.packing else {"packing": False}),
            **({"prompt_weight": self.prompt_weight} if self.prompt_weight else {}),
            **({} if self.reference is None else {"reference": self.reference.described()}),
        }
