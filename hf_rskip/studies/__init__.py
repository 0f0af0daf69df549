"""Studies: forms of a model trained with several seeds, and compared."""
