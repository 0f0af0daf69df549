"""Output projection and label-smoothed cross-entropy in one, so that the logits of a batch are never held whole.

`torch.nn.functional.linear_cross_entropy` of PyTorch 2.13 has no chunks where labels are smoothed.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Of the logits of a chunk: 64 MB in float32, and as much again a few times over for their softmax and gradient.
_MAX_CELLS = 2**24


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    max_cells: int = _MAX_CELLS,
) -> torch.Tensor:
    """The sum over all labels of the smoothed cross-entropy of `linear(hidden, weight, bias)`, in float32 at least.

    Positions without a label take no part in the projection. The logits of the others are computed in chunks, and
    again for the gradient. This is the loss of the `LabelSmoother` of Transformers before its division.

    Args:
        hidden: `(..., d_model)`.
        weight, bias: of the projection, `(vocabulary, d_model)` and `(vocabulary,)`.
        labels: `(...)`; -100 is ignored.
        label_smoothing: what is spread evenly over the vocabulary, from 0 to below 1.
        max_cells: logits held at once.
    """
    wanted = labels != -100
    rows = max(1, max_cells // len(weight))
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for part, targets in zip(hidden[wanted].split(rows), labels[wanted].split(rows), strict=True):
        total = total + checkpoint(
            _loss_of_chunk, part, weight, bias, targets, label_smoothing, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _loss_of_chunk(hidden, weight, bias, targets, label_smoothing) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
