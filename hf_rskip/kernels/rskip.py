"""Recursive skip connections with layer normalisation at the price of one.

One function, [`rskip_layer_norm`], with several implementations of the same formula: y_1 = LN(s x + F),
y_k = LN(s x + y_{k-1}), output y_K.

| `backend` | what it is | where |
|---|---|---|
| `reference` | the formula, step by step | any device and precision |
| `recompute` | tensor operations that keep x and F only, and compute the rest again in the backward pass | any |
| `cpp` | the same as one operator for CPUs, compiled at its first use | CPU; float32, bfloat16, float16 |
| `triton` | the same as two kernels for GPUs | CUDA; float32, bfloat16, float16 |
| `auto` | the fastest one that was measured not to be slower than `reference` | |

Where one value is normalised alone, and where s is 0, it is `reference` whatever was asked for.

All but the reference keep one activation whatever K is, and take the closed form where gain and bias come only at the
last step; their numbers are those of float32 throughout, rounded once at the end. Dropout of F is part of them, from a
seed (see `dropout.py`) rather than a mask that is kept. Derivatives of any order are those of reverse mode: under
forward mode and `torch.func` there is only the reference.

Statistics are float32 sums. Where a step cancels almost all of a row, the closed form and the norms over samples lose
more digits than the reference: with F = -2 x + noise of .01 x and K = 2, the error of y is 1e-3 and 2e-4 of its largest
value, and 1e-5 in the reference. `recompute` with `affine="per_step"` over channels is as good as that.

LN goes over the features of each position (`axes="channels"`) or, for feature maps, over whole samples
(`axes="sample"`, see `maps.py`). Not here: batch norm, and norms of another's making. In [`RSkip`] they
take the formula step by step.
"""

import importlib.util
import os

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from ..models.skip_connections import AFFINES
from ..models.skip_norms import sample_layer_norm, sample_rms_norm
from .autograd import RecomputedRSkip
from .dropout import draw_seed, keep_factors
from .maps import OPERATORS, rskip_over_maps

AXES = ("channels", "sample")
"""What the norms go over: the last dimension, or all but the first (`skip_norm_axes`)."""
BACKENDS = ("auto", "reference", "recompute", "cpp", "triton")
LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


def rskip_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    recursions: int = 2,
    affine: str = "per_step",
    eps: float = 1e-5,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    backend: str = "auto",
    axes: str = "channels",
) -> torch.Tensor:
    """K steps of adding x and normalising: y_1 = LN(s x + F), y_k = LN(s x + y_{k-1}), output y_K.

    LN is layer normalisation over the last dimension. With K = 1 it is post-LN.

    Args:
        x: input of the residual block, `(..., size)`.
        branch: output F of its branch, of the same shape. Where the precisions differ, as of a float32 residual beside
            a bfloat16 branch, the output has the higher one.
        weight: gains, `(recursions, size)` for `affine="per_step"` and `(size,)` otherwise; `None` is 1.
        bias: of the same shape; `None` is 0.
        recursions: K, at least 1.
        affine: `"per_step"`, `"shared"` (one gain and bias for all steps) or `"last"` (only at step K), as in
            [`RSkip`].
        eps: added to the variance.
        scale: the factor s of x.
        dropout: the part p of F that is zeroed first, at least 0 and less than 1; the rest is divided by 1 - p. For
            training only: evaluation passes 0. The mask is kept by the reference and over samples only.
        seed: of the mask, int64 `()` on the device of x: the same mask in all implementations. Without one it is drawn
            from torch's default generator, by the reference as torch's dropout draws it.
        backend: `"auto"`, `"reference"`, `"recompute"`, `"cpp"` or `"triton"`, see the table of
            `hf_rskip.kernels.rskip`.
        axes: `"channels"`, or `"sample"` for layer normalisation over all dimensions but the first, still with gains
            and biases of the size of the last. Maps `(batch, channels, height, width)` are given as the view
            `movedim(1, -1)`; over samples they are not rearranged, and y lies in memory as x does.

    Raises:
        `ValueError`: for shapes that do not fit, arguments out of range, and a backend that cannot run on the tensors.

    Example:

    ```python
    >>> import torch
    >>> from hf_rskip import rskip_layer_norm

    >>> x, branch = torch.randn(2, 4, 10, 16)
    >>> y = rskip_layer_norm(x, branch, torch.ones(3, 16), torch.zeros(3, 16), recursions=3)
    >>> y.shape
    torch.Size([4, 10, 16])

    ```
    """
    return _rskip(x, branch, weight, bias, recursions, affine, True, eps, scale, dropout, seed, backend, axes)


