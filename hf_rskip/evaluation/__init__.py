"""Scores of translations and classifications, and paired comparisons."""
