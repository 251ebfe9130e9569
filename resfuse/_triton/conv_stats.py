"""conv_stats: y = conv(act((x - mean)*scale + bias)), and the mean and variance of y.

A program takes a slab, consecutive row tiles of one block of output channels; it normalises x in registers on the way
to the product, and keeps the moments of what it stores. x is read once for each block of output channels (by programs
that run side by side, so from the L2 cache but for the first) and tap, y is written once. Where one step covers all
channels of a 1x1 convolution, the weight stays in place for the whole slab, and the loop over tiles is the one whose
loads run ahead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.gemm import (
    convolve,
    load_activation,
    load_weight,
    packed_weight,
    product_of,
    result_pixels,
    source_pixels,
    tile_rows,
)
from resfuse._triton.kernel import Kernel
from resfuse._triton.launch import check_prologue, precision
from resfuse._triton.merge import merge_moments as merge_slabs
from resfuse._triton.schedule import forward_schedule
from resfuse._triton.tiles import dot, merge_moments, tile_moments


@Kernel
@triton.jit(do_not_specialize=["images", "height", "width", "tiles", "slab_tiles"])
def conv_stats_kernel(
    x_ptr,  # (images, source height, source width, groups*channels)
    affine_ptr,  # (2, groups*channels) or None: bias and scale
    mean_ptr,  # (groups*channels) or None
    weight_ptr,  # (groups*out_channels, taps, channels)
    y_ptr,  # (images, result height, result width, groups*out_channels)
    partial_ptr,  # (slabs, 2, groups*out_channels) or None: mean and squared deviations
    images,
    height,
    width,
    tiles,
    slab_tiles,
    channels,  # of one group, as out_channels
    out_channels,
    groups,
    RELU: tl.constexpr,
    POINTWISE: tl.constexpr,
    SINGLE: tl.constexpr,  # one tap, and BLOCK_K holds all channels
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    slab, group = tl.program_id(1), tl.program_id(2)
    k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_valid = k < out_channels
    k += group * out_channels
    all_out = groups * out_channels
    if SINGLE:
        c = tl.arange(0, BLOCK_K)
        weight = load_weight(weight_ptr, k, k_valid, 0, 1, c, channels)
    count = 0.0
    mean = tl.zeros((BLOCK_N,), tl.float32)
    m2 = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(slab * slab_tiles, tl.minimum(slab * slab_tiles + slab_tiles, tiles)):
        rows = tile_rows(tile, images, height, width, POINTWISE, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if SINGLE:
            pixel, inside = source_pixels(rows, 0, 0, height, width)
            a = load_activation(
                x_ptr, affine_ptr, mean_ptr, pixel, inside, group * channels + c, c < channels, groups * channels, RELU
            )
            acc = dot(a, weight, acc, PRECISION)
        else:
            acc = convolve(
                acc, x_ptr, affine_ptr, mean_ptr, weight_ptr, rows, k, k_valid, group, groups, channels, height, width,
                RELU, PRECISION, BLOCK_K,
            )  # fmt: skip
        y = acc.to(y_ptr.dtype.element_ty)
        valid = rows[3]
        pixel = result_pixels(rows, height, width)
        tl.store(y_ptr + pixel[:, None] * all_out + k[None, :], y, mask=valid[:, None] & k_valid[None, :])
        if partial_ptr is not None:
            pixels = tl.sum(valid.to(tl.float32), 0)
            tile_mean, tile_m2 = tile_moments(y.to(tl.float32), valid, pixels)
            count, mean, m2 = merge_moments(count, mean, m2, pixels, tile_mean, tile_m2)
    if partial_ptr is not None:
        at = partial_ptr + slab.to(tl.int64) * 2 * all_out + k
        tl.store(at, mean, mask=k_valid)
        tl.store(at + all_out, m2, mask=k_valid)


def conv_stats(
    x: Tensor,
    affine: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, y_mean, y_var); the moments are empty where they are not asked for."""
    product = product_of(x, weight, stride, padding, dilation, groups)
    check_prologue(affine, mean, x)
    out_channels, pixels = weight.shape[0], product.pixels
    y = torch.empty(
        (x.shape[0], out_channels, product.height.rows, product.width.rows),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    plan = forward_schedule(product, x.dtype)
    partial = None
    if moments:
        partial = torch.empty((plan.slabs, 2, out_channels), dtype=torch.float32, device=x.device)
    walked = product.flattened() if product.is_pointwise else product
    conv_stats_kernel[plan.blocks, plan.slabs, groups](
        x, affine, mean if affine is not None else None, packed_weight(weight, x.dtype), y, partial,
        walked.images, walked.height, walked.width, plan.tiles, plan.slab_tiles,
        product.channels, product.out_channels, groups,
        RELU=relu, POINTWISE=product.is_pointwise, SINGLE=plan.single, PRECISION=precision(x), **plan.options,
    )  # fmt: skip
    if partial is None:
        nothing = torch.empty(0, dtype=torch.float32, device=x.device)
        return y, nothing, nothing.clone()
    y_mean, y_var = merge_slabs(partial, plan.slab_tiles * plan.config.block_m, pixels)
    return y, y_mean, y_var
