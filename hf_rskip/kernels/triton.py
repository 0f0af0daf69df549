"""Recursive skip connections as two Triton kernels: a row stays in registers while it passes through its K steps.

The forward pass reads x and F and writes y; the backward pass reads x, F and the gradient of y and writes those of x
and F. Gradients of gains and biases are summed in float32 by each program over its rows, then over the programs:
without atomic additions every run gives the same bits.
"""

import re

import torch
from torch.library import triton_op, wrap_triton

from .autograd import register_recomputation

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs the package triton") from error


@triton.jit
def _row_mean(values, N: tl.constexpr):
    """Of the first N columns of `values`, (rows, columns), as (rows, 1)."""
    if values.shape[1] > N:
        values = tl.where(tl.arange(0, values.shape[1])[None, :] < N, values, 0.0)
    return tl.sum(values, axis=1, keep_dims=True) / N


@triton.jit
def _load_affine(pointer, step: tl.constexpr, PER_STEP: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr):
    column = tl.arange(0, SIZE)[None, :]
    row: tl.constexpr = step if PER_STEP else 0
    values = tl.load(pointer + row * N + column, mask=column < N, other=0.0, eviction_policy="evict_last")
    return values.to(tl.float32)


@triton.jit
def _keep_factors(seed_ptr, offset, dropout):
    """What `skip_dropout.keep_factors` says of the values at `offset`, int64."""
    low, high = (offset & 0xFFFFFFFF).to(tl.uint32), (offset >> 32).to(tl.uint32)
    zero = tl.zeros_like(high)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), low, high, zero, zero)
    return tl.where(tl.uint_to_uniform_float(word) >= dropout, 1 / (1 - dropout), 0.0)


@triton.jit
def _closed_form(xx, uu, xu, eps, STEPS: tl.constexpr):
    """That of `skip_kernels_autograd.py`: 1 / sigma, a and c, and their derivatives."""
    sigma = tl.sqrt(tl.maximum(tl.maximum(xx, uu), 1e-36))
    over = 1 / sigma
    xx, uu, xu = xx * over * over, tl.maximum(uu * over * over, 1e-22), xu * over * over
    a = xx * 0.0
    c = a + sigma
    a_xx, a_uu, a_xu, c_xx, c_uu, c_xu = a, a, a, a, a, a
    for step in tl.static_range(STEPS):
        if step > 0:
            a += sigma
        variance = a * a * xx + c * c * uu + 2 * a * c * xu
        variance = tl.where(variance < 0, 0.0, variance)  # which a maximum would make of NaN
        rstd = tl.rsqrt(variance + eps)
        by_a, by_c, factor = 2 * (a * xx + c * xu), 2 * (c * uu + a * xu), -0.5 * rstd * rstd * rstd
        r_xx = factor * (a * a + by_a * a_xx + by_c * c_xx)
        r_uu = factor * (c * c + by_a * a_uu + by_c * c_uu)
        r_xu = factor * (2 * a * c + by_a * a_xu + by_c * c_xu)
        a_xx, a_uu, a_xu = a_xx * rstd + a * r_xx, a_uu * rstd + a * r_uu, a_xu * rstd + a * r_xu
        c_xx, c_uu, c_xu = c_xx * rstd + c * r_xx, c_uu * rstd + c * r_uu, c_xu * rstd + c * r_xu
        a, c = a * rstd, c * rstd
    return over, a, c, a_xx, a_uu, a_xu, c_xx, c_uu, c_xu


