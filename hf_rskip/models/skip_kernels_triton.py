"""Recursive skip connections as two Triton kernels: a row stays in registers while it passes through its K steps.

The forward pass reads x and F and writes y; the backward pass reads x, F and the gradient of y and writes those of x
and F. Gradients of gains and biases are summed in float32 by each program over its rows, then over the programs:
without atomic additions every run gives the same bits.
"""

import re

import torch
from torch.library import triton_op, wrap_triton

from .skip_kernels_autograd import register_recomputation

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs the package triton") from error


@triton.jit
def _row_mean(values, mask, n):
    return tl.sum(tl.where(mask, values, 0.0), axis=1)[:, None] / n


@triton.jit
def _closed_form(xx, uu, xu, eps, STEPS: tl.constexpr):
    """a and c of y_K = a x + c u, and their derivatives by the variances xx and uu and the covariance xu."""
    a = xx * 0.0
    c = a + 1.0
    a_xx, a_uu, a_xu, c_xx, c_uu, c_xu = a, a, a, a, a, a
    for step in tl.static_range(STEPS):
        if step > 0:
            a += 1.0
        variance = tl.maximum(a * a * xx + c * c * uu + 2 * a * c * xu, 0.0)
        rstd = 1 / tl.sqrt(variance + eps)
        by_a, by_c, factor = 2 * (a * xx + c * xu), 2 * (c * uu + a * xu), -0.5 * rstd * rstd * rstd
        r_xx = factor * (a * a + by_a * a_xx + by_c * c_xx)
        r_uu = factor * (c * c + by_a * a_uu + by_c * c_uu)
        r_xu = factor * (2 * a * c + by_a * a_xu + by_c * c_xu)
        a_xx, a_uu, a_xu = a_xx * rstd + a * r_xx, a_uu * rstd + a * r_uu, a_xu * rstd + a * r_xu
        c_xx, c_uu, c_xu = c_xx * rstd + c * r_xx, c_uu * rstd + c * r_uu, c_xu * rstd + c * r_xu
        a, c = a * rstd, c * rstd
    return a, c, a_xx, a_uu, a_xu, c_xx, c_uu, c_xu


