"""Counts of the tokenization of records."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """`records` = kept + bad + empty + dropped."""

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
