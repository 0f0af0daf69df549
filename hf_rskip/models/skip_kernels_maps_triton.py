"""Recursive skip connections over whole maps as Triton kernels: two passes over tiles of the maps, and between them
what the K steps make of each sample's numbers, which one program a sample works out in float64.

Each tile leaves sums of its own, which the program of the sample adds in their order: without atomic additions every
run gives the same bits.
"""

import re

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton


@triton.jit
def _tile(positions, channels, PLANES: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """The channels of a program, `(CHANNELS, 1)`, where its values lie, `(CHANNELS, TILE)`, and which of them do."""
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    position = (tl.program_id(2) * TILE + tl.arange(0, TILE))[None, :]
    offset = channel * positions + position if PLANES else position * channels + channel
    sample = tl.program_id(0).to(tl.int64) * positions * channels
    return channel, sample + offset, (channel < channels) & (position < positions)


@triton.jit
def _pair(x_ptr, branch_ptr, scale, offset, mask):
    """s x and u."""
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) * scale
    return x, x + tl.load(branch_ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _number(pointer, index: tl.constexpr, COUNT: tl.constexpr, channel, channels):
    """Number `index` of the `COUNT` that each channel of the sample has."""
    row = tl.program_id(0).to(tl.int64) * COUNT + index
    return tl.load(pointer + row * channels + channel, mask=channel < channels, other=0.0)


@triton.jit
def moments_kernel(
    x_ptr, branch_ptr, partial_ptr, positions, channels, scale,
    PLANES: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of each tile: means, and sums of squares and products about them; `(samples, tiles, 5, channels)`."""
    channel, offset, mask = _tile(positions, channels, PLANES, CHANNELS, TILE)
    x, u = _pair(x_ptr, branch_ptr, scale, offset, mask)
    count = tl.minimum(TILE, positions - tl.program_id(2) * TILE)
    mean_x, mean_u = tl.sum(x, axis=1, keep_dims=True) / count, tl.sum(u, axis=1, keep_dims=True) / count
    x, u = tl.where(mask, x - mean_x, 0.0), tl.where(mask, u - mean_u, 0.0)
    row = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * 5
    to, real = partial_ptr + row * channels + channel, channel < channels
    tl.store(to, mean_x, mask=real)
    tl.store(to + channels, mean_u, mask=real)
    tl.store(to + 2 * channels, tl.sum(x * x, axis=1, keep_dims=True), mask=real)
    tl.store(to + 3 * channels, tl.sum(u * u, axis=1, keep_dims=True), mask=real)
    tl.store(to + 4 * channels, tl.sum(x * u, axis=1, keep_dims=True), mask=real)


@triton.jit
def _chain(moments_ptr, weight_ptr, bias_ptr, states_ptr, rstd_ptr, channels, steps, eps, CENTRED, SIZE: tl.constexpr):
    """`_chain` of `skip_kernels_maps.py`; leaves what each step normalises, over its deviation, and 1 over that."""
    sample, channel = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    real = channel < channels
    e = _number(moments_ptr, 1, 5, channel, channels).to(tl.float64)
    a = tl.zeros((SIZE,), tl.float64)
    c = a + 1
    for step in range(steps):
        if step > 0:
            a += 1
            e += _number(moments_ptr, 0, 5, channel, channels)
        if CENTRED:
            e = tl.where(real, e - tl.sum(e, axis=0) / channels, 0.0)
        square = a * a * (_number(moments_ptr, 2, 5, channel, channels).to(tl.float64) + 1e-34)
        square += c * c * (_number(moments_ptr, 3, 5, channel, channels).to(tl.float64) + 1e-34)
        square += 2 * a * c * _number(moments_ptr, 4, 5, channel, channels) + e * e
        variance = tl.maximum(tl.sum(tl.where(real, square, 0.0), axis=0) / channels, 0.0)
        rstd = 1 / tl.sqrt(variance + eps)
        a, c, e = a * rstd, c * rstd, e * rstd
        to = states_ptr + (sample * steps + step) * 3 * channels + channel
        tl.store(to, a, mask=real)
        tl.store(to + channels, c, mask=real)
        tl.store(to + 2 * channels, e, mask=real)
        tl.store(rstd_ptr + sample * steps + step, rstd)
        gain = tl.load(weight_ptr + step * channels + channel, mask=real, other=0.0).to(tl.float64)
        shift = tl.load(bias_ptr + step * channels + channel, mask=real, other=0.0).to(tl.float64)
        a, c, e = gain * a, gain * c, gain * e + shift
    return a, c, e


@triton.jit
def chain_kernel(
    partial_ptr, weight_ptr, bias_ptr, moments_ptr, numbers_ptr, states_ptr, rstd_ptr, positions, channels, tiles,
    steps, eps, CENTRED: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The moments of a sample from those of its tiles, and a, c and e of y_K."""
    sample, channel = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    real = channel < channels
    of_tiles = partial_ptr + sample * tiles * 5 * channels + channel
    mean_x, mean_u = tl.zeros((SIZE,), tl.float64), tl.zeros((SIZE,), tl.float64)
    for tile in range(tiles):
        part = tl.minimum(TILE, positions - tile * TILE).to(tl.float64) / positions
        at = of_tiles + tile * 5 * channels
        mean_x += part * tl.load(at, mask=real, other=0.0)
        mean_u += part * tl.load(at + channels, mask=real, other=0.0)
    mean_x, mean_u = mean_x.to(tl.float32), mean_u.to(tl.float32)
    xx, uu, xu = tl.zeros((SIZE,), tl.float64), tl.zeros((SIZE,), tl.float64), tl.zeros((SIZE,), tl.float64)
    for tile in range(tiles):
        count = tl.minimum(TILE, positions - tile * TILE).to(tl.float64)
        at = of_tiles + tile * 5 * channels
        x = tl.load(at, mask=real, other=0.0).to(tl.float64) - mean_x
        u = tl.load(at + channels, mask=real, other=0.0).to(tl.float64) - mean_u
        xx += count * x * x + tl.load(at + 2 * channels, mask=real, other=0.0)
        uu += count * u * u + tl.load(at + 3 * channels, mask=real, other=0.0)
        xu += count * x * u + tl.load(at + 4 * channels, mask=real, other=0.0)
    to = moments_ptr + sample * 5 * channels + channel
    tl.store(to, mean_x, mask=real)
    tl.store(to + channels, mean_u, mask=real)
    tl.store(to + 2 * channels, (xx / positions).to(tl.float32), mask=real)
    tl.store(to + 3 * channels, (uu / positions).to(tl.float32), mask=real)
    tl.store(to + 4 * channels, (xu / positions).to(tl.float32), mask=real)
    tl.debug_barrier()  # other threads may read it
    a, c, e = _chain(
        moments_ptr, weight_ptr, bias_ptr, states_ptr, rstd_ptr, channels, steps, eps, CENTRED, SIZE
    )  # fmt: skip
    to = numbers_ptr + sample * 3 * channels + channel
    tl.store(to, a.to(tl.float32), mask=real)
    tl.store(to + channels, c.to(tl.float32), mask=real)
    tl.store(to + 2 * channels, e.to(tl.float32), mask=real)


@triton.jit
def combine_kernel(
    x_ptr, branch_ptr, moments_ptr, numbers_ptr, y_ptr, positions, channels, scale,
    PLANES: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    channel, offset, mask = _tile(positions, channels, PLANES, CHANNELS, TILE)
    x, u = _pair(x_ptr, branch_ptr, scale, offset, mask)
    x -= _number(moments_ptr, 0, 5, channel, channels)
    u -= _number(moments_ptr, 1, 5, channel, channels)
    y = _number(numbers_ptr, 0, 3, channel, channels) * x + _number(numbers_ptr, 1, 3, channel, channels) * u
    y += _number(numbers_ptr, 2, 3, channel, channels)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient_sums_kernel(
    gradient_ptr, x_ptr, branch_ptr, moments_ptr, partial_ptr, positions, channels, scale,
    PLANES: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of each tile: the sums of the gradient times s x - mean, u - mean and 1; `(samples, tiles, 3, channels)`."""
    channel, offset, mask = _tile(positions, channels, PLANES, CHANNELS, TILE)
    x, u = _pair(x_ptr, branch_ptr, scale, offset, mask)
    x -= _number(moments_ptr, 0, 5, channel, channels)
    u -= _number(moments_ptr, 1, 5, channel, channels)
    up = tl.load(gradient_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    row = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * 3
    to, real = partial_ptr + row * channels + channel, channel < channels
    tl.store(to, tl.sum(up * x, axis=1, keep_dims=True), mask=real)
    tl.store(to + channels, tl.sum(up * u, axis=1, keep_dims=True), mask=real)
    tl.store(to + 2 * channels, tl.sum(up, axis=1, keep_dims=True), mask=real)


@triton.jit
def chain_backward_kernel(
    partial_ptr, weight_ptr, bias_ptr, moments_ptr, numbers_ptr, states_ptr, rstd_ptr, grad_affine_ptr,
    positions, channels, tiles, steps, eps, scale, CENTRED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`_chain_backward` of `skip_kernels_maps.py`. Leaves what multiplies gradient - mean, s x - mean, u - mean and 1
    in the gradients of x and F, and the mean of the gradient, `(samples, 9, channels)`; and those of gains and biases,
    `(samples, 2, steps, channels)`.
    """
    sample, channel = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    real = channel < channels
    _chain(moments_ptr, weight_ptr, bias_ptr, states_ptr, rstd_ptr, channels, steps, eps, CENTRED, SIZE)
    tl.debug_barrier()
    of_a, of_c, of_e = tl.zeros((SIZE,), tl.float64), tl.zeros((SIZE,), tl.float64), tl.zeros((SIZE,), tl.float64)
    for tile in range(tiles):
        at = partial_ptr + (sample * tiles + tile) * 3 * channels + channel
        of_a += tl.load(at, mask=real, other=0.0)
        of_c += tl.load(at + channels, mask=real, other=0.0)
        of_e += tl.load(at + 2 * channels, mask=real, other=0.0)
    by_x, by_xx = tl.zeros((SIZE,), tl.float64), tl.zeros((SIZE,), tl.float64)
    by_uu, by_xu = tl.zeros((SIZE,), tl.float64), tl.zeros((SIZE,), tl.float64)
    for index in range(steps):
        step = steps - 1 - index
        at = states_ptr + (sample * steps + step) * 3 * channels + channel
        a, c = tl.load(at, mask=real, other=0.0), tl.load(at + channels, mask=real, other=0.0)
        e = tl.load(at + 2 * channels, mask=real, other=0.0)
        rstd = tl.load(rstd_ptr + sample * steps + step)
        to = grad_affine_ptr + (sample * 2 * steps + step) * channels + channel
        tl.store(to, of_a * a + of_c * c + of_e * e, mask=real)
        tl.store(to + steps * channels, of_e, mask=real)
        gain = tl.load(weight_ptr + step * channels + channel, mask=real, other=0.0).to(tl.float64)
        of_a, of_c, of_e = gain * of_a, gain * of_c, gain * of_e
        of_std = tl.sum(of_a * a + of_c * c + of_e * e, axis=0) / channels
        by_xx -= of_std * a * a
        by_uu -= of_std * c * c
        by_xu -= of_std * a * c
        xx, uu = _number(moments_ptr, 2, 5, channel, channels), _number(moments_ptr, 3, 5, channel, channels)
        xu = _number(moments_ptr, 4, 5, channel, channels)
        of_a = rstd * (of_a - of_std * (xx * a + xu * c))
        of_c = rstd * (of_c - of_std * (uu * c + xu * a))
        of_e = rstd * (of_e - of_std * e)
        if CENTRED:
            of_e = tl.where(real, of_e - tl.sum(of_e, axis=0) / channels, 0.0)
        if step > 0:
            by_x += of_e
    tl.debug_barrier()
    at = states_ptr + (sample + 1) * steps * 3 * channels - 3 * channels + channel  # read again, which spares registers
    gain = tl.load(weight_ptr + (steps - 1) * channels + channel, mask=real, other=0.0).to(tl.float64)
    last_a = gain * tl.load(at, mask=real, other=0.0)
    last_c = gain * tl.load(at + channels, mask=real, other=0.0)
    sum_up = tl.load(grad_affine_ptr + ((sample + 1) * 2 * steps - 1) * channels + channel, mask=real, other=0.0)
    to = numbers_ptr + sample * 9 * channels + channel
    tl.store(to, (scale * (last_a + last_c)).to(tl.float32), mask=real)
    tl.store(to + channels, (scale * (by_xx + by_xu) / positions).to(tl.float32), mask=real)
    tl.store(to + 2 * channels, (scale * (by_xu + by_uu) / positions).to(tl.float32), mask=real)
    tl.store(to + 3 * channels, (scale * (by_x + of_e) / positions).to(tl.float32), mask=real)
    tl.store(to + 4 * channels, last_c.to(tl.float32), mask=real)
    tl.store(to + 5 * channels, (by_xu / positions).to(tl.float32), mask=real)
    tl.store(to + 6 * channels, (by_uu / positions).to(tl.float32), mask=real)
    tl.store(to + 7 * channels, (of_e / positions).to(tl.float32), mask=real)
    tl.store(to + 8 * channels, (sum_up / positions).to(tl.float32), mask=real)


@triton.jit
def combine_gradients_kernel(
    gradient_ptr, x_ptr, branch_ptr, moments_ptr, numbers_ptr, grad_x_ptr, grad_branch_ptr, positions, channels, scale,
    PLANES: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    channel, offset, mask = _tile(positions, channels, PLANES, CHANNELS, TILE)
    x, u = _pair(x_ptr, branch_ptr, scale, offset, mask)
    x -= _number(moments_ptr, 0, 5, channel, channels)
    u -= _number(moments_ptr, 1, 5, channel, channels)
    up = tl.load(gradient_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up -= _number(numbers_ptr, 8, 9, channel, channels)
    for output in tl.static_range(2):
        to = grad_branch_ptr if output else grad_x_ptr
        found = _number(numbers_ptr, 4 * output, 9, channel, channels) * up
        found += _number(numbers_ptr, 4 * output + 1, 9, channel, channels) * x
        found += _number(numbers_ptr, 4 * output + 2, 9, channel, channels) * u
        found += _number(numbers_ptr, 4 * output + 3, 9, channel, channels)
        tl.store(to + offset, found.to(to.dtype.element_ty), mask=mask)


def tile_options(positions: int, channels: int, dim: int) -> dict[str, int]:
    """Tiles of up to 2048 values, 16 a thread, of which up to 64 channels or 1024 positions lie side by side."""
    if dim == 2:
        tile = min(1024, triton.next_power_of_2(positions))
        return {"PLANES": True, "CHANNELS": 2048 // max(32, tile), "TILE": tile, "num_warps": 4}
    size = min(64, triton.next_power_of_2(channels))
    return {"PLANES": False, "CHANNELS": size, "TILE": 2048 // max(16, size), "num_warps": 4}


def chain_options(channels: int) -> dict[str, int]:
    """One channel a thread, at most 512 threads."""
    size = max(32, triton.next_power_of_2(channels))
    return {"SIZE": size, "num_warps": min(16, size // 32)}


_NAMESPACE = re.sub(r"\W", "_", __name__)  # a copy of this file that came with a checkpoint has operators of its own


@triton_op(f"{_NAMESPACE}::rskip_over_maps", mutates_args={})
def forward(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    centred: bool,
    eps: float,
    scale: float,
    dim: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x, dtype=dtype)
    samples, positions, channels, steps = x.shape[0], x.shape[dim], x.shape[3 - dim], weight.shape[0]
    moments = x.new_empty(samples, 5, channels, dtype=torch.float32)
    if x.numel() == 0:
        return y, moments.zero_()
    options = tile_options(positions, channels, dim)
    grid = samples, triton.cdiv(channels, options["CHANNELS"]), triton.cdiv(positions, options["TILE"])
    partial = x.new_empty(samples, grid[2], 5, channels, dtype=torch.float32)
    wrap_triton(moments_kernel)[grid](x, branch, partial, positions, channels, scale, **options)
    numbers = x.new_empty(samples, 3, channels, dtype=torch.float32)
    states, rstd = _scratch(x, steps, channels)
    wrap_triton(chain_kernel)[(samples,)](
        partial, weight.contiguous(), bias.contiguous(), moments, numbers, states, rstd, positions, channels, grid[2],
        steps, eps, CENTRED=centred, TILE=options["TILE"], **chain_options(channels),
    )  # fmt: skip
    wrap_triton(combine_kernel)[grid](x, branch, moments, numbers, y, positions, channels, scale, **options)
    return y, moments


@triton_op(f"{_NAMESPACE}::rskip_over_maps_backward", mutates_args={})
def backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    moments: torch.Tensor,
    centred: bool,
    eps: float,
    scale: float,
    dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_x, grad_branch = torch.empty_like(x), torch.empty_like(branch)
    samples, positions, channels, steps = x.shape[0], x.shape[dim], x.shape[3 - dim], weight.shape[0]
    if x.numel() == 0:
        return grad_x, grad_branch, torch.zeros_like(weight), torch.zeros_like(bias)
    options = tile_options(positions, channels, dim)
    grid = samples, triton.cdiv(channels, options["CHANNELS"]), triton.cdiv(positions, options["TILE"])
    partial = x.new_empty(samples, grid[2], 3, channels, dtype=torch.float32)
    wrap_triton(gradient_sums_kernel)[grid](
        gradient, x, branch, moments, partial, positions, channels, scale, **options
    )  # fmt: skip
    numbers = x.new_empty(samples, 9, channels, dtype=torch.float32)
    grad_affine = x.new_empty(samples, 2, steps, channels, dtype=torch.float64)
    states, rstd = _scratch(x, steps, channels)
    wrap_triton(chain_backward_kernel)[(samples,)](
        partial, weight.contiguous(), bias.contiguous(), moments, numbers, states, rstd, grad_affine,
        positions, channels, grid[2], steps, eps, scale, CENTRED=centred, **chain_options(channels),
    )  # fmt: skip
    wrap_triton(combine_gradients_kernel)[grid](
        gradient, x, branch, moments, numbers, grad_x, grad_branch, positions, channels, scale, **options
    )
    grad_weight, grad_bias = grad_affine.sum(0).unbind(0)
    return grad_x, grad_branch, grad_weight.to(weight.dtype, copy=True), grad_bias.to(bias.dtype, copy=True)


def _scratch(x, steps, channels):
    """What the steps of the chain leave to its backward pass."""
    samples = x.shape[0]
    return (x.new_empty(size, dtype=torch.float64) for size in ((samples, steps, 3, channels), (samples, steps)))
