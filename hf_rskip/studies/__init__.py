"""Studies: which form of a model is better, over seeds and settings, with error bars."""
