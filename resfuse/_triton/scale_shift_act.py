"""scale_shift_act in Triton: out = act(x*scale + shift + r), r absent, residual, or residual*scale_r + shift_r.

One read of each operand and one write: two or three accesses per element. The second form also gives the moments of
the result, of the values that were just rounded and stored, without reading them again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.kernel import Kernel
from resfuse._triton.merge import merge_moments
from resfuse._triton.tiles import activate
from resfuse._triton.walk import (
    Walk,
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


@triton.jit
def preactivation(x, scale, shift, residual, residual_scale, residual_shift, RESIDUAL: tl.constexpr):
    """x*scale + shift + r, rounded after each step: backward computes the same bits again for its mask.

    RESIDUAL is 0 where there is none, 1 for a residual that is added as it is, 2 for a raw one.
    """
    z = x * scale + shift
    if RESIDUAL == 1:
        z = z + residual
    if RESIDUAL == 2:
        z = z + (residual * residual_scale + residual_shift)
    return z


@triton.jit
def load_tile(pointer, at, inside, otherwise):
    """A tile in the dtype of `otherwise`, which stands for it where there is no such activation."""
    if pointer is not None:
        otherwise = tl.load(pointer + at, mask=inside, other=0.0).to(otherwise.dtype)
    return otherwise


@triton.jit
def optional_vector(pointer, channel, valid, otherwise):
    """A per-channel vector, or what stands for it where there is none."""
    if pointer is not None:
        otherwise = vector(pointer, channel, valid)
    return otherwise


@triton.jit
def result(
    x_ptr,
    residual_ptr,
    at,
    inside,
    scale,
    shift,
    residual_scale,
    residual_shift,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
):
    """What is stored of a tile."""
    x = load_tile(x_ptr, at, inside, scale)
    residual = load_tile(residual_ptr, at, inside, scale)
    z = preactivation(x, scale, shift, residual, residual_scale, residual_shift, RESIDUAL)
    return activate(z, RELU).to(x_ptr.dtype.element_ty)


@Kernel
@triton.jit(do_not_specialize=["pixels"])
def scale_shift_act_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    residual_scale_ptr,
    residual_shift_ptr,
    out_ptr,
    partial_ptr,  # (slabs, 2, channels) where the result's moments are wanted
    pixels,
    channels,
    plane,
    slab,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part, channel, valid = own_block(channels, BLOCK_C)
    scale = vector(scale_ptr, channel, valid)
    shift = vector(shift_ptr, channel, valid)
    residual_scale = optional_vector(residual_scale_ptr, channel, valid, scale)
    residual_shift = optional_vector(residual_shift_ptr, channel, valid, shift)
    RESIDUAL: tl.constexpr = (residual_ptr is not None) + (residual_scale_ptr is not None)
    first = part * slab
    end = tl.minimum(first + slab, pixels)
    pivot = tl.zeros((1, BLOCK_C), scale.dtype)
    if partial_ptr is not None:
        origin = places(first * 0, channel, channels, plane, CHANNELS_LAST, 1)
        first_out = result(
            x_ptr, residual_ptr, origin, valid[None, :], scale, shift, residual_scale, residual_shift, RESIDUAL, RELU
        )
        pivot = pivot_of(first_out.to(scale.dtype))
    mean = tl.zeros((BLOCK_M, BLOCK_C), scale.dtype)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), scale.dtype)
    steps = 1 if partial_ptr is None else slab // BLOCK_M  # without sums a program takes one tile
    for step in range(0, steps):
        begin = first + step * BLOCK_M
        inside = (begin + tl.arange(0, BLOCK_M) < end)[:, None] & valid[None, :]
        at = places(begin, channel, channels, plane, CHANNELS_LAST, BLOCK_M)
        out = result(x_ptr, residual_ptr, at, inside, scale, shift, residual_scale, residual_shift, RESIDUAL, RELU)
        tl.store(out_ptr + at, out, mask=inside)
        if partial_ptr is not None:
            mean, m2 = add_to_streams(mean, m2, out.to(scale.dtype) - pivot, inside, step)
    if partial_ptr is not None:
        store_moments(partial_ptr, pivot, mean, m2, first, end, part, channel, valid, channels, BLOCK_M)


def _run(
    x: Tensor,
    affine: tuple[Tensor, Tensor],
    residual: tuple[Tensor | None, Tensor | None, Tensor | None],
    relu: bool,
    out: Tensor,
    walk: Walk,
    partial: Tensor | None = None,
) -> None:
    beside(x, residual=residual[0], out=out)
    check_vectors(x, scale=affine[0], shift=affine[1], residual_scale=residual[1], residual_shift=residual[2])
    if x.numel() > 0:
        arguments = (x, *affine, *residual, out, partial, *walk.sizes)
        scale_shift_act_kernel[walk.grid](*arguments, RELU=relu, **walk.options)


def scale_shift_act(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
    relu: bool,
) -> Tensor:
    out = torch.empty_like(x)
    _run(x, (scale, shift), (residual, residual_scale, residual_shift), relu, out, walk_over(x))
    return out


def scale_shift_act_(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
    relu: bool,
) -> None:
    _run(x, (scale, shift), (residual, residual_scale, residual_shift), relu, x, walk_over(x))


def scale_shift_act_moments(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        raise RuntimeError("resfuse: an empty activation has no moments")
    out, walk = torch.empty_like(x), walk_over(x, reduces=True)
    partial = torch.empty(walk.parts, 2, walk.channels, dtype=torch.float64, device=x.device)
    _run(x, (scale, shift), (residual, residual_scale, residual_shift), relu, out, walk, partial)
    return out, *merge_moments(partial, walk.slab, walk.pixels, scale.dtype)
