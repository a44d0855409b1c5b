"""Rollouts and analyses that another engine wrote: JSONL by record id, read where they are needed.

    {"id": "a", "responses": ["…", "…"]}   or {"id": "a", "response": "…"}     rollouts
    {"id": "a", "analysis": "…"}                                               analyses

with "turn", counted from 0, where a record has several turns of the assistant. Such lines may be written by hand; their
responses count as finished. Those of tools/vllm_rollouts.py also hold

    token_ids                  of each response, as drawn, with the stop token: they are taken, and the text is not
                               tokenized again; one without a stop token at its end is unfinished
    prompt_sha256              of the prompt that was answered, see `prompt_sha256`
    tokenizer_fingerprint      of tokenizer and chat template
    template_sha256            of the hint template, in analyses
    sampling                   temperature, top_p and top_k, in rollouts

and are refused where these are others than those of the job.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_idft.corpus.messages import shown
from megatron_idft.errors import InputError

Kind = Literal["rollouts", "analyses"]
_REMEDY = {
    "rollouts": 'expected {"id": …, "responses": ["…"]} or {"id": …, "response": "…"}',
    "analyses": 'expected {"id": …, "analysis": "…"}',
}


@dataclass(frozen=True, slots=True)
class ProvidedText:
    """A response or an analysis.

    Attributes:
        token_ids: as drawn, with the stop token if one ended the text; None: the text is tokenized.
        prompt_sha256: of the prompt that was answered; None: the line does not say.
        template_sha256: of the hint template of an analysis; None: the line does not say.
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    prompt_sha256: str | None = None
    template_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """What the lines of a file must have been made with, as far as they say.

    Attributes:
        tokenizer: fingerprint of tokenizer and chat template.
        vocab_size: of the tokenizer; token ids lie below it.
        templates: sha256 of the hint templates that ask for an analysis.
        sampling: of own responses: temperature, top_p, top_k.
    """

    tokenizer: str
    vocab_size: int
    templates: Collection[str]
    sampling: Mapping[str, float]


def prompt_sha256(ids: NDArray[np.integer]) -> str:
    """Identifies a prompt: the hash of its token ids as little-endian int32.

    Args:
        ids: int [n].
    """
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()


