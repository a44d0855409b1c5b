"""Files of versions that recorded the share of the plain stream, read under today's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

_HINT = {"num_hinted_prompt_tokens": "num_prompt_tokens", "analysis_tokens": "analysis_tokens"}
_SETTINGS = {"beta": "slope", "beta_factor": "slope_factor"}
# Of a candidate, and of a turn of a record's `realigned`: today's name, and whether the number is 1 less the former.
_TRY = {"beta": ("slope", False), "lambda_mean": ("hint_share_mean", True), "lambda_max": ("hint_share_min", True)}


def hint_share_of(plain_share: str | float) -> float:
    """1 less `plain_share`, exact in decimals: 0.1 for 0.9.

    Raises:
        decimal.InvalidOperation: no number.
    """
    return float(1 - Decimal(str(plain_share)))


def current_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a job as `RealignSettings.describe` names them now, whichever version recorded them."""
    found = dict(settings)
    if "prompt" in found:  # before there was a chain of fallbacks
        found |= {"prompts": [found.pop("prompt")], "more_room": 0.0, "original_weight": 1.0}
        if isinstance(analysis := found.get("analysis"), dict):
            found["analysis"] = {**analysis, "marker": "require"}
    if "regenerate" not in found:
        found.setdefault("bare_below", 0.0)
    if isinstance(retry := found.get("retry"), dict) and "after_retries" in retry:
        found["retry"] = {name: value for name, value in retry.items() if name != "after_retries"}
        found["fallback"] = retry["after_retries"]
    for part in ("mixing", "retry"):
        if isinstance(given := found.get(part), dict):
            found[part] = {_SETTINGS.get(name, name): value for name, value in given.items()}
    mixing = found.get("mixing")
    if isinstance(mixing, dict) and "value" in mixing:
        mixing["hint_share"] = hint_share_of(mixing.pop("value"))
    return found


def current_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of an earlier version, with whichever of its columns were read, changed in place."""
    for turn in row.get("turns") or ():
        if "mix_weight" in turn:
            turn["hint_share"] = [1 - share for share in turn.pop("mix_weight") or ()]
        _name_hint(turn)
        for candidate in turn.get("candidates") or ():
            _rename(candidate)
    if row.get("record"):
        record = json.loads(row["record"])
        for turn in record["realigned"]["turns"]:
            _rename(turn)
        row["record"] = json.dumps(record, ensure_ascii=False)
    return row


def _name_hint(turn: dict[str, Any]) -> None:
    """The only hint of a turn, in the columns of the turn, among its `hints`."""
    hint = {name: turn.pop(former) for former, name in _HINT.items() if former in turn}
    text = turn.pop("analysis_text", None)  # of one without a marker only
    if any(value is not None for value in (*hint.values(), text)):
        turn["hints"] = [{"stage": "hinted", "analysis_text": text, **hint}]


def _rename(tried: dict[str, Any]) -> None:
    for former, (name, complement) in _TRY.items():
        if former in tried:
            value = tried.pop(former)
            tried[name] = 1 - value if complement and value is not None else value
