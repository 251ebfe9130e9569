"""The backward of train-time folding, for out = act(a W'^T + shift + r), a = act((x - mean)*scale + bias).

    weight:  dz = grad_out where out is active (written: it is the residual's gradient), G = dz^T a, column sums of dz
    input:   da = [dz | a | 1] [[W'], [-Q], [row]], one accumulator over two products and a constant; then through the
             prologue: grad_x = da*scale where a is active, and the sums of that da and of da*(x - mean)

`weight` reads grad_out and out once for each block of channels, x once for each block of output channels (from the L2
cache but for the first), and writes dz; its programs sum over slabs of pixels, added in a fixed order. `input` reads dz
and x once for each block of channels, and x again in its epilogue, and writes grad_x. The C-length and C-by-C algebra
between the two is resfuse/autograd_folding.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.gemm import (
    load_activation,
    product_of,
    result_pixels,
    source_pixels,
    tile_rows,
)
from resfuse._triton.kernel import Kernel
from resfuse._triton.launch import check_image, check_matrix, check_prologue, check_vector, precision
from resfuse._triton.merge import sum_partials
from resfuse._triton.schedule import expand_input_schedule, expand_weight_schedule
from resfuse._triton.tiles import active_gradient, dot, scale_and_shift


@Kernel
@triton.jit(do_not_specialize=["pixels", "tiles", "slab_tiles"])
def expand_weight_kernel(
    grad_ptr,  # (pixels, out_channels)
    out_ptr,  # (pixels, out_channels), or None where nothing is masked
    x_ptr,  # (pixels, channels)
    affine_ptr,  # (2, channels) or None: bias and scale
    mean_ptr,  # (channels) or None
    dz_ptr,  # (pixels, out_channels)
    products_ptr,  # (slabs, out_channels, channels)
    sums_ptr,  # (slabs, out_channels)
    pixels,
    tiles,
    slab_tiles,
    channels,
    out_channels,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # output channels
    BLOCK_N: tl.constexpr,  # channels
    BLOCK_K: tl.constexpr,  # pixels
):
    block, slab = tl.program_id(0), tl.program_id(2)
    k = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = block * BLOCK_N + tl.arange(0, BLOCK_N)
    written = tl.where(block == 0, out_channels, 0)  # dz and its sums are the first block's
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for tile in range(slab * slab_tiles, tl.minimum(slab * slab_tiles + slab_tiles, tiles)):
        pixel = (tile * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        valid = pixel < pixels
        at = pixel[:, None] * out_channels + k[None, :]
        mask = valid[:, None] & (k < out_channels)[None, :]
        dz = tl.load(grad_ptr + at, mask=mask, other=0.0)
        if out_ptr is not None:
            dz = active_gradient(dz, tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32), True)
        tl.store(dz_ptr + at, dz, mask=mask & (k < written)[None, :])
        sums += dz.to(tl.float32)
        a = load_activation(x_ptr, affine_ptr, mean_ptr, pixel, valid, c, c < channels, channels, RELU)
        products = dot(tl.trans(dz), a, products, PRECISION)
    k_long, slab = k.to(tl.int64), slab.to(tl.int64)
    at = (slab * out_channels + k_long[:, None]) * channels + c[None, :]
    tl.store(products_ptr + at, products, mask=(k < out_channels)[:, None] & (c < channels)[None, :])
    tl.store(sums_ptr + slab * out_channels + k, tl.sum(sums, 0), mask=k < written)


def expand_bn_act_backward_weight(
    grad_out: Tensor, out: Tensor | None, x: Tensor, affine: Tensor | None, mean: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dz (as grad_out), G = dz^T a (K, C) and the column sums of dz (K,), both float32."""
    channels, out_channels = x.shape[1], grad_out.shape[1]
    pixels = product_of(x, x.new_empty(1, channels, 1, 1), (1, 1), (0, 0), (1, 1), 1).pixels
    check_image(grad_out, "grad_out", like=x, shape=(x.shape[0], out_channels, *x.shape[2:]))
    if out is not None:
        check_image(out, "out", like=x, shape=grad_out.shape)
    check_prologue(affine, mean, x)
    plan = expand_weight_schedule(pixels, channels, out_channels, x.dtype)
    dz = torch.empty_like(grad_out)
    products = torch.empty((plan.slabs, out_channels, channels), dtype=torch.float32, device=x.device)
    sums = products.new_empty(plan.slabs, out_channels)
    expand_weight_kernel[plan.blocks, triton.cdiv(out_channels, plan.config.block_m), plan.slabs](
        grad_out, out, x, affine, mean if affine is not None else None, dz, products, sums,
        pixels, plan.tiles, plan.slab_tiles, channels, out_channels,
        RELU=relu, PRECISION=precision(x), **plan.options,
    )  # fmt: skip
    return dz, sum_partials(products), sum_partials(sums)


