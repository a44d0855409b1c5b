"""Rollouts and analyses that another engine wrote: JSONL by record id, read where they are needed.

    {"id": "a", "responses": ["…", "…"]}   or {"id": "a", "response": "…"}     rollouts
    {"id": "a", "analysis": "…"}                                               analyses

with "turn", counted from 0, where a record has several turns of the assistant. Responses count as finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from megatron_idft.corpus.messages import shown
from megatron_idft.errors import InputError

Kind = Literal["rollouts", "analyses"]
_REMEDY = {
    "rollouts": 'expected {"id": …, "responses": ["…"]} or {"id": …, "response": "…"}',
    "analyses": 'expected {"id": …, "analysis": "…"}',
}


class ProvidedTexts:
    """An indexed file: memory holds the ids and their places in the file.

    Args:
        path: a plain .jsonl file.
        kind: of its lines.
        known: ids of the records; None: not all are known, since --limit leaves some out.

    Attributes:
        fingerprint: of the file's content.

    Raises:
        InputError: a line is not of this kind, or has an id that no record has or that another line has; the message
            names file and line.
    """

    def __init__(self, path: str | Path, kind: Kind, known: Iterable[str] | None):
        self._path, self._kind = Path(path), kind
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
                _, turn, value = self._read(file.readline(), "")
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
                        identity, turn, _ = self._read(text, at)
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

    def _read(self, text: bytes, at: str) -> tuple[str, int | None, Any]:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._error(at, f"not JSON: {error}") from error
        identity = row.get("id") if isinstance(row, dict) else None
        if isinstance(identity, bool) or not isinstance(identity, str | int):
            raise self._error(at, _REMEDY[self._kind])
        turn = row.get("turn")
        if turn is not None and (isinstance(turn, bool) or not isinstance(turn, int)):
            raise self._error(at, f"turn {shown(turn)}: expected a whole number, counted from 0")
        value = self._value(row)
        if value is None:
            raise self._error(at, _REMEDY[self._kind])
        return str(identity), turn, value

    def _value(self, row: dict[str, Any]) -> Any:
        if self._kind == "analyses":
            analysis = row.get("analysis")
            return analysis if isinstance(analysis, str) else None
        responses = row.get("responses", [row["response"]] if "response" in row else None)
        if not isinstance(responses, list) or not responses or not all(isinstance(text, str) for text in responses):
            return None
        return responses

    def _error(self, at: str, what: str) -> InputError:
        return InputError(f"--{self._kind} {self._path}, {at}: {what}")