def rskip_rms_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor | None = None,
    recursions: int = 2,
    affine: str = "per_step",
    eps: float = 1e-5,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    backend: str = "auto",
    axes: str = "channels",
) -> torch.Tensor:
    """[`rskip_layer_norm`] with root-mean-square normalisation: no centring, and no argument `bias`."""
    return _rskip(x, branch, weight, None, recursions, affine, False, eps, scale, dropout, seed, backend, axes)


def _rskip(x, branch, weight, bias, recursions, affine, centred, eps, scale, dropout, seed, backend, axes):
    _check(x, branch, weight, bias, recursions, affine, dropout, seed, backend, axes)
    if backend == "auto":
        backend = choose_backend(x, branch, recursions, affine, axes, seeded=seed is not None)
    # Of their gradients rounding alone is left, which the other implementations multiply from step to step.
    if scale == 0 or (x.shape[1:].numel() if axes == "sample" else x.shape[-1]) <= 1:
        backend = "reference"
    if dropout and (backend == "reference" or axes == "sample"):
        if seed is None:
            branch = F.dropout(branch, dropout)  # faster than a mask from a seed
        else:
            branch = (branch * keep_factors(seed, dropout, branch)).to(branch.dtype)
    elif dropout and seed is None:
        seed = draw_seed(x.device)
    if backend == "reference":
        return _reference(x, branch, weight, bias, recursions, affine, centred, eps, scale, axes)
    if _is_transformed():
        raise ValueError(
            f"backend={backend!r} has no rule for torch.func and forward-mode derivatives: use backend='reference'"
        )
    size, rows = x.shape[-1], recursions if affine == "per_step" else 1
    weight = x.new_ones(rows, size, dtype=torch.float32) if weight is None else weight.reshape(rows, size)
    bias = torch.zeros_like(weight) if bias is None else bias.reshape(rows, size)
    dtype = torch.promote_types(x.dtype, branch.dtype)
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.promote_types(dtype, torch.float32)  # as layer normalisation there
    if axes == "sample":
        operators = OPERATORS if backend == "recompute" else _operator(backend, x, branch, axes)
        return rskip_over_maps(x, branch, weight, bias, recursions, affine, centred, eps, scale, dtype, operators)
    closed = affine == "last" and recursions > 1
    arguments = (seed, recursions, closed, centred, eps, scale, dropout, dtype)
    if backend == "recompute":
        return RecomputedRSkip.apply(x, branch, weight, bias, *arguments, (-1,))
    operator = _operator(backend, x, branch, axes)
    flat = (tensor.reshape(-1, size).contiguous() for tensor in (x, branch))
    y, _ = operator(*flat, weight.contiguous(), bias.contiguous(), *arguments)
    return y.view(x.shape)


