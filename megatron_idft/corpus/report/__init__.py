"""The report on scored corpora: a page for a person, and the same numbers as JSON."""

from megatron_idft.corpus.report.report import Report, ReportBuilder

__all__ = ["Report", "ReportBuilder"]
