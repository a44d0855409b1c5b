"""The report on a realigned corpus: a page for a person, and the same numbers as JSON."""

from megatron_idft.hinted_decoding.report.report import write_report

__all__ = ["write_report"]
