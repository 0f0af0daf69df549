"""Measures skip connections in a model: angles, effective weights, gradients."""