@triton.jit
def forward_kernel(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, y_ptr, stats_ptr, rows, n, eps, scale,
    STEPS: tl.constexpr, PER_STEP: tl.constexpr, CLOSED: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows a program, `SIZE` at least n."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, SIZE)[None, :]
    mask = (row < rows) & (column < n)
    offset = row * n + column
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) * scale
    y = tl.load(branch_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if CLOSED:
        u = x + y
        mean_x, mean_u = _row_mean(x, mask, n), _row_mean(u, mask, n)
        x, u = tl.where(mask, x - mean_x, 0.0), tl.where(mask, u - mean_u, 0.0)
        xx, uu, xu = _row_mean(x * x, mask, n), _row_mean(u * u, mask, n), _row_mean(x * u, mask, n)
        rounding: tl.constexpr = 2.0**-44  # squared: what it leaves of a row that is constant
        xx, uu = tl.maximum(xx, rounding * mean_x * mean_x), tl.maximum(uu, rounding * mean_u * mean_u)
        a, c, _, _, _, _, _, _ = _closed_form(xx, uu, xu, eps, STEPS)
        gain = tl.load(weight_ptr + column, mask=column < n, other=0.0).to(tl.float32)
        shift = tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)
        y = (a * x + c * u) * gain + shift
        to_stats = stats_ptr + row * 5
        tl.store(to_stats, mean_x, mask=row < rows)
        tl.store(to_stats + 1, mean_u, mask=row < rows)
        tl.store(to_stats + 2, xx, mask=row < rows)
        tl.store(to_stats + 3, uu, mask=row < rows)
        tl.store(to_stats + 4, xu, mask=row < rows)
    else:
        for step in tl.static_range(STEPS):
            y += x
            mean = _row_mean(y, mask, n)
            y = tl.where(mask, y - mean, 0.0)
            rstd = 1 / tl.sqrt(_row_mean(y * y, mask, n) + eps)
            affine = (step if PER_STEP else 0) * n + column
            gain = tl.load(weight_ptr + affine, mask=column < n, other=0.0).to(tl.float32)
            shift = tl.load(bias_ptr + affine, mask=column < n, other=0.0).to(tl.float32)
            y = y * rstd * gain + shift
            tl.store(stats_ptr + (row * STEPS + step) * 2, mean, mask=row < rows)
            tl.store(stats_ptr + (row * STEPS + step) * 2 + 1, rstd, mask=row < rows)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    gradient_ptr, x_ptr, branch_ptr, weight_ptr, bias_ptr, stats_ptr, grad_x_ptr, grad_branch_ptr, partial_ptr,
    rows, n, eps, scale, blocks,
    STEPS: tl.constexpr, PER_STEP: tl.constexpr, CLOSED: tl.constexpr, AFFINE: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Each program takes `blocks` blocks of `ROWS` rows; `partial_ptr` is (programs, 2, affine rows, n).

    `AFFINE` is the number of affine rows, or the next power of two.
    """
    column = tl.arange(0, SIZE)[None, :]
    in_row = column < n
    gains = tl.arange(0, AFFINE)[:, None]
    grad_weight = tl.zeros((AFFINE, SIZE), tl.float32)
    grad_bias = tl.zeros((AFFINE, SIZE), tl.float32)
    for block in range(blocks):
        row = ((tl.program_id(0).to(tl.int64) * blocks + block) * ROWS + tl.arange(0, ROWS))[:, None]
        real = row < rows
        mask = real & in_row
        offset = row * n + column
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) * scale
        u = x + tl.load(branch_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gradient_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if CLOSED:
            of_row = stats_ptr + row * 5
            x = tl.where(mask, x - tl.load(of_row, mask=real, other=0.0), 0.0)
            u = tl.where(mask, u - tl.load(of_row + 1, mask=real, other=0.0), 0.0)
            xx = tl.load(of_row + 2, mask=real, other=1.0)
            uu = tl.load(of_row + 3, mask=real, other=1.0)
            xu = tl.load(of_row + 4, mask=real, other=0.0)
            a, c, a_xx, a_uu, a_xu, c_xx, c_uu, c_xu = _closed_form(xx, uu, xu, eps, STEPS)
            grad_weight += tl.sum(up * (a * x + c * u), axis=0)[None, :]
            grad_bias += tl.sum(up, axis=0)[None, :]
            up = up * tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
            by_x, by_u, mean = _row_mean(up * x, mask, n), _row_mean(up * u, mask, n), _row_mean(up, mask, n)
            by_xx, by_uu, by_xu = by_x * a_xx + by_u * c_xx, by_x * a_uu + by_u * c_uu, by_x * a_xu + by_u * c_xu
            up = up - mean
            grad_u = c * up + 2 * by_uu * u + by_xu * x
            grad_x = a * up + 2 * by_xx * x + by_xu * u + grad_u
        else:
            # The chain forwards, down to the input of the last step; its steps are rebuilt one by one on the way back.
            grad_u = up
            grad_x = tl.zeros((ROWS, SIZE), tl.float32)
            for last in tl.static_range(STEPS - 1, -1, -1):
                of_row = stats_ptr + row * (2 * STEPS)
                h = (u - tl.load(of_row, mask=real, other=0.0)) * tl.load(of_row + 1, mask=real, other=0.0)
                for step in tl.static_range(last):
                    affine = (step if PER_STEP else 0) * n + column
                    gain = tl.load(weight_ptr + affine, mask=in_row, other=0.0).to(tl.float32)
                    shift = tl.load(bias_ptr + affine, mask=in_row, other=0.0).to(tl.float32)
                    mean = tl.load(of_row + 2 * step + 2, mask=real, other=0.0)
                    rstd = tl.load(of_row + 2 * step + 3, mask=real, other=0.0)
                    h = (x + (h * gain + shift) - mean) * rstd
                h = tl.where(mask, h, 0.0)
                grad_weight += tl.where(gains == (last if PER_STEP else 0), tl.sum(grad_u * h, axis=0)[None, :], 0.0)
                grad_bias += tl.where(gains == (last if PER_STEP else 0), tl.sum(grad_u, axis=0)[None, :], 0.0)
                gain = tl.load(weight_ptr + (last if PER_STEP else 0) * n + column, mask=in_row, other=0.0).to(
                    tl.float32
                )
                grad_u = grad_u * gain
                mean, std = _row_mean(grad_u, mask, n), _row_mean(grad_u * h, mask, n)
                rstd = tl.load(of_row + 2 * last + 1, mask=real, other=0.0)
                grad_u = tl.where(mask, rstd * (grad_u - mean - h * std), 0.0)
                grad_x += grad_u
        tl.store(grad_branch_ptr + offset, grad_u.to(grad_branch_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_x_ptr + offset, (scale * grad_x).to(grad_x_ptr.dtype.element_ty), mask=mask)
    affine_rows = STEPS if PER_STEP else 1
    to_weight = partial_ptr + (tl.program_id(0).to(tl.int64) * 2 * affine_rows + gains) * n + column
    tl.store(to_weight, grad_weight, mask=in_row & (gains < affine_rows))
    tl.store(to_weight + affine_rows * n, grad_bias, mask=in_row & (gains < affine_rows))


def launch_options(size: int) -> dict[str, int]:
    """Rows a program and warps for rows of `size` values: 4 warps hold one row of 512, 8 a row of 1024."""
    padded = 1 << max(size - 1, 15).bit_length()
    return {"ROWS": max(1, 512 // padded), "SIZE": padded, "num_warps": min(16, max(4, padded // 128))}


_NAMESPACE = re.sub(r"\W", "_", __name__)  # a copy of this file that came with a checkpoint has operators of its own


@triton_op(f"{_NAMESPACE}::rskip_layer_norm", mutates_args={})
def rskip_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    recursions: int,
    closed: bool,
    eps: float,
    scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = x.shape
    y = torch.empty_like(x, dtype=dtype)
    stats = x.new_empty(rows, 5 if closed else 2 * recursions, dtype=torch.float32)
    options = launch_options(size)
    if rows > 0:
        wrap_triton(forward_kernel)[(triton.cdiv(rows, options["ROWS"]),)](
            x, branch, weight, bias, y, stats, rows, size, eps, scale,
            STEPS=recursions, PER_STEP=weight.shape[0] > 1, CLOSED=closed, **options,
        )  # fmt: skip
    return y, stats


@triton_op(f"{_NAMESPACE}::rskip_layer_norm_backward", mutates_args={})
def rskip_layer_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stats: torch.Tensor,
    recursions: int,
    closed: bool,
    eps: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, size = x.shape
    options = launch_options(size)
    grad_x, grad_branch = torch.empty_like(x), torch.empty_like(branch)
    if rows == 0:
        return grad_x, grad_branch, torch.zeros_like(weight), torch.zeros_like(bias)
    blocks = triton.cdiv(triton.cdiv(rows, options["ROWS"]), 2 * _multiprocessors(x))
    programs = triton.cdiv(rows, options["ROWS"] * blocks)
    partial = x.new_empty(programs, 2, *weight.shape, dtype=torch.float32)
    wrap_triton(backward_kernel)[(programs,)](
        gradient.contiguous(), x, branch, weight, bias, stats, grad_x, grad_branch, partial,
        rows, size, eps, scale, blocks,
        STEPS=recursions, PER_STEP=weight.shape[0] > 1, CLOSED=closed,
        AFFINE=triton.next_power_of_2(weight.shape[0]), **options,
    )  # fmt: skip
    grad_weight, grad_bias = partial.sum(0).unbind(0)
    return grad_x, grad_branch, grad_weight.to(weight.dtype, copy=True), grad_bias.to(bias.dtype, copy=True)


def _multiprocessors(x: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


register_recomputation(rskip_layer_norm, rskip_layer_norm_backward)
