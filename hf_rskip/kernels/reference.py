"""The formula of rSkip step by step, as [`RSkip`] computes it."""

from ..models.skip_norms import NORM_AXES


def reference(x, branch, gains, biases, centred, eps, axes):
    """y_K for sequences of K gains and biases, each `(size,)` or `None`; RMS normalisation uses no biases."""
    size = int(x.shape[-1])  # under `torch.jit.trace` it is a tensor
    norm = NORM_AXES[axes]["layer_norm" if centred else "rms_norm"](size, eps=eps, elementwise_affine=False)
    y = branch
    for gain, bias in zip(gains, biases, strict=True):
        y = norm.normalize(x + y, gain, bias)
    return y
