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
def _load(pointer, index, channel, channels):
    """Row `index` of `(..., channels)` at the channels of a program."""
    return tl.load(pointer + index * channels + channel, mask=channel < channels, other=0.0)


@triton.jit
def _store(pointer, index, channel, channels, rows, COUNT: tl.constexpr):
    """`COUNT` rows from `index` on."""
    for i in tl.static_range(COUNT):
        value = rows[i].to(pointer.dtype.element_ty)
        tl.store(pointer + (index + i) * channels + channel, value, mask=channel < channels)


@triton.jit
def _centred_pair(x_ptr, branch_ptr, moments_ptr, scale, channel, channels, offset, mask):
    x, u = _pair(x_ptr, branch_ptr, scale, offset, mask)
    of_sample = tl.program_id(0).to(tl.int64) * 5
    x -= _load(moments_ptr, of_sample, channel, channels)
    return x, u - _load(moments_ptr, of_sample + 1, channel, channels)


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
    xx, uu = tl.sum(x * x, axis=1, keep_dims=True), tl.sum(u * u, axis=1, keep_dims=True)
    found = (mean_x, mean_u, xx, uu, tl.sum(x * u, axis=1, keep_dims=True))
    tile = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    _store(partial_ptr, tile * 5, channel, channels, found, 5)


@triton.jit
def _chain(moments_ptr, weight_ptr, bias_ptr, states_ptr, rstd_ptr, channels, steps, eps, CENTRED, SIZE: tl.constexpr):
    """`_chain` of `skip_kernels_maps.py`; leaves what each step normalises, over its deviation, and 1 over that."""
    sample, channel = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    e = _load(moments_ptr, sample * 5 + 1, channel, channels).to(tl.float64)
    a = tl.zeros((SIZE,), tl.float64)
    c = a + 1
    for step in range(steps):
        if step > 0:
            a += 1
            e += _load(moments_ptr, sample * 5, channel, channels)
        if CENTRED:
            e = tl.where(channel < channels, e - tl.sum(e, axis=0) / channels, 0.0)
        square = a * a * (_load(moments_ptr, sample * 5 + 2, channel, channels).to(tl.float64) + 1e-34)
        square += c * c * (_load(moments_ptr, sample * 5 + 3, channel, channels).to(tl.float64) + 1e-34)
        square += 2 * a * c * _load(moments_ptr, sample * 5 + 4, channel, channels) + e * e
        variance = tl.sum(tl.where(channel < channels, square, 0.0), axis=0) / channels
        rstd = 1 / tl.sqrt(tl.where(variance < 0, 0.0, variance) + eps)  # a maximum would lose NaN
        a, c, e = a * rstd, c * rstd, e * rstd
        _store(states_ptr, (sample * steps + step) * 3, channel, channels, (a, c, e), 3)
        tl.store(rstd_ptr + sample * steps + step, rstd)
        gain = _load(weight_ptr, step, channel, channels).to(tl.float64)
        a, c, e = gain * a, gain * c, gain * e + _load(bias_ptr, step, channel, channels)
    return a, c, e


