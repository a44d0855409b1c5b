"""The reference's columns of a block of records, in the process that encodes it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_idft.corpus.ledger.files import finished_parts
from megatron_idft.corpus.records import Record
from megatron_idft.data.reference.foreign import PlaceKeys, cut_into_parts
from megatron_idft.data.reference.index import ScoreIndex, has_index, keys_of_texts, text_key, write_index
from megatron_idft.data.reference.own import OWN, Kept, own_row
from megatron_idft.data.reference.parts import read_rows
from megatron_idft.data.reference.rows import ScoreFault, ScoreRow, columns_of
from megatron_idft.data.reference.settings import RECORDS, ReferenceSettings, open_scores
from megatron_idft.errors import RecordError

Columns = dict[str, NDArray[Any]]
_Place = tuple[int, int]  # a part, and a row of it


def prepare_scores(settings: ReferenceSettings, paths: Sequence[str], folder: Path) -> None:
    """Write to `folder` what readers look up in, once.

    Args:
        settings: name the scores.
        paths: the record files.
        folder: for this alone.

    Raises:
        RecordError: a row of the scores that cannot be read.
    """
    if settings.scores == RECORDS or has_index(folder):
        return
    folder.mkdir(exist_ok=True)
    scores = open_scores(settings.scores)
    if scores.recorded:
        write_index(folder, map(keys_of_texts, scores.parts))
    else:
        assert scores.path is not None
        write_index(folder, cut_into_parts(scores.path, PlaceKeys(paths), folder))


class ReferenceReader:
    """Finds the scores of records, and lays them beside their tokens.

    Args:
        settings: name the scores.
        paths: the record files.
        folder: what `prepare_scores` has filled.
    """

    def __init__(self, settings: ReferenceSettings, paths: Sequence[str], folder: Path):
        self._settings, self._keys = settings, PlaceKeys(paths)
        self._by_text = Path(settings.scores).is_dir()
        if settings.scores != RECORDS:
            self._index = ScoreIndex(folder)
            where = Path(settings.scores) / "parts" if self._by_text else folder
            self._parts = list(finished_parts(where, ".parquet").values())

    def read(self, block: Sequence[Kept]) -> list[Columns | RecordError | None]:
        """The columns of each record, what is wrong with its scores, or None where it needs none."""
        places = [self._find(kept.record) if len(kept.trained) else [] for kept in block]
        rows = self._rows({found[0] for found in places if found})
        return [self._columns(kept, found, rows) for kept, found in zip(block, places, strict=True)]

    def _find(self, record: Record) -> list[_Place]:
        if self._settings.scores == RECORDS:
            return []
        if self._by_text:
            return self._index.places(text_key(record))
        by_line, by_id = self._keys.of_record(record)
        return self._index.places(by_line) or self._index.places(by_id)

    def _rows(self, places: set[_Place]) -> dict[_Place, ScoreRow]:
        found: dict[_Place, ScoreRow] = {}
        for part in sorted({part for part, _ in places}):
            numbers = sorted(row for other, row in places if other == part)
            rows = read_rows(self._parts[part], numbers, self._settings.columns)
            found |= {(part, number): row for number, row in zip(numbers, rows, strict=True)}
        return found

    def _columns(self, kept: Kept, places: list[_Place], rows: dict[_Place, ScoreRow]) -> Columns | RecordError | None:
        if not len(kept.trained):
            return None
        record, own, fault = kept.record, self._settings.scores == RECORDS, None
        try:
            if own:
                return self._laid(kept, own_row(kept))
            for place in places:  # records of one text may differ in their own tokens
                try:
                    return self._laid(kept, rows.get(place) or self._rows({place})[place])
                except ScoreFault as error:
                    fault = fault or error
            raise fault or ScoreFault("log_prob", self._absent(record))
        except ScoreFault as error:
            column = OWN + error.column if own else f"{error.column} of {self._settings.scores}"
            return RecordError(record.file, record.line, column, error.reason)

    def _laid(self, kept: Kept, row: ScoreRow) -> Columns:
        return columns_of(row, kept.ids, kept.trained, kept.trained_before, self._settings.columns)

    def _absent(self, record: Record) -> str:
        if self._by_text:
            return (
                "no conversation with this text was scored: its text was another one, it was skipped or left out, a"
                " shorter --seq-length cut its answers off, or --limit ended before it. Score these records again, or"
                " leave it out with --sft-bad-records skip"
            )
        return (
            f"no row has file {Path(record.file).name!r} and line {record.line}, or the id {record.id!r}: add it, or"
            " leave the record out with --sft-bad-records skip"
        )
