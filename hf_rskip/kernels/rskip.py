"""Recursive skip connections as one function, with several implementations: see `README.md` in this folder.

y_1 = LN(x + F), y_k = LN(x + y_{k-1}), output y_K. LN goes over the features of each position (`axes="channels"`) or,
for feature maps, over whole samples (`axes="sample"`).
"""

from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

from ..models.skip_connections import AFFINES
from .cpu import load
from .maps import closed_form_over_maps
from .operators import forward
from .reference import reference

BACKENDS = {
    "channels": ("auto", "reference", "cpp"),
    "sample": ("auto", "reference", "closed_form"),
}
"""The implementations by what the norms go over: the last dimension, or all but the first (`skip_norm_axes`)."""
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def rskip_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    recursions: int = 2,
    affine: str = "per_step",
    eps: float = 1e-5,
    backend: str = "auto",
    axes: str = "channels",
) -> torch.Tensor:
    """K steps of adding x and normalising: y_1 = LN(x + F), y_k = LN(x + y_{k-1}), output y_K.

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
        backend: `"auto"`, `"reference"`, over channels `"cpp"`, over samples `"closed_form"`: see
            `hf_rskip/kernels/README.md`.
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
    _check(x, branch, {"weight": weight, "bias": bias}, recursions, affine, backend, axes)
    gains, biases = (_of_steps(rows, recursions, affine) for rows in (weight, bias))
    return run(x, branch, gains, biases, True, eps, backend, axes)


def rskip_rms_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor | None = None,
    recursions: int = 2,
    affine: str = "per_step",
    eps: float = 1e-5,
    backend: str = "auto",
    axes: str = "channels",
) -> torch.Tensor:
    """[`rskip_layer_norm`] with root-mean-square normalisation: no centring, and no argument `bias`."""
    _check(x, branch, {"weight": weight}, recursions, affine, backend, axes)
    return run(x, branch, _of_steps(weight, recursions, affine), [None] * recursions, False, eps, backend, axes)


def _check(x, branch, rows, recursions, affine, backend, axes):
    if axes not in BACKENDS:
        raise ValueError(f"`axes` must be one of {', '.join(BACKENDS)}, not {axes!r}")
    if backend not in BACKENDS[axes]:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS[axes])} for axes={axes!r}, not {backend!r}")
    if affine not in AFFINES:
        raise ValueError(f"`affine` must be one of {', '.join(AFFINES)}, not {affine!r}")
    if not isinstance(recursions, int) or recursions < 1:
        raise ValueError(f"`recursions` must be an integer of at least 1, not {recursions!r}")
    if not x.shape or x.shape != branch.shape:
        raise ValueError(f"`x` and `branch` must have one shape `(..., size)`, not {[*x.shape]} and {[*branch.shape]}")
    if axes == "sample" and x.dim() < 2:
        raise ValueError(f"`x` must have a shape `(batch, ..., size)` for axes='sample', not {[*x.shape]}")
    count, size = recursions if affine == "per_step" else 1, x.shape[-1]
    for name, tensor in rows.items():
        if tensor is None or tensor.shape == (count, size) or (count == 1 and tensor.shape == (size,)):
            continue
        expected = f"({count}, {size})" + (f" or ({size},)" if count == 1 else "")
        raise ValueError(f"`{name}` must have shape {expected}, not {tuple(tensor.shape)}")


def _of_steps(rows: torch.Tensor | None, recursions: int, affine: str) -> Sequence[torch.Tensor | None]:
    """Gain or bias of each of the K steps, `(size,)`; `None` where there is none."""
    if rows is None:
        return [None] * recursions
    rows = rows.reshape(-1, rows.shape[-1]).unbind()
    if affine == "last":
        return [*[None] * (recursions - 1), *rows]
    return rows if affine == "per_step" else [*rows] * recursions


def run(
    x: torch.Tensor,
    branch: torch.Tensor,
    gains: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None],
    centred: bool,
    eps: float,
    backend: str,
    axes: str,
) -> torch.Tensor:
    """The K steps by `backend`, without checks of shapes; gains and biases of each step are `(size,)` or `None`."""
    if backend == "auto":
        backend = choose_backend(x, branch, len(gains), axes)
    # The gradient of a row of one value is 0 up to rounding, which kernels would amplify at each step.
    if backend == "reference" or (x.shape[1:].numel() if axes == "sample" else x.shape[-1]) <= 1:
        return reference(x, branch, gains, biases, centred, eps, axes)
    if _is_transformed():
        raise ValueError(
            f"backend={backend!r} has no rule for torch.func and forward-mode derivatives: use backend='reference'"
        )
    size = x.shape[-1]
    dtype = torch.promote_types(x.dtype, branch.dtype)
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.promote_types(dtype, torch.float32)  # as layer normalisation under autocast
    weight, bias = (
        torch.stack([x.new_full((size,), neutral, dtype=torch.float32) if row is None else row for row in rows])
        for rows, neutral in ((gains, 1.0), (biases, 0.0))
    )
    if backend == "closed_form":
        return closed_form_over_maps(x, branch, weight, bias, centred, eps, dtype)
    _check_cpp(x, branch)
    rows = (tensor.reshape(-1, size).contiguous() for tensor in (x, branch))
    y, _ = forward(*rows, weight, bias, centred, eps, dtype)
    return y.view(x.shape)


def _check_cpp(x, branch):
    if not (x.dtype in PRECISIONS and branch.dtype in PRECISIONS):
        raise ValueError(f"backend='cpp' takes float32, bfloat16 and float16, not {x.dtype} and {branch.dtype}")
    if x.device.type != "cpu":
        raise ValueError(f"backend='cpp' runs on cpu, and x is on {x.device.type}")
    if not has_cpp(x.dtype, branch.dtype):
        raise ValueError("backend='cpp' could not be built; the log says why")


def choose_backend(x: torch.Tensor, branch: torch.Tensor, recursions: int, axes: str = "channels") -> str:
    """Chooses the backend of `backend="auto"`: the reference, unless another one was measured to be faster.

    One recursion is left to torch, which has kernels of its own for it. Small tensors do not pay for the call, and an
    exported program is to run where there is no operator of ours.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or _is_transformed() or isinstance(x, torch.fx.Proxy):
        return "reference"
    size = x.shape[-1] if x.dim() else 0
    supported = branch.dtype in PRECISIONS and x.dtype in (branch.dtype, torch.float32)
    plain = not any(hasattr(tensor, "__tensor_flatten__") for tensor in (x, branch))
    if recursions == 1 or x.shape != branch.shape or not supported or not plain or not 16 <= size <= 8192:
        return "reference"
    if axes == "sample":
        # Measured with one thread, forward and backward, on 1.6 and 2.1 million values: 1.6 to 1.8 times the speed of
        # the reference at K = 8, and .6 to .8 at K = 3 and 4; on 64 positions .7 and .4.
        pays = recursions >= 8 and x.shape[1:-1].numel() >= 512 and x.numel() >= 2**20
        return "closed_form" if x.device.type == "cpu" and pays else "reference"
    # The overhead of a call is not shared among threads. Measured with one thread, forward and backward, K = 2
    # and 4: from 64 features on 1.02 to 4.7 times the reference's speed; at half as many values or 16 features down to
    # .9 of it. Rows whose end does not fill a vector had .74 to .98 of it, and float16, which compilers widen value by
    # value, .3 to .6.
    pays = size >= 64 and size % 16 == 0 and torch.float16 not in (x.dtype, branch.dtype)
    pays = pays and x.numel() * recursions >= 2**21 * cpu_threads()
    return "cpp" if x.device.type == "cpu" and pays and has_cpp(x.dtype, branch.dtype) else "reference"


def _is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, for which operators have no rule."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


@torch.compiler.assume_constant_result
def cpu_threads() -> int:
    return torch.get_num_threads()


@torch.compiler.assume_constant_result
def has_cpp(x: torch.dtype, branch: torch.dtype) -> bool:
    """Whether the kernel for CPUs exists; builds it at the first call."""
    return load((x, branch, torch.promote_types(x, branch))) is not None
