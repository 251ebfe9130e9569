"""The kernels of conv_stats_backward: two products whose operands are computed while they are loaded.

  dY = grad_y*y_scale + grad_mean/M + 2*grad_var/M * (y - y_mean)  never stored; grad_y masked where a ReLU follows
  grad_weight = wgrad(dY, a), a = act((x - mean)*scale + bias)     a never stored
  da = dgrad(dY, weight);  dz = da where act was active;  grad_x = dz*scale + other
  sums: dz and dz*(x - mean), the gradients of bias and scale

Both programs take slabs of rows, as conv_stats does. Rows of the gradient to the input are input pixels of one phase of
the stride; rows of the weight's are output pixels, and a slab's product is one partial of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resfuse._triton.gemm import load_activation, result_pixels, source_pixels, tile_rows
from resfuse._triton.kernel import Kernel
from resfuse._triton.tiles import active_gradient, dot, scale_and_shift


@triton.jit
def load_gradient(
    grad_ptr, y_ptr, affine_ptr, mean_ptr, grad_mean_ptr, grad_var_ptr, count, pixel, inside, channel, k_valid,
    all_channels, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of dY in grad_y's dtype; grad_y itself where y is None; zero outside."""
    mask = inside[:, None] & k_valid[None, :]
    at = pixel[:, None] * all_channels + channel[None, :]
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
    if y_ptr is not None:
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dz = grad.to(tl.float32)
        if affine_ptr is not None:
            scale, shift = scale_and_shift(affine_ptr, mean_ptr, channel, k_valid, all_channels)
            dz = active_gradient(dz, y * scale[None, :] + shift[None, :], MASKED) * scale[None, :]
        if grad_mean_ptr is not None:
            dz += tl.load(grad_mean_ptr + channel, mask=k_valid, other=0.0)[None, :] / count
        if grad_var_ptr is not None:
            slope = 2 * tl.load(grad_var_ptr + channel, mask=k_valid, other=0.0) / count
            dz += slope[None, :] * (y - tl.load(mean_ptr + channel, mask=k_valid, other=0.0)[None, :])
        grad = tl.where(mask, dz, 0.0).to(grad_ptr.dtype.element_ty)
    return grad


@triton.jit
def load_transposed_weight(weight_ptr, k, k_valid, tap, taps, c, c_valid, channels):
    """A tile of the weight at one tap, (k, c): k counts the output channels of all groups, c those of one."""
    at = (k[:, None].to(tl.int64) * taps + tap) * channels + c[None, :]
    return tl.load(weight_ptr + at, mask=k_valid[:, None] & c_valid[None, :], other=0.0)


