"""Datasets: found, read and prepared."""
