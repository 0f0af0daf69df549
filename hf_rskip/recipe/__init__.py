"""Training recipes: their keys, and how a YAML of them is read and checked."""
