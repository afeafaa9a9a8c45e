"""Tasks of recall: what was shown must be found again."""
