"""conv_act: out = act(conv(act((x - mean)*scale_x + bias_x), weight)*scale + shift + r), and the moments of out.

r is absent, a residual, a raw residual normalised, or a 1x1 convolution of another activation: a branch. A convolution
whose batch normalisation is folded into its weight, with its residual and activation, is one pass over x and out, and
no other activation. It is inference, and the forward pass of train-time folding. A branch continues the accumulator:
more columns of the same product, [a | branch] [weight | branch_weight]^T. Each input is read once for each block of
output channels (from the L2 cache but for the first) and tap, out is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.gemm import (
    Product,
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
from resfuse._triton.launch import check_image, check_prologue, check_vector, precision
from resfuse._triton.merge import merge_moments as merge_slabs
from resfuse._triton.schedule import act_schedule
from resfuse._triton.tiles import activate, dot, merge_moments, normalized, tile_moments


@Kernel
@triton.jit(do_not_specialize=["images", "height", "width", "branch_height", "branch_width", "tiles", "slab_tiles"])
def conv_act_kernel(
    x_ptr,  # (images, source height, source width, groups*channels)
    affine_ptr,  # (2, groups*channels) or None: bias and scale
    mean_ptr,  # (groups*channels) or None
    weight_ptr,  # (groups*out_channels, taps, channels)
    scale_ptr,  # (groups*out_channels) or None
    shift_ptr,  # (groups*out_channels)
    residual_ptr,  # as out, or None
    residual_affine_ptr,  # (2, groups*out_channels), or None where the residual is added as it is
    residual_mean_ptr,
    branch_ptr,  # (images, branch height, branch width, branch_channels) or None
    branch_weight_ptr,  # (out_channels, branch_channels)
    out_ptr,  # (images, result height, result width, groups*out_channels)
    partial_ptr,  # (slabs, 2, groups*out_channels) or None: mean and squared deviations
    images,
    height,
    width,
    branch_height,
    branch_width,
    tiles,
    slab_tiles,
    channels,  # of one group, as out_channels
    out_channels,
    groups,
    branch_channels,
    RELU_X: tl.constexpr,
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
                x_ptr, affine_ptr, mean_ptr, pixel, inside, group * channels + c, c < channels, groups * channels,
                RELU_X,
            )  # fmt: skip
            acc = dot(a, weight, acc, PRECISION)
        else:
            acc = convolve(
                acc, x_ptr, affine_ptr, mean_ptr, weight_ptr, rows, k, k_valid, group, groups, channels, height, width,
                RELU_X, PRECISION, BLOCK_K,
            )  # fmt: skip
        if scale_ptr is not None:
            acc *= tl.load(scale_ptr + k, mask=k_valid, other=0.0)[None, :]
        if branch_ptr is not None:
            acc = convolve(
                acc, branch_ptr, None, None, branch_weight_ptr, rows, k, k_valid, 0, 1, branch_channels,
                branch_height, branch_width, False, PRECISION, BLOCK_K,
            )  # fmt: skip
        valid = rows[3]
        at = result_pixels(rows, height, width)[:, None] * all_out + k[None, :]
        mask = valid[:, None] & k_valid[None, :]
        z = acc + tl.load(shift_ptr + k, mask=k_valid, other=0.0)[None, :]
        if residual_ptr is not None:
            r = tl.load(residual_ptr + at, mask=mask, other=0.0)
            z += normalized(r, residual_affine_ptr, residual_mean_ptr, k, k_valid, all_out, False)
        out = activate(z, RELU).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out, mask=mask)
        if partial_ptr is not None:
            pixels = tl.sum(valid.to(tl.float32), 0)
            tile_mean, tile_m2 = tile_moments(out.to(tl.float32), valid, pixels)
            count, mean, m2 = merge_moments(count, mean, m2, pixels, tile_mean, tile_m2)
    if partial_ptr is not None:
        at = partial_ptr + slab.to(tl.int64) * 2 * all_out + k
        tl.store(at, mean, mask=k_valid)
        tl.store(at + all_out, m2, mask=k_valid)


class _Branch(NamedTuple):
    """A 1x1 convolution beside another: its tensors as the kernel takes them, and its shape."""

    x: Tensor | None
    weight: Tensor | None
    product: Product

    @property
    def is_strided(self) -> bool:
        return self.x is not None and not self.product.is_pointwise


def _branch_beside(
    first: Product,
    x: Tensor,
    weight: Tensor,
    branch: Tensor | None,
    branch_weight: Tensor | None,
    stride: Sequence[int],
) -> _Branch:
    """The branch, checked to add up with the first convolution; without one, that one's shape in its place."""
    if branch is None:
        return _Branch(None, None, first)
    check_image(branch, "branch", like=x)
    if branch_weight is None or branch_weight.dtype != weight.dtype or branch_weight.shape[2:] != (1, 1):
        raise ValueError("branch_weight must be (K, C, 1, 1) in weight's dtype")
    product = product_of(branch, branch_weight, stride, (0, 0), (1, 1), 1)
    same = (product.images, product.height.rows, product.width.rows, product.out_channels)
    if not first.is_pointwise or first.groups > 1 or same != (
        first.images, first.height.rows, first.width.rows, first.out_channels,
    ):  # fmt: skip
        raise ValueError("a branch must be a 1x1 convolution with the output of another, dense and of stride 1")
    return _Branch(branch, packed_weight(branch_weight, x.dtype), product)


