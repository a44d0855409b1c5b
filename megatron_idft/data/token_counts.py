"""What the build of a token cache met, and how a person is told."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class Counts:
    """What a build met. `records` = kept + bad + empty + dropped."""

    records: int = 0
    kept: int = 0
    bad: int = 0
    empty: int = 0  # no trained token, or none within seq_length
    dropped: int = 0  # longer than seq_length + 1 tokens, under truncation="drop"
    truncated: int = 0  # kept, but cut on the right to seq_length + 1 tokens
    pretokenized: int = 0  # kept, with the ids and the mask that they came with
    weighted: int = 0  # kept, with tokens whose weight in the loss is neither 0 nor 1
    tokens: int = 0  # of the kept records, after truncation
    trained_tokens: int = 0  # labels that enter the loss
    lost_trained_tokens: int = 0  # cut off or dropped with their record
    straddling_spans: int = 0
    spells_special: int = 0
    unwritten: int = 0


def report_counts(counts: Counts, seq_length: int, path: Path | None) -> str:
    """One line for each count that says something. path: of the cache; None before there is one."""
    mean = counts.tokens / max(counts.kept, 1)
    share = 100 * counts.trained_tokens / max(counts.tokens, 1)
    lines = [
        ("records read", counts.records, ""),
        ("  kept", counts.kept, f"{mean:,.1f} tokens on average"),
        ("  bad, skipped", counts.bad, f"see {path / 'errors.jsonl'}" if path and counts.bad else ""),
        ("  empty, left out", counts.empty, "no trained token within the sequence length"),
        ("  too long, left out", counts.dropped, f"more than {seq_length} + 1 tokens"),
        ("truncated", counts.truncated, f"kept, cut to {seq_length} + 1 tokens"),
        ("tokens", counts.tokens, ""),
        ("trained tokens", counts.trained_tokens, f"{share:.1f} %"),
        ("trained tokens lost", counts.lost_trained_tokens, "cut off or left out for length"),
    ]
    if counts.pretokenized:
        lines.append(("pre-tokenized records", counts.pretokenized, "kept, with the ids and the mask they came with"))
    if counts.weighted:
        lines.append(("records with weights", counts.weighted, "their tokens weigh more or less than 1 in the loss"))
    if counts.straddling_spans:
        lines.append(("answers begun inside a token", counts.straddling_spans, "that token is not trained"))
    if counts.spells_special:
        lines.append(("records spelling special tokens", counts.spells_special, "read as these tokens"))
    if counts.unwritten:
        lines.append(
            ("records not fully written", counts.unwritten, "the template leaves out or rewrites some of their text")
        )
    rows = [f"{name:<32}{value:>16,}   {note}".rstrip() for name, value, note in lines]
    return "\n".join([f"token cache {path}" if path else "token cache", *(f"  {row}" for row in rows)])
