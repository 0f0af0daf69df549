"""Label-smoothed cross-entropy of an output projection, in chunks: the logits of a batch are never held whole.

The gradient of a cross-entropy follows from its logits, and is computed with it while those of a chunk are at hand
(Hsu et al., Liger Kernel, https://arxiv.org/abs/2410.10989): chunks cost no second projection, and on a CPU, whose
caches they fit, save a quarter to a half of the time.

`torch.nn.functional.linear_cross_entropy` of PyTorch 2.13 has no chunks where labels are smoothed.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Positions of a chunk on a CPU: with fewer the products get slow, with more the logits leave the cache.
_CPU_ROWS = 256
# Logits of a chunk elsewhere, 64 MB in float32: enough to keep a GPU busy.
_MAX_CELLS = 2**24


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    rows: int | None = None,
) -> torch.Tensor:
    """The sum over all labels of the smoothed cross-entropy of `linear(hidden, weight, bias)`, in float32 at least.

    Positions without a label take no part in the projection. This is the loss of the `LabelSmoother` of Transformers
    before its division. It can be differentiated once.

    Args:
        hidden: `(..., d_model)`.
        weight, bias: of the projection, `(vocabulary, d_model)` and `(vocabulary,)`.
        labels: `(...)`; -100 is ignored.
        label_smoothing: what is spread evenly over the vocabulary, from 0 to below 1.
        rows: positions whose logits are held at once; by default as many as suit the device.
    """
    if rows is None:
        rows = _CPU_ROWS if hidden.device.type == "cpu" else max(1, _MAX_CELLS // len(weight))
    hidden, labels = hidden.flatten(end_dim=-2), labels.flatten()
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, label_smoothing, rows, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, smoothing, rows, with_gradients):
        device, precise = hidden.device.type, torch.promote_types(hidden.dtype, torch.float32)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        head = weight.to(dtype), None if bias is None else bias.to(dtype)
        total = hidden.new_zeros((), dtype=precise)
        if with_gradients:
            by_hidden = torch.zeros_like(hidden)
            by_weight = torch.zeros_like(weight, dtype=precise)
            by_bias = None if bias is None else torch.zeros_like(bias, dtype=precise)
        for positions in (labels != -100).nonzero()[:, 0].split(rows):
            states, targets = hidden[positions].to(dtype), labels[positions, None]
            logits = F.linear(states, *head).to(precise)
            probabilities = logits.softmax(1)
            highest, where = logits.max(1, keepdim=True)
            normalizer = highest - probabilities.gather(1, where).log()  # the logarithm of the sum of exponentials
            expected = (1 - smoothing) * logits.gather(1, targets) + smoothing * logits.mean(1, keepdim=True)
            total += (normalizer - expected).sum()
            if with_gradients:
                gradient = probabilities.sub_(smoothing / len(weight))
                gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, smoothing - 1))
                if bias is not None:
                    by_bias += gradient.sum(0)
                gradient = gradient.to(dtype)
                by_hidden[positions] = (gradient @ head[0]).to(by_hidden.dtype)
                by_weight += gradient.T @ states
        if with_gradients:
            by_head = by_weight.to(weight.dtype), None if bias is None else by_bias.to(bias.dtype)
            ctx.save_for_backward(by_hidden, *by_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gradients = (None if part is None else part * upstream.to(part.dtype) for part in ctx.saved_tensors)
        return *gradients, None, None, None, None
