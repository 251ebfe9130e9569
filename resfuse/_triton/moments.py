"""moments in Triton: per-channel mean and biased variance over N, H and W, and their backward.

Forward reads x once. Backward reads x and writes grad_x = grad_mean/M + 2*grad_var/M * (x - mean), M = N*H*W.
Each lane of a program's tile keeps the moments of its own stream of values (Welford); lanes, then slabs, are merged in
a fixed order (Chan, Golub, LeVeque 1979). E[x^2] - E[x]^2 appears nowhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.kernel import Kernel
from resfuse._triton.merge import merge_moments
from resfuse._triton.walk import (
    accumulate_dtype,
    add_to_streams,
    beside,
    check_vectors,
    own_block,
    pivot_of,
    places,
    store_moments,
    vector,
    walk_over,
)


@Kernel
@triton.jit(do_not_specialize=["pixels"])
def moments_kernel(
    x_ptr,
    partial_ptr,  # (slabs, 2, channels)
    pixels,
    channels,
    plane,
    slab,
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part, channel, valid = own_block(channels, BLOCK_C)
    first = part * slab
    end = tl.minimum(first + slab, pixels)
    origin = places(first * 0, channel, channels, plane, CHANNELS_LAST, 1)
    pivot = pivot_of(tl.load(x_ptr + origin, mask=valid[None, :], other=0.0).to(COMPUTE))
    mean = tl.zeros((BLOCK_M, BLOCK_C), COMPUTE)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), COMPUTE)
    for step in range(0, slab // BLOCK_M):
        begin = first + step * BLOCK_M
        inside = (begin + tl.arange(0, BLOCK_M) < end)[:, None] & valid[None, :]
        at = places(begin, channel, channels, plane, CHANNELS_LAST, BLOCK_M)
        value = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        mean, m2 = add_to_streams(mean, m2, value - pivot, inside, step)
    store_moments(partial_ptr, pivot, mean, m2, first, end, part, channel, valid, channels, BLOCK_M)


@Kernel
@triton.jit(do_not_specialize=["pixels"])
def moments_backward_kernel(
    grad_mean_ptr,
    grad_var_ptr,
    x_ptr,
    mean_ptr,
    grad_ptr,
    pixels,
    channels,
    plane,
    slab,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part, channel, valid = own_block(channels, BLOCK_C)
    begin = part * slab
    inside = (begin + tl.arange(0, BLOCK_M) < pixels)[:, None] & valid[None, :]
    at = places(begin, channel, channels, plane, CHANNELS_LAST, BLOCK_M)
    mean = vector(mean_ptr, channel, valid)
    constant = vector(grad_mean_ptr, channel, valid) / pixels
    slope = 2 * vector(grad_var_ptr, channel, valid) / pixels
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    tl.store(grad_ptr + at, (constant + slope * (x.to(mean.dtype) - mean)).to(x.dtype), mask=inside)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    walk = walk_over(x, reduces=True)
    dtype = accumulate_dtype(x.dtype)
    if x.numel() == 0:
        nothing = torch.full((walk.channels,), float("nan"), dtype=dtype, device=x.device)
        return nothing, nothing.clone()  # the mean of nothing, as torch.var_mean
    partial = torch.empty(walk.parts, 2, walk.channels, dtype=torch.float64, device=x.device)
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    moments_kernel[walk.grid](x, partial, *walk.sizes, COMPUTE=compute, **walk.options)
    return merge_moments(partial, walk.slab, walk.pixels, dtype)


def moments_backward(grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    grad, walk = torch.empty_like(x), walk_over(x)
    beside(x, grad=grad)
    check_vectors(x, grad_mean=grad_mean, grad_var=grad_var, mean=mean)
    if x.numel() > 0:
        moments_backward_kernel[walk.grid](grad_mean, grad_var, x, mean, grad, *walk.sizes, **walk.options)
    return grad