def _check(x, branch, weight, bias, recursions, affine, dropout, seed, backend, axes):
    if axes not in AXES:
        raise ValueError(f"`axes` must be one of {', '.join(AXES)}, not {axes!r}")
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if affine not in AFFINES:
        raise ValueError(f"`affine` must be one of {', '.join(AFFINES)}, not {affine!r}")
    if not isinstance(recursions, int) or recursions < 1:
        raise ValueError(f"`recursions` must be an integer of at least 1, not {recursions!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must be at least 0 and less than 1, not {dropout!r}")
    if seed is not None and (not torch.is_tensor(seed) or seed.dtype != torch.int64 or seed.dim()):
        raise ValueError(f"`seed` must be an int64 tensor of shape `()`, such as `torch.tensor(1)`, not {seed!r}")
    if not x.shape or x.shape != branch.shape:
        raise ValueError(f"`x` and `branch` must have one shape `(..., size)`, not {[*x.shape]} and {[*branch.shape]}")
    if axes == "sample" and x.dim() < 2:
        raise ValueError(f"`x` must have a shape `(batch, ..., size)` for axes='sample', not {[*x.shape]}")
    rows, size = recursions if affine == "per_step" else 1, x.shape[-1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        one, several = tensor.dim() == 1 and rows == 1, tensor.dim() == 2 and tensor.shape[0] == rows
        if (one or several) and tensor.shape[-1] == size:
            continue
        expected = f"({rows}, {size})" + (f" or ({size},)" if rows == 1 else "")
        raise ValueError(f"`{name}` must have shape {expected}, not {tuple(tensor.shape)}")


def choose_backend(
    x: torch.Tensor,
    branch: torch.Tensor,
    recursions: int,
    affine: str,
    axes: str = "channels",
    seeded: bool = False,
) -> str:
    """What `backend="auto"` stands for: the reference, unless another one was measured to be faster.

    One recursion is left to torch, which has kernels of its own for it. Small tensors do not pay for the call, and an
    exported program is to run where there is no operator of ours. A given seed of dropout, `seeded`, makes the
    reference slow at any size.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or _is_transformed() or isinstance(x, torch.fx.Proxy):
        return "reference"
    size = x.shape[-1] if x.dim() else 0
    supported = branch.dtype in LOW_PRECISION and x.dtype in (branch.dtype, torch.float32)
    plain = not any(hasattr(tensor, "__tensor_flatten__") for tensor in (x, branch))
    seeded = seeded and axes == "channels"
    torchs_own = recursions == 1 and not seeded
    if torchs_own or x.shape != branch.shape or not supported or not plain or not 16 <= size <= 8192:
        return "reference"
    # What a call costs of itself is not shared among threads. Rows whose end does not fill a vector had .74 to .98 of
    # the reference's speed, and float16, which compilers widen value by value, .3 to .6.
    run = x.shape[1:-1].numel() if axes == "sample" and not x.is_contiguous() else size
    pays = run % 16 == 0 and torch.float16 not in (x.dtype, branch.dtype)
    pays = pays and x.numel() * recursions >= 2**21 * cpu_threads()
    worth_cpp = x.device.type == "cpu" and (seeded or pays)
    if axes == "sample":
        # Measured with one thread, forward and backward, K = 2 and 4: from 512 / K positions on 1.01 to 3.5 times the
        # reference's speed, of 49 or 64 positions down to .7. Samples of 200,704 values whose features lie side by
        # side had .92 to 1.4 of it at K = 2. No GPU has been measured.
        positions, values = x.shape[1:-1].numel(), x.shape[1:].numel()
        fits = recursions > 2 or values <= 2**17 or not x.is_contiguous()
        fused = worth_cpp and fits and positions * recursions >= 512 and has_cpp(x.dtype, branch.dtype, axes)
        return "cpp" if fused else "reference"
    # The chain keeps the K rows in registers. Compiled for an H100, up to here nothing spills, and at 16 recursions of
    # 512 features, 8 of 2048 and 2 of 8192, 40 to 256 bytes of a thread do.
    fits = affine == "last" or (recursions <= 8 and size * recursions <= 8192)
    if x.is_cuda and (seeded or x.numel() >= 2**20) and fits and has_triton():
        return "triton"
    # Measured with one thread, forward and backward, K = 2 and 4: from 64 features on 1.02 to 4.7 times the
    # reference's speed; at half as many values or 16 features down to .9 of it.
    if worth_cpp and (seeded or size >= 64) and has_cpp(x.dtype, branch.dtype):
        return "cpp"
    return "reference"


def _is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, for which operators have no rule."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result
def cpu_threads() -> int:
    return torch.get_num_threads()


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def has_cpp(x: torch.dtype, branch: torch.dtype, axes: str = "channels") -> bool:
    """Whether the operator for CPUs is or can be built; here is where that happens."""
    from .cpu import SOURCE, load
    from .maps_cpu_source import SOURCE as OF_MAPS

    return load((x, branch, torch.promote_types(x, branch)), OF_MAPS if axes == "sample" else SOURCE) is not None


@torch.compiler.assume_constant_result
def _device_of(backend: str) -> str:
    return "cpu" if backend == "cpp" or os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def _operator(backend, x, branch, axes):
    """What runs the K steps over rows; over maps, that and what computes their gradients."""
    if not (x.dtype in LOW_PRECISION and branch.dtype in LOW_PRECISION):
        raise ValueError(f"backend={backend!r} takes float32, bfloat16 and float16, not {x.dtype} and {branch.dtype}")
    device = _device_of(backend)
    if x.device.type != device:
        raise ValueError(f"backend={backend!r} runs on {device}, and x is on {x.device.type}")
    if backend == "cpp":
        if not has_cpp(x.dtype, branch.dtype, axes):
            raise ValueError("backend='cpp' could not be built; the log says why")
        from .cpu import rskip_layer_norm
        from .maps_cpu import OPERATORS as of_maps
    else:
        if not has_triton():
            raise ValueError("backend='triton' needs the package triton")
        from .maps_triton import OPERATORS as of_maps
        from .triton import rskip_layer_norm
    return of_maps if axes == "sample" else rskip_layer_norm


def _reference(x, branch, weight, bias, recursions, affine, centred, eps, scale, axes):
    size, y = x.shape[-1], branch
    for step in range(recursions):
        gain, shift = None, None
        if affine != "last" or step == recursions - 1:
            row = step if affine == "per_step" else 0
            gain, shift = (None if tensor is None else tensor.reshape(-1, size)[row] for tensor in (weight, bias))
        y = torch.add(y, x, alpha=scale)
        if axes == "sample":
            y = sample_layer_norm(y, gain, shift, eps) if centred else sample_rms_norm(y, gain, eps)
        else:
            y = F.layer_norm(y, (size,), gain, shift, eps) if centred else F.rms_norm(y, (size,), gain, eps)
    return y