def conv_act(
    x: Tensor,
    affine: Tensor | None,
    mean: Tensor | None,
    relu_x: bool,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    residual_mean: Tensor | None,
    branch: Tensor | None,
    branch_weight: Tensor | None,
    branch_stride: Sequence[int],
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, out_mean, out_var); the moments are empty where they are not asked for."""
    product = product_of(x, weight, stride, padding, dilation, groups)
    check_prologue(affine, mean, x)
    out_channels, pixels = weight.shape[0], product.pixels
    check_vector(shift, out_channels, x.device, "shift")
    if scale is not None:
        check_vector(scale, out_channels, x.device, "scale")
    second = _branch_beside(product, x, weight, branch, branch_weight, branch_stride)
    shape = (x.shape[0], out_channels, product.height.rows, product.width.rows)
    if residual is None:
        residual_affine = None
    else:
        check_image(residual, "residual", like=x, shape=shape)
        check_prologue(residual_affine, residual_mean, residual, "residual_affine")
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    vectors = scale is not None or residual_affine is not None or moments
    plan = act_schedule(
        product, x.dtype, plain=branch is None and not vectors, crowded=vectors and affine is not None
    )  # fmt: skip
    partial = None
    if moments:
        partial = torch.empty((plan.slabs, 2, out_channels), dtype=torch.float32, device=x.device)
    flat = product.is_pointwise and not second.is_strided
    walked = product.flattened() if flat else product
    aside = second.product.flattened() if flat else second.product
    conv_act_kernel[plan.blocks, plan.slabs, groups](
        x, affine, mean if affine is not None else None, packed_weight(weight, x.dtype), scale, shift,
        residual, residual_affine, residual_mean if residual_affine is not None else None, second.x, second.weight,
        out, partial, walked.images, walked.height, walked.width, aside.height, aside.width,
        plan.tiles, plan.slab_tiles, product.channels, product.out_channels, groups, second.product.channels,
        RELU_X=relu_x, RELU=relu, POINTWISE=flat, SINGLE=plan.single, PRECISION=precision(x), **plan.options,
    )  # fmt: skip
    if partial is None:
        nothing = torch.empty(0, dtype=torch.float32, device=x.device)
        return out, nothing, nothing.clone()
    return out, *merge_slabs(partial, plan.slab_tiles * plan.config.block_m, pixels)
