"""The linter of scored corpora: verdicts in plain language, each with its threshold and source."""

from megatron_idft.corpus.lint.finding import Finding
from megatron_idft.corpus.lint.linter import ROW_TESTS, lint, lint_null

__all__ = ["ROW_TESTS", "Finding", "lint", "lint_null"]
