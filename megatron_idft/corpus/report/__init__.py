"""The report on scored corpora: a page for a person, and the same numbers as JSON."""
