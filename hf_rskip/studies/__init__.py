"""The laboratory: studies of residual forms, and probes of what a skip connection does."""