@triton.jit
def forward_kernel(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, stats_ptr, rows, eps, scale, dropout,
    N: tl.constexpr, STEPS: tl.constexpr, PER_STEP: tl.constexpr, CLOSED: tl.constexpr, CENTRED: tl.constexpr,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of N values a program; `SIZE` is N or the next power of two."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, SIZE)[None, :]
    real = row < rows
    mask = real & (column < N)
    offset = row * N + column
    x = tl.load(x_ptr + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32) * scale
    y = tl.load(branch_ptr + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if DROPOUT:
        y *= _keep_factors(seed_ptr, offset, dropout)
    if CLOSED:
        u = x + y
        mean_x, mean_u = tl.zeros((ROWS, 1), tl.float32), tl.zeros((ROWS, 1), tl.float32)
        if CENTRED:
            mean_x, mean_u = _row_mean(x, N), _row_mean(u, N)
            x, u = x - mean_x, u - mean_u
        xx, uu, xu = _row_mean(x * x, N), _row_mean(u * u, N), _row_mean(x * u, N)
        rounding: tl.constexpr = 2.0**-44  # squared: what it leaves of a row that is constant
        xx, uu = tl.maximum(xx, rounding * mean_x * mean_x), tl.maximum(uu, rounding * mean_u * mean_u)
        over, a, c, _, _, _, _, _, _ = _closed_form(xx, uu, xu, eps, STEPS)
        gain = _load_affine(weight_ptr, 0, PER_STEP, N, SIZE)
        y = (a * (over * x) + c * (over * u)) * gain + _load_affine(bias_ptr, 0, PER_STEP, N, SIZE)
        to_stats = stats_ptr + row * 5
        tl.store(to_stats, mean_x, mask=real)
        tl.store(to_stats + 1, mean_u, mask=real)
        tl.store(to_stats + 2, xx, mask=real)
        tl.store(to_stats + 3, uu, mask=real)
        tl.store(to_stats + 4, xu, mask=real)
    else:
        for step in tl.static_range(STEPS):
            gain = _load_affine(weight_ptr, step, PER_STEP, N, SIZE)
            shift = _load_affine(bias_ptr, step, PER_STEP, N, SIZE)
            y += x
            mean = _row_mean(y, N) if CENTRED else tl.zeros((ROWS, 1), tl.float32)
            y -= mean
            rstd = tl.rsqrt(_row_mean(y * y, N) + eps)
            y = y * rstd * gain + shift
            to_stats = stats_ptr + (row * STEPS + step) * 2
            tl.store(to_stats, mean, mask=real)
            tl.store(to_stats + 1, rstd, mask=real)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def closed_form_kernel(stats_ptr, to_ptr, rows, eps, STEPS: tl.constexpr, ROWS: tl.constexpr):
    """What the closed form makes of each row's variances and covariance, computed by one thread a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    of_row = stats_ptr + row * 5
    xx, uu = tl.load(of_row + 2, mask=real, other=1.0), tl.load(of_row + 3, mask=real, other=1.0)
    found = _closed_form(xx, uu, tl.load(of_row + 4, mask=real, other=0.0), eps, STEPS)
    for index in tl.static_range(9):
        tl.store(to_ptr + row * 9 + index, found[index], mask=real)


@triton.jit
def backward_kernel(
    gradient_ptr, x_ptr, branch_ptr, weight_ptr, bias_ptr, seed_ptr, stats_ptr, closed_ptr,
    grad_x_ptr, grad_branch_ptr, partial_ptr, rows, scale, dropout,
    N: tl.constexpr, STEPS: tl.constexpr, PER_STEP: tl.constexpr, CLOSED: tl.constexpr, CENTRED: tl.constexpr,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Each program takes every `programs`-th block of `ROWS` rows; `partial_ptr` is (programs, 2, affine rows, N).

    The gradients of gains and biases are summed over rows where their terms lie, so that nothing moves between threads.
    """
    AFFINE: tl.constexpr = STEPS if PER_STEP else 1
    column = tl.arange(0, SIZE)[None, :]
    grad_weight = ()
    grad_bias = ()
    for _ in tl.static_range(AFFINE):
        grad_weight = grad_weight + (tl.zeros((ROWS, SIZE), tl.float32),)
        grad_bias = grad_bias + (tl.zeros((ROWS, SIZE), tl.float32),)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = ((tl.zeros((ROWS,), tl.int64) + block) * ROWS + tl.arange(0, ROWS))[:, None]
        real = row < rows
        mask = real & (column < N)
        offset = row * N + column
        x = tl.load(x_ptr + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32) * scale
        u = tl.load(branch_ptr + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        up = tl.load(gradient_ptr + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if DROPOUT:
            factors = _keep_factors(seed_ptr, offset, dropout)
            u *= factors
        u += x
        if CLOSED:
            of_row = closed_ptr + row * 9
            over = tl.load(of_row, mask=real, other=0.0)
            a, c = tl.load(of_row + 1, mask=real, other=0.0), tl.load(of_row + 2, mask=real, other=0.0)
            a_xx, c_xx = tl.load(of_row + 3, mask=real, other=0.0), tl.load(of_row + 6, mask=real, other=0.0)
            a_uu, c_uu = tl.load(of_row + 4, mask=real, other=0.0), tl.load(of_row + 7, mask=real, other=0.0)
            a_xu, c_xu = tl.load(of_row + 5, mask=real, other=0.0), tl.load(of_row + 8, mask=real, other=0.0)
            x = over * (x - tl.load(stats_ptr + row * 5, mask=real, other=0.0))
            u = over * (u - tl.load(stats_ptr + row * 5 + 1, mask=real, other=0.0))
            grad_weight = (grad_weight[0] + up * (a * x + c * u),)
            grad_bias = (grad_bias[0] + up,)
            up *= _load_affine(weight_ptr, 0, PER_STEP, N, SIZE)
            by_x, by_u = _row_mean(up * x, N), _row_mean(up * u, N)
            by_xx, by_uu, by_xu = by_x * a_xx + by_u * c_xx, by_x * a_uu + by_u * c_uu, by_x * a_xu + by_u * c_xu
            if CENTRED:
                up -= _row_mean(up, N)
            grad_u = over * (c * up + 2 * by_uu * u + by_xu * x)
            grad_x = over * (a * up + 2 * by_xx * x + by_xu * u) + grad_u
        else:
            of_row = stats_ptr + row * (2 * STEPS)
            normalized = ()
            for step in tl.static_range(STEPS):
                mean = tl.load(of_row + 2 * step, mask=real, other=0.0)
                rstd = tl.load(of_row + 2 * step + 1, mask=real, other=0.0)
                if step > 0:
                    gain = _load_affine(weight_ptr, step - 1, PER_STEP, N, SIZE)
                    u = x + (normalized[step - 1] * gain + _load_affine(bias_ptr, step - 1, PER_STEP, N, SIZE))
                normalized = normalized + ((u - mean) * rstd,)
            grad_u = up
            grad_x = tl.zeros((ROWS, SIZE), tl.float32)
            new_weight = ()
            new_bias = ()
            for step in tl.static_range(STEPS - 1, -1, -1):
                y = normalized[step]
                if PER_STEP:
                    new_weight = (grad_weight[step] + grad_u * y,) + new_weight
                    new_bias = (grad_bias[step] + grad_u,) + new_bias
                else:
                    grad_weight = (grad_weight[0] + grad_u * y,)
                    grad_bias = (grad_bias[0] + grad_u,)
                grad_u *= _load_affine(weight_ptr, step, PER_STEP, N, SIZE)
                of_std = _row_mean(grad_u * y, N)
                if CENTRED:
                    grad_u -= _row_mean(grad_u, N)
                grad_u = tl.load(of_row + 2 * step + 1, mask=real, other=0.0) * (grad_u - y * of_std)
                grad_x += grad_u
            if PER_STEP:
                grad_weight, grad_bias = new_weight, new_bias
        if DROPOUT:
            grad_u *= factors
        tl.store(grad_branch_ptr + offset, grad_u.to(grad_branch_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_x_ptr + offset, (scale * grad_x).to(grad_x_ptr.dtype.element_ty), mask=mask)
    for step in tl.static_range(AFFINE):
        to_weight = partial_ptr + (tl.program_id(0).to(tl.int64) * 2 * AFFINE + step) * N + column
        tl.store(to_weight, tl.sum(grad_weight[step], axis=0, keep_dims=True), mask=column < N)
        tl.store(to_weight + AFFINE * N, tl.sum(grad_bias[step], axis=0, keep_dims=True), mask=column < N)


def forward_options(size: int) -> dict[str, int]:
    """Rows a program and warps for rows of `size` values: 8 values a thread, which are 16 bytes of bfloat16."""
    padded = _padded(size)
    return {"ROWS": max(1, 512 // padded), "SIZE": padded, "num_warps": min(16, max(2, padded // 256))}


def backward_options(size: int) -> dict[str, int]:
    """The same for the other kernel: 4 values a thread, so that those of bfloat16 and of float32 lie alike."""
    padded = _padded(size)
    return {"ROWS": max(1, 512 // padded), "SIZE": padded, "num_warps": min(16, max(4, padded // 128))}


def _padded(size):
    return max(16, triton.next_power_of_2(size))


_NAMESPACE = re.sub(r"\W", "_", __name__)  # a copy of this file that came with a checkpoint has operators of its own


@triton_op(f"{_NAMESPACE}::rskip_layer_norm", mutates_args={})
def rskip_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    recursions: int,
    closed: bool,
    centred: bool,
    eps: float,
    scale: float,
    dropout: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = x.shape
    y = torch.empty_like(x, dtype=dtype)
    stats = x.new_empty(rows, 5 if closed else 2 * recursions, dtype=torch.float32)
    options = forward_options(size)
    if rows > 0:
        wrap_triton(forward_kernel)[(triton.cdiv(rows, options["ROWS"]),)](
            x, branch, weight, bias, stats if seed is None else seed, y, stats, rows, eps, scale, dropout, N=size,
            STEPS=recursions, PER_STEP=weight.shape[0] > 1, CLOSED=closed, CENTRED=centred, DROPOUT=dropout > 0,
            **options,
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
    seed: torch.Tensor | None,
    recursions: int,
    closed: bool,
    centred: bool,
    eps: float,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, size = x.shape
    grad_x, grad_branch = torch.empty_like(x), torch.empty_like(branch)
    if rows == 0:
        return grad_x, grad_branch, torch.zeros_like(weight), torch.zeros_like(bias)
    coefficients = stats  # unused
    if closed:
        coefficients = x.new_empty(rows, 9, dtype=torch.float32)
        wrap_triton(closed_form_kernel)[(triton.cdiv(rows, 128),)](
            stats, coefficients, rows, eps, STEPS=recursions, ROWS=128, num_warps=4
        )
    options = backward_options(size)
    programs = _programs(rows, options, _multiprocessors(x))
    partial = x.new_empty(programs, 2, *weight.shape, dtype=torch.float32)
    wrap_triton(backward_kernel)[(programs,)](
        gradient.contiguous(), x, branch, weight, bias, stats if seed is None else seed, stats, coefficients,
        grad_x, grad_branch, partial, rows, scale, dropout, N=size, STEPS=recursions,
        PER_STEP=weight.shape[0] > 1, CLOSED=closed, CENTRED=centred, DROPOUT=dropout > 0, **options,
    )  # fmt: skip
    grad_weight, grad_bias = partial.sum(0).unbind(0)
    return grad_x, grad_branch, grad_weight.to(weight.dtype, copy=True), grad_bias.to(bias.dtype, copy=True)


def _programs(rows: int, options: dict[str, int], multiprocessors: int) -> int:
    """16 warps a multiprocessor; fewer for few rows, as each program writes sums of its own, but none idle."""
    most, blocks = 16 // options["num_warps"] * multiprocessors, triton.cdiv(rows, options["ROWS"])
    return torch.sym_min(blocks, torch.sym_max(multiprocessors, torch.sym_min(most, rows // 32)))


def _multiprocessors(x: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


register_recomputation(rskip_layer_norm, rskip_layer_norm_backward)
