"""The report on a realigned corpus: a page for a person, and the same numbers as JSON."""
