"""Loads and prepares datasets."""
