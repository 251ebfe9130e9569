"""second_moments: the mean and covariance of a = act((x - mean)*scale + bias) over the pixels that are read.

The products are those of d = a - pivot, the pivot being the mean of a over at most 64 pixels spread evenly: an
uncentred sum in float32 would lose (mean/std)^2 digits. Cov[a] = E[d d^T] - E[d] E[d]^T holds for any pivot. A program
sums d^T d of one pair of blocks of channels over a slab, in float32; slabs are added in float64. Only pairs on and
above the diagonal are computed. Of several blocks of channels each is read once for every block, and once more, by
programs that run side by side: from the L2 cache but for the first. The price of slabs is 4*C*C bytes for each, written
and read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.gemm import load_activation, product_of, source_pixels, tile_rows
from resfuse._triton.kernel import Kernel
from resfuse._triton.launch import check_prologue, precision
from resfuse._triton.schedule import second_moments_schedule
from resfuse._triton.tiles import dot, finite_or_zero, normalized

_PIVOT_PIXELS = 64
_PIVOT_CHANNELS = 32
_FRACTION_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 0}
_MERGED = 32  # channels of either side that a merging program takes


@Kernel
@triton.jit(do_not_specialize=["pixels", "height", "width"])
def pivot_kernel(
    x_ptr,
    affine_ptr,
    mean_ptr,
    pivot_ptr,
    pixels,
    height,
    width,
    channels,
    RELU: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BITS: tl.constexpr,  # behind the point of x's dtype; 0: the pivot as it is
):
    """pivot = the mean of a over PIXELS rows spread evenly, or over all of fewer; 0 beside an Inf.

    In 16 bits it is a multiple of the last bit that x's dtype has at the largest |a| of them. Deviations are rounded,
    and those of 16-bit values from any other number would be rounded alike, all up or all down.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    count = tl.minimum(pixels, PIXELS)
    sample = tl.arange(0, PIXELS)
    row = (sample.to(tl.int64) * pixels // count).to(tl.int32)
    above = row // width.rows
    rows = (above // height.rows, above % height.rows, row % width.rows, sample < count)
    pixel, valid = source_pixels(rows, 0, 0, height, width)
    mask = valid[:, None] & inside[None, :]
    x = tl.load(x_ptr + pixel[:, None] * channels + channel[None, :], mask=mask, other=0.0)
    a = normalized(x, affine_ptr, mean_ptr, channel, inside, channels, RELU)
    pivot = finite_or_zero(tl.sum(tl.where(mask, a, 0.0), 0) / count.to(tl.float32))
    if BITS > 0:
        largest = tl.max(tl.where(mask, tl.abs(a), 0.0), 0)
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        bit = tl.where(power > 0, power, 1.0) * (1.0 / (1 << BITS))
        pivot = tl.where(power > 0, finite_or_zero(tl.floor(pivot / bit + 0.5) * bit), pivot)
    tl.store(pivot_ptr + channel, pivot, mask=inside)


@triton.jit
def _deviations(
    x_ptr, affine_ptr, mean_ptr, pivot_ptr, pixel, valid, channel, channels, RELU: tl.constexpr
):  # fmt: skip
    """a - pivot of a tile, in x's dtype; zero outside."""
    inside = channel < channels
    a = load_activation(x_ptr, affine_ptr, mean_ptr, pixel, valid, channel, inside, channels, RELU)
    pivot = tl.load(pivot_ptr + channel, mask=inside, other=0.0)
    return tl.where(valid[:, None], a.to(tl.float32) - pivot[None, :], 0.0).to(a.dtype)


@Kernel
@triton.jit(do_not_specialize=["images", "height", "width", "tiles", "slab_tiles", "blocks"])
def second_moments_kernel(
    x_ptr,  # (images, source height, source width, channels)
    affine_ptr,  # (2, channels) or None: bias and scale
    mean_ptr,  # (channels) or None
    pivot_ptr,  # (channels)
    products_ptr,  # (slabs, channels, channels), written where the column's block is not before the row's
    sums_ptr,  # (slabs, channels)
    images,
    height,
    width,
    tiles,
    slab_tiles,
    channels,
    blocks,
    RELU: tl.constexpr,
    POINTWISE: tl.constexpr,
    SINGLE: tl.constexpr,  # one block holds all channels
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # channels, as BLOCK_N
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # pixels
):
    first, second, slab = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    if first > second:
        return
    left = first * BLOCK_M + tl.arange(0, BLOCK_M)
    right = second * BLOCK_N + tl.arange(0, BLOCK_N)
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for tile in range(slab * slab_tiles, tl.minimum(slab * slab_tiles + slab_tiles, tiles)):
        rows = tile_rows(tile, images, height, width, POINTWISE, BLOCK_K)
        pixel, valid = source_pixels(rows, 0, 0, height, width)
        d = _deviations(x_ptr, affine_ptr, mean_ptr, pivot_ptr, pixel, valid, left, channels, RELU)
        sums += d.to(tl.float32)
        if SINGLE:
            products = dot(tl.trans(d), d, products, PRECISION)
        else:
            e = _deviations(x_ptr, affine_ptr, mean_ptr, pivot_ptr, pixel, valid, right, channels, RELU)
            products = dot(tl.trans(d), e, products, PRECISION)
    at = (slab.to(tl.int64) * channels + left[:, None]) * channels + right[None, :]
    tl.store(products_ptr + at, products, mask=(left < channels)[:, None] & (right < channels)[None, :])
    if first == second:
        tl.store(sums_ptr + slab.to(tl.int64) * channels + left, tl.sum(sums, 0), mask=left < channels)


@Kernel
@triton.jit(do_not_specialize=["slabs", "pixels"])
def covariance_kernel(
    products_ptr, sums_ptr, pivot_ptr, mean_ptr, covariance_ptr, slabs, pixels, channels, BLOCK: tl.constexpr
):  # fmt: skip
    """E[d d^T] - E[d] E[d]^T of one block on or above the diagonal, and its mirror image; pivot + E[d]."""
    first, second = tl.program_id(0), tl.program_id(1)
    if first > second:
        return
    left = (first * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    right = (second * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = (left < channels)[:, None] & (right < channels)[None, :]
    products = tl.zeros((BLOCK, BLOCK), tl.float64)
    left_sums = tl.zeros((BLOCK,), tl.float64)
    right_sums = tl.zeros((BLOCK,), tl.float64)
    for slab in range(0, slabs):
        at = (slab * channels + left[:, None]) * channels + right[None, :]
        products += tl.load(products_ptr + at, mask=mask, other=0.0).to(tl.float64)
        left_sums += tl.load(sums_ptr + slab * channels + left, mask=left < channels, other=0.0).to(tl.float64)
        right_sums += tl.load(sums_ptr + slab * channels + right, mask=right < channels, other=0.0).to(tl.float64)
    left_mean, right_mean = left_sums / pixels, right_sums / pixels
    covariance = (products / pixels - left_mean[:, None] * right_mean[None, :]).to(tl.float32)
    upper = mask & (left[:, None] <= right[None, :])
    tl.store(covariance_ptr + left[:, None] * channels + right[None, :], covariance, mask=upper)
    tl.store(covariance_ptr + right[None, :] * channels + left[:, None], covariance, mask=upper)
    if first == second:
        pivot = tl.load(pivot_ptr + left, mask=left < channels, other=0.0)
        tl.store(mean_ptr + left, (pivot + left_mean).to(tl.float32), mask=left < channels)


def second_moments(
    x: Tensor, affine: Tensor | None, mean: Tensor | None, relu: bool, stride: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """mean (C,) and biased covariance (C, C) of a over the pixels that a 1x1 convolution of this stride reads."""
    channels = x.shape[1]
    product = product_of(x, x.new_empty(1, channels, 1, 1), stride, (0, 0), (1, 1), 1)
    check_prologue(affine, mean, x)
    prologue = (affine, mean if affine is not None else None)
    walked = product.flattened() if product.is_pointwise else product
    shape = (walked.images, walked.height, walked.width)
    plan = second_moments_schedule(product.pixels, channels, x.dtype)
    a_mean = torch.empty(channels, dtype=torch.float32, device=x.device)
    pivot, covariance = torch.empty_like(a_mean), a_mean.new_empty(channels, channels)
    products, sums = a_mean.new_empty(plan.slabs, channels, channels), a_mean.new_empty(plan.slabs, channels)
    pivot_kernel[(triton.cdiv(channels, _PIVOT_CHANNELS),)](
        x, *prologue, pivot, product.pixels, *shape[1:], channels,
        RELU=relu, PIXELS=_PIVOT_PIXELS, BLOCK_C=_PIVOT_CHANNELS, BITS=_FRACTION_BITS[x.dtype], enable_fp_fusion=False,
    )  # fmt: skip
    second_moments_kernel[plan.blocks**2, plan.slabs](
        x, *prologue, pivot, products, sums, *shape, plan.tiles, plan.slab_tiles, channels, plan.blocks,
        RELU=relu, POINTWISE=product.is_pointwise, SINGLE=plan.blocks == 1, PRECISION=precision(x), **plan.options,
    )  # fmt: skip
    covariance_kernel[(triton.cdiv(channels, _MERGED),) * 2](
        products, sums, pivot, a_mean, covariance, plan.slabs, product.pixels, channels,
        BLOCK=_MERGED, enable_fp_fusion=False,
    )  # fmt: skip
    return a_mean, covariance