@triton.jit
def _multiply_gradient(
    acc, dz_ptr, pixel, valid, weight_ptr, c, c_valid, channels, out_channels,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + dz W' for a tile's rows and the channels c."""
    for begin in range(0, out_channels, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        inside = k < out_channels
        at = dz_ptr + pixel[:, None] * out_channels + k[None, :]
        dz = tl.load(at, mask=valid[:, None] & inside[None, :], other=0.0)
        at = weight_ptr + k[:, None].to(tl.int64) * channels + c[None, :]
        acc = dot(dz, tl.load(at, mask=inside[:, None] & c_valid[None, :], other=0.0), acc, PRECISION)
    return acc


@triton.jit
def _multiply_activation(
    acc, x_ptr, affine_ptr, mean_ptr, pixel, valid, correction_ptr, c, c_valid, channels,
    RELU: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc - a Q for a tile's rows and the channels c."""
    for begin in range(0, channels, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        inside = k < channels
        a = load_activation(x_ptr, affine_ptr, mean_ptr, pixel, valid, k, inside, channels, RELU)
        at = correction_ptr + k[:, None].to(tl.int64) * channels + c[None, :]
        acc = dot(a, tl.load(at, mask=inside[:, None] & c_valid[None, :], other=0.0), acc, PRECISION)
    return acc


@Kernel
@triton.jit(do_not_specialize=["images", "height", "width", "tiles", "slab_tiles"])
def expand_input_kernel(
    dz_ptr,  # (images, height, width of the output, out_channels)
    x_ptr,  # (images, height, width, channels)
    affine_ptr,  # (2, channels) or None: bias and scale
    mean_ptr,  # (channels) or None
    weight_ptr,  # (out_channels, channels): W'
    correction_ptr,  # (channels, channels): -Q
    row_ptr,  # (channels)
    grad_x_ptr,  # as x
    sums_ptr,  # (slabs, 2, channels): of da where a is active, and of da*(x - mean)
    images,
    height,
    width,
    tiles,
    slab_tiles,
    channels,
    out_channels,
    RELU: tl.constexpr,
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    slab = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_valid = c < channels
    bias_sums = tl.zeros((BLOCK_N,), tl.float32)
    scale_sums = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(slab * slab_tiles, tl.minimum(slab * slab_tiles + slab_tiles, tiles)):
        rows = tile_rows(tile, images, height, width, POINTWISE, BLOCK_M)
        x_pixel, valid = source_pixels(rows, 0, 0, height, width)
        dz_pixel = result_pixels(rows, height, width)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _multiply_gradient(
            acc, dz_ptr, dz_pixel, valid, weight_ptr, c, c_valid, channels, out_channels, PRECISION, BLOCK_K
        )
        acc = _multiply_activation(
            acc, x_ptr, affine_ptr, mean_ptr, x_pixel, valid, correction_ptr, c, c_valid, channels,
            RELU, PRECISION, BLOCK_K,
        )  # fmt: skip
        da = acc + tl.load(row_ptr + c, mask=c_valid, other=0.0)[None, :]
        at = x_pixel[:, None] * channels + c[None, :]
        mask = valid[:, None] & c_valid[None, :]
        if affine_ptr is not None:
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            scale, shift = scale_and_shift(affine_ptr, mean_ptr, c, c_valid, channels)
            da = tl.where(mask, active_gradient(da, x * scale[None, :] + shift[None, :], RELU), 0.0)
            mean = tl.load(mean_ptr + c, mask=c_valid, other=0.0)
            bias_sums += tl.sum(da, 0)
            scale_sums += tl.sum(da * (x - mean[None, :]), 0)
            da *= scale[None, :]
        tl.store(grad_x_ptr + at, da.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if affine_ptr is not None:
        at = sums_ptr + slab.to(tl.int64) * 2 * channels + c
        tl.store(at, bias_sums, mask=c_valid)
        tl.store(at + channels, scale_sums, mask=c_valid)


def expand_bn_act_backward_input(
    dz: Tensor,
    x: Tensor,
    affine: Tensor | None,
    mean: Tensor | None,
    relu: bool,
    weight: Tensor,
    correction: Tensor,
    row: Tensor,
    stride: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """grad_x, zero where the strided convolution did not read, and beside a prologue the gradient of affine (2, C)."""
    channels, out_channels = x.shape[1], dz.shape[1]
    product = product_of(x, x.new_empty(1, channels, 1, 1), stride, (0, 0), (1, 1), 1)
    check_image(dz, "dz", like=x, shape=(x.shape[0], out_channels, product.height.rows, product.width.rows))
    check_prologue(affine, mean, x)
    check_vector(row, channels, x.device, "row")
    check_matrix(weight, out_channels, channels, x.dtype, x.device, "weight")
    check_matrix(correction, channels, channels, torch.float32, x.device, "correction")
    plan = expand_input_schedule(product.pixels, channels, x.dtype)
    every_pixel = product.is_pointwise
    walked = product.flattened() if every_pixel else product
    grad_x = torch.empty_like(x) if every_pixel else torch.zeros_like(x)
    sums = torch.empty((plan.slabs, 2, channels) if affine is not None else (0,), dtype=torch.float32, device=x.device)
    expand_input_kernel[plan.blocks, plan.slabs](
        dz, x, affine, mean if affine is not None else None, weight, correction.to(x.dtype), row, grad_x, sums,
        walked.images, walked.height, walked.width, plan.tiles, plan.slab_tiles, channels, out_channels,
        RELU=relu, POINTWISE=every_pixel, PRECISION=precision(x), **plan.options,
    )  # fmt: skip
    return grad_x, sums if affine is None else sum_partials(sums)
