"""The progress of a realignment, and the outcomes of its records so far."""

from collections import Counter
from pathlib import Path

from megatron_idft.corpus.ledger.ledger import status_of
from megatron_idft.hinted_decoding.output.outcomes import (
    FAILURE_COLUMNS,
    METHOD_COLUMNS,
    TRY_COLUMNS,
    count_methods,
    count_tries,
    describe_methods,
    describe_reason,
    describe_tries,
)
from megatron_idft.hinted_decoding.output.results import TRIAL, read_outcomes, read_settings, retry_folders


def count_outcomes(folder: Path) -> dict[str, Counter[str]]:
    """Numbers of records by "status", of kept turns by "stage" and "method", and of the other records by "reason".

    Under "tries", of all turns. See `count_methods`, `count_tries` and `describe_reason`.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("status", "stage", "method", "reason", "tries")}
    for row in read_outcomes(folder, ["index", "status", "reason", *METHOD_COLUMNS, *FAILURE_COLUMNS, *TRY_COLUMNS]):
        counts["status"][row["status"]] += 1
        counts["tries"].update(count_tries(row["turns"]))
        if row["status"] == "kept":
            counts["stage"].update(str(turn["stage"]) for turn in row["turns"])
            counts["method"].update(count_methods(row["turns"]))
        else:
            counts["reason"][f"{row['status']}: {describe_reason(row)}"] += 1
    return counts


def describe_status(folder: Path) -> str:
    """Chunks, launches, time left, and the outcomes of the records so far, for a person."""
    trial = folder / TRIAL
    if not (folder / "manifest.json").exists() and (trial / "manifest.json").exists():
        return f"trying prompts before the run, each a chunk in {trial}:\n{status_of(trial).format()}"
    lines = [status_of(folder).format()]
    for retry in retry_folders(folder):
        lines.append(f"retry of errors in {retry}:\n{status_of(retry).format()}")
    if not list((folder / "parts").glob("chunk-*.parquet")):
        return "\n".join(lines)
    counts = count_outcomes(folder)
    for name, what in (("status", "records"), ("stage", "turns of kept records by stage")):
        found = ", ".join(f"{count:,} {key}" for key, count in counts[name].most_common())
        lines.append(f"{what}: {found or 'none'}")
    regenerated = read_settings(folder).get("regenerate")
    if regenerated is None or regenerated["only_right"]:
        lines.append(describe_methods(counts["method"]))
    lines += describe_tries(counts["tries"])
    lines += [f"  {count:,} {reason}" for reason, count in counts["reason"].most_common(10)]
    return "\n".join(lines)
