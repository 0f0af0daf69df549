"""The formula of rSkip step by step, as [`RSkip`] computes it."""

from torch.nn import functional as F

from ..models.skip_norms import sample_layer_norm, sample_rms_norm


def reference(x, branch, gains, biases, centred, eps, axes):
    """y_K for sequences of K gains and biases, each `(size,)` or `None`; RMS normalisation uses no biases."""
    y, size = branch, x.shape[-1:]
    for gain, bias in zip(gains, biases, strict=True):
        y = x + y
        if axes == "sample":
            y = sample_layer_norm(y, gain, bias, eps) if centred else sample_rms_norm(y, gain, eps)
        else:
            y = F.layer_norm(y, size, gain, bias, eps) if centred else F.rms_norm(y, size, gain, eps)
    return y
