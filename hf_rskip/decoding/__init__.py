"""From source sentences to translations."""