@triton.jit
def chain_kernel(
    partial_ptr, weight_ptr, bias_ptr, moments_ptr, numbers_ptr, states_ptr, rstd_ptr, positions, channels, tiles,
    steps, eps, CENTRED: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The moments of a sample from those of its tiles, and a, c and e of y_K."""
    sample, channel = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    zero = tl.zeros((SIZE,), tl.float64)
    mean_x, mean_u, xx, uu, xu = zero, zero, zero, zero, zero
    for tile in range(tiles):
        part = tl.minimum(TILE, positions - tile * TILE).to(tl.float64) / positions
        mean_x += part * _load(partial_ptr, (sample * tiles + tile) * 5, channel, channels)
        mean_u += part * _load(partial_ptr, (sample * tiles + tile) * 5 + 1, channel, channels)
    mean_x, mean_u = mean_x.to(tl.float32), mean_u.to(tl.float32)
    for tile in range(tiles):
        part, row = tl.minimum(TILE, positions - tile * TILE).to(tl.float64) / positions, (sample * tiles + tile) * 5
        x = _load(partial_ptr, row, channel, channels).to(tl.float64) - mean_x
        u = _load(partial_ptr, row + 1, channel, channels).to(tl.float64) - mean_u
        xx += part * x * x + _load(partial_ptr, row + 2, channel, channels) / positions
        uu += part * u * u + _load(partial_ptr, row + 3, channel, channels) / positions
        xu += part * x * u + _load(partial_ptr, row + 4, channel, channels) / positions
    _store(moments_ptr, sample * 5, channel, channels, (mean_x, mean_u, xx, uu, xu), 5)
    tl.debug_barrier()  # other threads may read it
    of_y = _chain(moments_ptr, weight_ptr, bias_ptr, states_ptr, rstd_ptr, channels, steps, eps, CENTRED, SIZE)
    _store(numbers_ptr, sample * 3, channel, channels, of_y, 3)


@triton.jit
def combine_kernel(
    x_ptr, branch_ptr, moments_ptr, numbers_ptr, y_ptr, positions, channels, scale,
    PLANES: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    channel, offset, mask = _tile(positions, channels, PLANES, CHANNELS, TILE)
    x, u = _centred_pair(x_ptr, branch_ptr, moments_ptr, scale, channel, channels, offset, mask)
    row = tl.program_id(0).to(tl.int64) * 3
    y = _load(numbers_ptr, row, channel, channels) * x + _load(numbers_ptr, row + 1, channel, channels) * u
    y += _load(numbers_ptr, row + 2, channel, channels)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient_sums_kernel(
    gradient_ptr, x_ptr, branch_ptr, moments_ptr, partial_ptr, positions, channels, scale,
    PLANES: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of each tile: the sums of the gradient times s x - mean, u - mean and 1; `(samples, tiles, 3, channels)`."""
    channel, offset, mask = _tile(positions, channels, PLANES, CHANNELS, TILE)
    x, u = _centred_pair(x_ptr, branch_ptr, moments_ptr, scale, channel, channels, offset, mask)
    up = tl.load(gradient_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    along_x, along_u = tl.sum(up * x, axis=1, keep_dims=True), tl.sum(up * u, axis=1, keep_dims=True)
    tile = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    _store(partial_ptr, tile * 3, channel, channels, (along_x, along_u, tl.sum(up, axis=1, keep_dims=True)), 3)


@triton.jit
def chain_backward_kernel(
    partial_ptr, weight_ptr, bias_ptr, moments_ptr, numbers_ptr, states_ptr, rstd_ptr, grad_weight_ptr, grad_bias_ptr,
    positions, channels, tiles, steps, eps, scale, CENTRED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`_chain_backward` of `skip_kernels_maps.py`. Leaves what multiplies gradient - mean, s x - mean, u - mean and 1
    in the gradients of x and F, and the mean of the gradient, `(samples, 9, channels)`; and the gradients of gains and
    biases, `(samples, steps, channels)`.
    """
    sample, channel = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    _chain(moments_ptr, weight_ptr, bias_ptr, states_ptr, rstd_ptr, channels, steps, eps, CENTRED, SIZE)
    tl.debug_barrier()
    zero = tl.zeros((SIZE,), tl.float64)
    of_a, of_c, of_e, by_x, by_xx, by_uu, by_xu = zero, zero, zero, zero, zero, zero, zero
    for tile in range(tiles):
        of_a += _load(partial_ptr, (sample * tiles + tile) * 3, channel, channels)
        of_c += _load(partial_ptr, (sample * tiles + tile) * 3 + 1, channel, channels)
        of_e += _load(partial_ptr, (sample * tiles + tile) * 3 + 2, channel, channels)
    for index in range(steps):
        step = sample * steps + steps - 1 - index
        a, c = _load(states_ptr, step * 3, channel, channels), _load(states_ptr, step * 3 + 1, channel, channels)
        e, rstd = _load(states_ptr, step * 3 + 2, channel, channels), tl.load(rstd_ptr + step)
        _store(grad_weight_ptr, step, channel, channels, (of_a * a + of_c * c + of_e * e,), 1)
        _store(grad_bias_ptr, step, channel, channels, (of_e,), 1)
        gain = _load(weight_ptr, steps - 1 - index, channel, channels).to(tl.float64)
        of_a, of_c, of_e = gain * of_a, gain * of_c, gain * of_e
        of_std = tl.sum(of_a * a + of_c * c + of_e * e, axis=0) / channels
        by_xx -= of_std * a * a
        by_uu -= of_std * c * c
        by_xu -= of_std * a * c
        xu = _load(moments_ptr, sample * 5 + 4, channel, channels)
        of_a = rstd * (of_a - of_std * (_load(moments_ptr, sample * 5 + 2, channel, channels) * a + xu * c))
        of_c = rstd * (of_c - of_std * (_load(moments_ptr, sample * 5 + 3, channel, channels) * c + xu * a))
        of_e = rstd * (of_e - of_std * e)
        if CENTRED:
            of_e = tl.where(channel < channels, of_e - tl.sum(of_e, axis=0) / channels, 0.0)
        if index + 1 < steps:
            by_x += of_e
    tl.debug_barrier()
    last = (sample + 1) * steps - 1  # reading again what is there spares registers
    gain, sum_up = _load(weight_ptr, steps - 1, channel, channels), _load(grad_bias_ptr, last, channel, channels)
    a, c = (
        gain * _load(states_ptr, last * 3, channel, channels),
        gain * _load(states_ptr, last * 3 + 1, channel, channels),
    )
    by_x, by_u, by_xx = by_x / positions, of_e / positions, by_xx / positions
    by_uu, by_xu, mean_up = by_uu / positions, by_xu / positions, sum_up / positions
    of_x = (scale * (a + c), scale * (by_xx + by_xu), scale * (by_xu + by_uu), scale * (by_x + by_u))
    _store(numbers_ptr, sample * 9, channel, channels, of_x, 4)
    _store(numbers_ptr, sample * 9 + 4, channel, channels, (c, by_xu, by_uu, by_u, mean_up), 5)


@triton.jit
def combine_gradients_kernel(
    gradient_ptr, x_ptr, branch_ptr, moments_ptr, numbers_ptr, grad_x_ptr, grad_branch_ptr, positions, channels, scale,
    PLANES: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    channel, offset, mask = _tile(positions, channels, PLANES, CHANNELS, TILE)
    x, u = _centred_pair(x_ptr, branch_ptr, moments_ptr, scale, channel, channels, offset, mask)
    row = tl.program_id(0).to(tl.int64) * 9
    up = tl.load(gradient_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up -= _load(numbers_ptr, row + 8, channel, channels)
    for output in tl.static_range(2):
        to = grad_branch_ptr if output else grad_x_ptr
        found = _load(numbers_ptr, row + 4 * output, channel, channels) * up
        found += _load(numbers_ptr, row + 4 * output + 1, channel, channels) * x
        found += _load(numbers_ptr, row + 4 * output + 2, channel, channels) * u
        found += _load(numbers_ptr, row + 4 * output + 3, channel, channels)
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
    grad_weight, grad_bias = (x.new_empty(samples, steps, channels, dtype=torch.float64) for _ in range(2))
    states, rstd = _scratch(x, steps, channels)
    wrap_triton(chain_backward_kernel)[(samples,)](
        partial, weight.contiguous(), bias.contiguous(), moments, numbers, states, rstd, grad_weight,
        grad_bias, positions, channels, grid[2], steps, eps, scale, CENTRED=centred, **chain_options(channels),
    )  # fmt: skip
    wrap_triton(combine_gradients_kernel)[grid](
        gradient, x, branch, moments, numbers, grad_x, grad_branch, positions, channels, scale, **options
    )
    return grad_x, grad_branch, grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(bias.dtype)


def _scratch(x, steps, channels):
    """What the steps of the chain leave to its backward pass."""
    samples = x.shape[0]
    return (x.new_empty(size, dtype=torch.float64) for size in ((samples, steps, 3, channels), (samples, steps)))


OPERATORS = forward, backward
