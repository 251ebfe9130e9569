"""second_moments in Triton: the mean and covariance of a = act((x - mean)*scale + bias), for channels_last.

The products are those of a - pivot, the pivot being the mean of a over at most 64 pixels spread evenly: an uncentred sum
in float32 would lose (mean/std)^2 digits. A program sums d^T d of one block of channel pairs over a slab of pixels, in
float32; slabs are merged in float64. Only blocks on and above the diagonal are computed. x is read once per block row,
out of L2 but for the first. Source: the identity Cov[a] = E[d d^T] - E[d] E[d]^T, d = a - pivot for any pivot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.launch import check_image, check_prologue, precision, slab_of, strided
from resfuse._triton.pointwise import pixels_read
from resfuse._triton.tiles import dot, finite_or_zero, normalized

_PIVOT_PIXELS = 64
_PIVOT_CHANNELS = 32
_MERGED = 32  # rows and columns that a merging program takes


@triton.jit
def _pivot_kernel(
    x_ptr,
    affine_ptr,
    mean_ptr,
    pivot_ptr,
    rows,
    height_out,
    width_out,
    height,
    width,
    channels,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    RELU: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    sample = tl.arange(0, PIXELS).to(tl.int64)
    count = tl.minimum(rows, PIXELS)
    taken = sample < count
    pixel = pixels_read(sample * rows // count, height_out, width_out, height, width, STRIDE_H, STRIDE_W)
    mask = taken[:, None] & inside[None, :]
    x = tl.load(x_ptr + pixel[:, None] * channels + channel[None, :], mask=mask, other=0.0)
    a = normalized(x, affine_ptr, mean_ptr, channel, inside, channels, RELU)
    pivot = finite_or_zero(tl.sum(tl.where(mask, a, 0.0), 0) / count)
    tl.store(pivot_ptr + channel, pivot.to(x.dtype).to(tl.float32), mask=inside)


@triton.jit
def _deviations(
    x_ptr, pixel, pixel_valid, affine_ptr, mean_ptr, pivot_ptr, channel, channels, RELU: tl.constexpr
):  # fmt: skip
    """a - pivot of a tile, in x's dtype; 0 outside."""
    inside = channel < channels
    mask = pixel_valid[:, None] & inside[None, :]
    x = tl.load(x_ptr + pixel[:, None] * channels + channel[None, :], mask=mask, other=0.0)
    a = normalized(x, affine_ptr, mean_ptr, channel, inside, channels, RELU).to(x.dtype).to(tl.float32)
    pivot = tl.load(pivot_ptr + channel, mask=inside, other=0.0)
    return tl.where(mask, a - pivot[None, :], 0.0).to(x.dtype)


