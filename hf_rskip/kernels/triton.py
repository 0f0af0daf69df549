"""Two Triton kernels: a row stays in registers while it passes through its K steps.

The forward pass reads x and F and writes y; the backward pass reads x, F and the gradient of y and writes those of x
and F. Gradients of gains and biases are summed in float32 by each program over its rows, then over the programs:
without atomic additions every run gives the same bits.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs the package triton") from error


@triton.jit
def _row_mean(values, N: tl.constexpr):
    """Mean of the first N columns of `values`, (rows, columns), as (rows, 1)."""
    if values.shape[1] > N:
        values = tl.where(tl.arange(0, values.shape[1])[None, :] < N, values, 0.0)
    return tl.sum(values, axis=1, keep_dims=True) / N


@triton.jit
def _load_affine(pointer, step: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr):
    column = tl.arange(0, SIZE)[None, :]
    values = tl.load(pointer + step * N + column, mask=column < N, other=0.0, eviction_policy="evict_last")
    return values.to(tl.float32)


@triton.jit
def _load_once(pointer, offset, mask):
    return tl.load(pointer + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def forward_kernel(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, y_ptr, stats_ptr, rows, eps,
    N: tl.constexpr, STEPS: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of N values a program; `SIZE` is N or the next power of two. Statistics of a row are mean and 1 / std
    of each step, and two numbers that stay unused here."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, SIZE)[None, :]
    real = row < rows
    mask = real & (column < N)
    offset = row * N + column
    x, y = _load_once(x_ptr, offset, mask), _load_once(branch_ptr, offset, mask)
    for step in tl.static_range(STEPS):
        y += x
        mean = _row_mean(y, N) if CENTRED else tl.zeros((ROWS, 1), tl.float32)
        y -= mean
        rstd = tl.rsqrt(_row_mean(y * y, N) + eps)
        y = y * rstd * _load_affine(weight_ptr, step, N, SIZE) + _load_affine(bias_ptr, step, N, SIZE)
        to_stats = stats_ptr + row * (2 * STEPS + 2) + 2 * step
        tl.store(to_stats, mean, mask=real)
        tl.store(to_stats + 1, rstd, mask=real)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    gradient_ptr, x_ptr, branch_ptr, weight_ptr, bias_ptr, stats_ptr, grad_x_ptr, grad_branch_ptr, partial_ptr, rows,
    N: tl.constexpr, STEPS: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Each program takes every `programs`-th block of `ROWS` rows; `partial_ptr` is (programs, 2, STEPS, N).

    The gradients of gains and biases are summed over rows where their terms lie, so that nothing moves between threads.
    """
    column = tl.arange(0, SIZE)[None, :]
    grad_weight = ()
    grad_bias = ()
    for _ in tl.static_range(STEPS):
        grad_weight = grad_weight + (tl.zeros((ROWS, SIZE), tl.float32),)
        grad_bias = grad_bias + (tl.zeros((ROWS, SIZE), tl.float32),)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = ((tl.zeros((ROWS,), tl.int64) + block) * ROWS + tl.arange(0, ROWS))[:, None]
        real = row < rows
        mask = real & (column < N)
        offset = row * N + column
        x, u = _load_once(x_ptr, offset, mask), _load_once(branch_ptr, offset, mask)
        up = _load_once(gradient_ptr, offset, mask)
        u += x
        of_row = stats_ptr + row * (2 * STEPS + 2)
        normalized = ()
        for step in tl.static_range(STEPS):
            if step > 0:
                gain, shift = _load_affine(weight_ptr, step - 1, N, SIZE), _load_affine(bias_ptr, step - 1, N, SIZE)
                u = x + (normalized[step - 1] * gain + shift)
            mean = tl.load(of_row + 2 * step, mask=real, other=0.0)
            normalized = normalized + ((u - mean) * tl.load(of_row + 2 * step + 1, mask=real, other=0.0),)
        grad_x = tl.zeros((ROWS, SIZE), tl.float32)
        new_weight = ()
        new_bias = ()
        for step in tl.static_range(STEPS - 1, -1, -1):
            y = normalized[step]
            new_weight = (grad_weight[step] + up * y,) + new_weight
            new_bias = (grad_bias[step] + up,) + new_bias
            up *= _load_affine(weight_ptr, step, N, SIZE)
            of_std = _row_mean(up * y, N)
            if CENTRED:
                up -= _row_mean(up, N)
            up = tl.load(of_row + 2 * step + 1, mask=real, other=0.0) * (up - y * of_std)
            grad_x += up
        grad_weight, grad_bias = new_weight, new_bias
        tl.store(grad_branch_ptr + offset, up.to(grad_branch_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    for step in tl.static_range(STEPS):
        to_weight = partial_ptr + (tl.program_id(0).to(tl.int64) * 2 * STEPS + step) * N + column
        tl.store(to_weight, tl.sum(grad_weight[step], axis=0, keep_dims=True), mask=column < N)
        tl.store(to_weight + STEPS * N, tl.sum(grad_bias[step], axis=0, keep_dims=True), mask=column < N)


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


def forward(x, branch, weight, bias, centred, eps, dtype):
    """The kernel of [`operators.forward`]."""
    (rows, size), steps = x.shape, len(weight)
    y, stats = torch.empty_like(x, dtype=dtype), x.new_empty(rows, 2 * steps + 2, dtype=torch.float32)
    options = forward_options(size)
    if rows > 0:
        forward_kernel[(triton.cdiv(rows, options["ROWS"]),)](
            x, branch, weight, bias, y, stats, rows, eps, N=size, STEPS=steps, CENTRED=centred, **options
        )
    return y, stats


def backward(gradient, x, branch, weight, bias, stats, centred, eps):
    """The kernel of [`operators.backward`]; eps is part of the statistics."""
    (rows, size), steps = x.shape, len(weight)
    grad_x, grad_branch = torch.empty_like(x), torch.empty_like(branch)
    if rows == 0:
        return grad_x, grad_branch, torch.zeros_like(weight), torch.zeros_like(bias)
    options = backward_options(size)
    programs = _programs(rows, options, x.device)
    partial = x.new_empty(programs, 2, steps, size, dtype=torch.float32)
    backward_kernel[(programs,)](
        gradient, x, branch, weight, bias, stats, grad_x, grad_branch, partial, rows,
        N=size, STEPS=steps, CENTRED=centred, **options,
    )  # fmt: skip
    grad_weight, grad_bias = partial.sum(0)
    return grad_x, grad_branch, grad_weight.to(weight.dtype, copy=True), grad_bias.to(bias.dtype, copy=True)


def _programs(rows: int, options: dict[str, int], device: torch.device) -> int:
    """16 warps a multiprocessor; fewer for few rows, as each program writes sums of its own, but none idle."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    most = 16 // options["num_warps"] * multiprocessors
    return min(triton.cdiv(rows, options["ROWS"]), max(multiprocessors, min(most, rows // 32)))