@Kernel
@triton.jit(
    do_not_specialize=["count", "images", "height", "width", "kernel_width", "tiles", "slab_tiles", "first_slab"]
)
def input_gradient_kernel(
    grad_ptr,  # (images, source height, source width, groups*out_channels), as y
    y_ptr,  # or None: grad is dY, and what follows up to grad_var is None
    y_affine_ptr,
    y_mean_ptr,
    grad_mean_ptr,
    grad_var_ptr,
    count,
    weight_ptr,  # (groups*out_channels, taps, channels)
    x_ptr,  # (images, result height, result width, groups*channels), as other and grad_x
    affine_ptr,  # (2, groups*channels) or None: bias and scale
    mean_ptr,
    other_ptr,  # or None; may be grad_x
    grad_x_ptr,
    partial_ptr,  # (slabs, 2, groups*channels) where affine is given: sums of dz and dz*(x - mean)
    images,
    height,
    width,
    kernel_width,
    taps,  # of the weight; a phase meets height.taps * width.taps of them
    tiles,
    slab_tiles,
    first_slab,
    channels,  # of one group, as out_channels
    out_channels,
    groups,
    Y_RELU: tl.constexpr,
    RELU: tl.constexpr,
    POINTWISE: tl.constexpr,
    SINGLE: tl.constexpr,  # one tap, and BLOCK_K holds all output channels
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    slab, group = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_valid = c < channels
    channel = group * channels + c
    all_channels, all_out = groups * channels, groups * out_channels
    if SINGLE:
        k = tl.arange(0, BLOCK_K)
        k_valid = k < out_channels
        k += group * out_channels
        tap = height.weight_start * kernel_width + width.weight_start
        weight = load_transposed_weight(weight_ptr, k, k_valid, tap, taps, c, c_valid, channels)
    chunks = tl.cdiv(out_channels, BLOCK_K)
    if affine_ptr is not None:
        scale, shift = scale_and_shift(affine_ptr, mean_ptr, channel, c_valid, all_channels)
        mean = tl.load(mean_ptr + channel, mask=c_valid, other=0.0)
    sum_dz = tl.zeros((BLOCK_N,), tl.float32)
    sum_centered = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(slab * slab_tiles, tl.minimum(slab * slab_tiles + slab_tiles, tiles)):
        rows = tile_rows(tile, images, height, width, POINTWISE, BLOCK_M)
        dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if SINGLE:
            pixel, inside = source_pixels(rows, 0, 0, height, width)
            grad = load_gradient(
                grad_ptr, y_ptr, y_affine_ptr, y_mean_ptr, grad_mean_ptr, grad_var_ptr, count, pixel, inside, k,
                k_valid, all_out, Y_RELU,
            )  # fmt: skip
            dz = dot(grad, weight, dz, PRECISION)
        else:
            for step in range(0, height.taps * width.taps * chunks):
                tap = step // chunks
                tap_h, tap_w = tap // width.taps, tap % width.taps
                k = (step - tap * chunks) * BLOCK_K + tl.arange(0, BLOCK_K)
                k_valid = k < out_channels
                k += group * out_channels
                pixel, inside = source_pixels(rows, tap_h, tap_w, height, width)
                grad = load_gradient(
                    grad_ptr, y_ptr, y_affine_ptr, y_mean_ptr, grad_mean_ptr, grad_var_ptr, count, pixel, inside, k,
                    k_valid, all_out, Y_RELU,
                )  # fmt: skip
                weight_h = height.weight_start + tap_h * height.weight_step
                weight_w = width.weight_start + tap_w * width.weight_step
                tap = weight_h * kernel_width + weight_w
                weight = load_transposed_weight(weight_ptr, k, k_valid, tap, taps, c, c_valid, channels)
                dz = dot(grad, weight, dz, PRECISION)
        at = result_pixels(rows, height, width)[:, None] * all_channels + channel[None, :]
        mask = rows[3][:, None] & c_valid[None, :]
        if affine_ptr is not None:
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            dz = tl.where(mask, active_gradient(dz, x * scale[None, :] + shift[None, :], RELU), 0.0)
            sum_dz += tl.sum(dz, 0)
            sum_centered += tl.sum(dz * (x - mean[None, :]), 0)
            dz *= scale[None, :]
        if other_ptr is not None:
            dz += tl.load(other_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at, dz.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if affine_ptr is not None:
        at = partial_ptr + (first_slab + slab).to(tl.int64) * 2 * all_channels + channel
        tl.store(at, sum_dz, mask=c_valid)
        tl.store(at + all_channels, sum_centered, mask=c_valid)


@Kernel
@triton.jit(do_not_specialize=["count", "images", "height", "width", "tiles", "slab_tiles"])
def weight_gradient_kernel(
    grad_ptr,  # (images, result height, result width, groups*out_channels), as y
    y_ptr,  # or None: grad is dY, and what follows up to grad_var is None
    y_affine_ptr,
    y_mean_ptr,
    grad_mean_ptr,
    grad_var_ptr,
    count,
    x_ptr,  # (images, source height, source width, groups*channels)
    affine_ptr,  # (2, groups*channels) or None: bias and scale
    mean_ptr,
    partial_ptr,  # (slabs, groups*out_channels, taps, channels)
    images,
    height,
    width,
    tiles,
    slab_tiles,
    channels,  # of one group, as out_channels
    out_channels,
    groups,
    Y_RELU: tl.constexpr,
    RELU: tl.constexpr,
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # output channels
    BLOCK_N: tl.constexpr,  # input channels
    BLOCK_K: tl.constexpr,  # pixels of one step
):
    """The grid: blocks of output channels by blocks of input channels by taps; slabs; groups."""
    slab, group = tl.program_id(1), tl.program_id(2)
    blocks = tl.cdiv(out_channels, BLOCK_M)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    taps = height.taps * width.taps
    tap = rest % taps
    k = block * BLOCK_M + tl.arange(0, BLOCK_M)
    c = rest // taps * BLOCK_N + tl.arange(0, BLOCK_N)
    k_valid, c_valid = k < out_channels, c < channels
    k += group * out_channels
    all_out = groups * out_channels
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(slab * slab_tiles, tl.minimum(slab * slab_tiles + slab_tiles, tiles)):
        rows = tile_rows(tile, images, height, width, POINTWISE, BLOCK_K)
        grad = load_gradient(
            grad_ptr, y_ptr, y_affine_ptr, y_mean_ptr, grad_mean_ptr, grad_var_ptr, count,
            result_pixels(rows, height, width), rows[3], k, k_valid, all_out, Y_RELU,
        )  # fmt: skip
        pixel, inside = source_pixels(rows, tap // width.taps, tap % width.taps, height, width)
        a = load_activation(
            x_ptr, affine_ptr, mean_ptr, pixel, inside, group * channels + c, c_valid, groups * channels, RELU
        )
        acc = dot(tl.trans(grad), a, acc, PRECISION)
    at = ((slab.to(tl.int64) * all_out + k)[:, None] * taps + tap) * channels + c[None, :]
    tl.store(partial_ptr + at, acc, mask=k_valid[:, None] & c_valid[None, :])
