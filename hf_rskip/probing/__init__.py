"""What skip connections do in a model: angles, effective weights, gradients."""