class ProvidedTexts:
    """An indexed file: memory holds the ids and their places in the file.

    Args:
        path: a plain .jsonl file.
        kind: of its lines.
        known: ids of the records; None: not all are known, since --limit leaves some out.
        origin: of the job; None: nothing is compared.

    Attributes:
        fingerprint: of the file's content.
        unnamed: how many lines name no tokenizer.

    Raises:
        InputError: a line is not of this kind, has an id that no record has or that another line has, or was made with
            another tokenizer, template or sampling; the message names file and line.
    """

    def __init__(self, path: str | Path, kind: Kind, known: Iterable[str] | None, origin: Origin | None = None):
        self._path, self._kind, self._origin = Path(path), kind, origin
        self.unnamed = 0
        if self._path.suffix != ".jsonl":
            raise InputError(f"--{kind} {path}: the file is read by position, so it must be plain .jsonl: unpack it")
        self._places: dict[str, list[int]] = {}
        self.fingerprint = self._index(None if known is None else set(known))

    def __len__(self) -> int:
        """The number of records that the file has something for."""
        return len(self._places)

    def get(self, identity: str) -> dict[int | None, Any]:
        """The record's responses, or its analysis, by turn; the turn is None where the file names none."""
        found = {}
        with open(self._path, "rb") as file:
            for place in self._places.get(identity, ()):
                file.seek(place)
                _, turn, value = self._read(self._row(file.readline(), ""), "")
                found[turn] = value
        return found

    def _index(self, known: set[str] | None) -> str:
        digest = hashlib.sha256()
        seen: dict[tuple[str, int | None], int] = {}
        try:
            with open(self._path, "rb") as file:
                place = 0
                for line, text in enumerate(file, 1):
                    digest.update(text)
                    if text.strip():
                        at = f"line {line}"
                        row = self._row(text, at)
                        identity, turn, _ = self._read(row, at)
                        self._check_origin(row, at)
                        if known is not None and identity not in known:
                            raise self._error(at, f"no record has the id {shown(identity)}")
                        if (identity, turn) in seen:
                            was = f"{shown(identity)} stands in line {seen[identity, turn]} already"
                            raise self._error(at, f"{was}: one line for each record and turn")
                        seen[identity, turn] = line
                        self._places.setdefault(identity, []).append(place)
                    place += len(text)
        except OSError as error:
            raise InputError(f"--{self._kind} {self._path}: {error}") from error
        return digest.hexdigest()

    def _row(self, text: bytes, at: str) -> dict[str, Any]:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._error(at, f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise self._error(at, _REMEDY[self._kind])
        return row

    def _read(self, row: dict[str, Any], at: str) -> tuple[str, int | None, Any]:
        identity = row.get("id")
        if isinstance(identity, bool) or not isinstance(identity, str | int):
            raise self._error(at, _REMEDY[self._kind])
        turn = row.get("turn")
        if turn is not None and (isinstance(turn, bool) or not isinstance(turn, int)):
            raise self._error(at, f"turn {shown(turn)}: expected a whole number, counted from 0")
        value = self._value(row, at)
        if value is None:
            raise self._error(at, _REMEDY[self._kind])
        return str(identity), turn, value

    def _value(self, row: dict[str, Any], at: str) -> Any:
        """The texts with their token ids; None where the line is not of this kind."""
        texts: Any
        ids: Any
        if self._kind == "analyses":
            texts, ids = [row.get("analysis")], [row.get("token_ids")]
        elif "responses" in row or "response" not in row:
            texts, ids = row.get("responses"), row.get("token_ids")
        else:
            texts, ids = [row["response"]], [row.get("token_ids")]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            return None
        ids = [None] * len(texts) if ids is None else ids
        if not isinstance(ids, list) or len(ids) != len(texts):
            raise self._error(at, "token_ids: expected one list of token ids for each response")
        asked = row.get("prompt_sha256"), row.get("template_sha256")
        found = [ProvidedText(text, self._ids(some, at), *asked) for text, some in zip(texts, ids, strict=True)]
        return found[0] if self._kind == "analyses" else found

    def _ids(self, ids: Any, at: str) -> tuple[int, ...] | None:
        if ids is None:
            return None
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise self._error(at, "token_ids: expected a list of token ids, whole numbers from 0")
        if self._origin is not None and max(ids) >= self._origin.vocab_size:
            raise self._error(at, f"token_ids: {max(ids)} is no token of this tokenizer ({self._origin.vocab_size:,})")
        return tuple(ids)

    def _check_origin(self, row: dict[str, Any], at: str) -> None:
        origin = self._origin
        named = row.get("tokenizer_fingerprint")
        self.unnamed += named is None
        if origin is None:
            return
        if named not in (None, origin.tokenizer):
            raise self._error(
                at,
                f"its prompts were made with another tokenizer or chat template ({shown(named)}, here"
                f" {origin.tokenizer}): pass the --tokenizer-model, --chat-template and --sft-template-date that"
                " `realign prompts` had, or write the prompts and this file again",
            )
        template = row.get("template_sha256")
        if self._kind == "analyses" and template is not None and template not in origin.templates:
            used = ", ".join(origin.templates) or "none, no template asks for an analysis"
            raise self._error(
                at,
                f"it answers another hint template (sha256 {shown(template)}, here {used}): pass the template that"
                " `realign prompts` had, or write the prompts and this file again",
            )
        sampling = row.get("sampling")
        if self._kind == "rollouts" and sampling is not None and sampling != origin.sampling:
            raise self._error(
                at,
                f"sampled with {shown(sampling)}, here {shown(dict(origin.sampling))}: pass the --rollout-temperature,"
                " --rollout-top-p and --rollout-top-k that `realign prompts` had, or write this file again",
            )

    def _error(self, at: str, what: str) -> InputError:
        return InputError(f"--{self._kind} {self._path}, {at}: {what}")