@triton.jit
def _products_kernel(
    x_ptr,
    affine_ptr,
    mean_ptr,
    pivot_ptr,
    products_ptr,  # (slabs, channels, channels), on and above the diagonal's blocks
    sums_ptr,  # (slabs, channels)
    rows,
    slab,
    height_out,
    width_out,
    height,
    width,
    channels,
    blocks,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    RELU: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, second = pair // blocks, pair % blocks
    if first > second:
        return
    left = first * BLOCK_C + tl.arange(0, BLOCK_C)
    right = second * BLOCK_C + tl.arange(0, BLOCK_C)
    products = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    end = tl.minimum(rows, (part + 1) * slab)
    for begin in range(part * slab, end, BLOCK_M):
        row = begin + tl.arange(0, BLOCK_M)
        valid = row < end
        pixel = pixels_read(row, height_out, width_out, height, width, STRIDE_H, STRIDE_W)
        d = _deviations(x_ptr, pixel, valid, affine_ptr, mean_ptr, pivot_ptr, left, channels, RELU)
        sums += d.to(tl.float32)
        if ONE_BLOCK:
            products = dot(tl.trans(d), d, products, PRECISION)
        else:
            other = _deviations(x_ptr, pixel, valid, affine_ptr, mean_ptr, pivot_ptr, right, channels, RELU)
            products = dot(tl.trans(d), other, products, PRECISION)
    mask = (left < channels)[:, None] & (right < channels)[None, :]
    at = (part * channels + left[:, None]) * channels + right[None, :]
    tl.store(products_ptr + at, products, mask=mask)
    if first == second:
        tl.store(sums_ptr + part * channels + left, tl.sum(sums, 0), mask=left < channels)


@triton.jit
def _merge_kernel(
    products_ptr,
    sums_ptr,
    pivot_ptr,
    mean_ptr,
    covariance_ptr,
    parts,
    rows,
    channels,
    BLOCK: tl.constexpr,
):
    first, second = tl.program_id(0), tl.program_id(1)
    if first > second:
        return
    left = (first * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    right = (second * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = (left < channels)[:, None] & (right < channels)[None, :]
    products = tl.zeros((BLOCK, BLOCK), tl.float64)
    left_sums = tl.zeros((BLOCK,), tl.float64)
    right_sums = tl.zeros((BLOCK,), tl.float64)
    for part in range(0, parts):
        at = (part * channels + left[:, None]) * channels + right[None, :]
        products += tl.load(products_ptr + at, mask=mask, other=0.0).to(tl.float64)
        left_sums += tl.load(sums_ptr + part * channels + left, mask=left < channels, other=0.0).to(tl.float64)
        right_sums += tl.load(sums_ptr + part * channels + right, mask=right < channels, other=0.0).to(tl.float64)
    left_offset, right_offset = left_sums / rows, right_sums / rows
    covariance = (products / rows - left_offset[:, None] * right_offset[None, :]).to(tl.float32)
    upper = mask & (left[:, None] <= right[None, :])
    tl.store(covariance_ptr + left[:, None] * channels + right[None, :], covariance, mask=upper)
    tl.store(covariance_ptr + right[None, :] * channels + left[:, None], covariance, mask=upper)
    if first == second:
        pivot = tl.load(pivot_ptr + left, mask=left < channels, other=0.0)
        tl.store(mean_ptr + left, (pivot + left_offset).to(tl.float32), mask=left < channels)


def _block(x: Tensor) -> tuple[int, int, int]:
    """Pixels and channels of a block, and warps."""
    channels = min(128 if x.dtype != torch.float32 else 64, max(32, triton.next_power_of_2(x.shape[1])))
    return (64 if x.dtype != torch.float32 else 32), channels, 8 if channels == 128 else 4


def second_moments(
    x: Tensor, affine: Tensor | None, mean: Tensor | None, relu: bool, stride: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """mean (C,) and biased covariance (C, C) of a over the pixels that a 1x1 convolution of this stride reads."""
    check_image(x, "x")
    images, channels, height, width = x.shape
    check_prologue(affine, mean, channels)
    height_out, width_out = strided(height, stride[0]), strided(width, stride[1])
    rows = images * height_out * width_out
    block_m, block_c, warps = _block(x)
    blocks = triton.cdiv(channels, block_c)
    slab = slab_of(rows, block_m, blocks * (blocks + 1) // 2)
    slabs = triton.cdiv(rows, slab)
    a_mean = torch.empty(channels, dtype=torch.float32, device=x.device)
    pivot, covariance = torch.empty_like(a_mean), a_mean.new_empty(channels, channels)
    products, sums = a_mean.new_empty(slabs, channels, channels), a_mean.new_empty(slabs, channels)
    geometry = (height_out, width_out, height, width, channels)
    options = {"STRIDE_H": stride[0], "STRIDE_W": stride[1], "RELU": relu, "enable_fp_fusion": False}
    _pivot_kernel[(triton.cdiv(channels, _PIVOT_CHANNELS),)](
        x, affine, mean, pivot, rows, *geometry, PIXELS=_PIVOT_PIXELS, BLOCK_C=_PIVOT_CHANNELS, **options
    )
    _products_kernel[(blocks * blocks, slabs)](
        x,
        affine,
        mean,
        pivot,
        products,
        sums,
        rows,
        slab,
        *geometry,
        blocks,
        ONE_BLOCK=blocks == 1,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        PRECISION=precision(x),
        num_warps=warps,
        num_stages=3,
        **options,
    )
    _merge_kernel[(triton.cdiv(channels, _MERGED),) * 2](
        products, sums, pivot, a_mean, covariance, slabs, rows, channels, BLOCK=_MERGED, enable_fp_fusion=False
    )
    return a_mean, covariance
