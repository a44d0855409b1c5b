"""The linter of scored corpora: verdicts in plain language, each with its threshold and source."""
