"""What merges the partial results of programs, in a fixed order: moments, and sums over pixels.

A program takes a slab: `slab` consecutive rows (pixels) of a column block. It writes one partial, so that the order of
every sum depends on the shape alone and no atomic is needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.kernel import Kernel

# (parts, channels) of a program's tile, 4096 elements but for the first: few forms, since each is compiled by itself,
# and many parts side by side, so that few steps wait for memory
_TILES = ((4, 512), (16, 256), (64, 64), (256, 16))


def _tile(parts: int) -> tuple[int, int]:
    """Parts and channels of a program's tile."""
    return next((tile for tile in _TILES if tile[0] >= parts), _TILES[-1])


@Kernel
@triton.jit(do_not_specialize=["parts", "slab", "rows"])
def merge_moments_kernel(
    partial_ptr,  # (parts, 2, channels): mean and squared deviations of each slab
    mean_ptr,
    var_ptr,
    parts,
    slab,
    rows,
    channels,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    sums = tl.zeros((PARTS, CHANNELS), tl.float64)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS).to(tl.int64)
        mask = (part < parts)[:, None] & valid[None, :]
        count = tl.minimum(slab, rows - part * slab).to(tl.float64)
        means = tl.load(partial_ptr + part[:, None] * 2 * channels + channel[None, :], mask=mask, other=0.0)
        sums += tl.where(mask, means.to(tl.float64) * count[:, None], 0.0)
    mean = tl.sum(sums, 0) / rows
    sums = tl.zeros((PARTS, CHANNELS), tl.float64)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS).to(tl.int64)
        mask = (part < parts)[:, None] & valid[None, :]
        count = tl.minimum(slab, rows - part * slab).to(tl.float64)
        at = partial_ptr + part[:, None] * 2 * channels + channel[None, :]
        delta = tl.load(at, mask=mask, other=0.0).to(tl.float64) - mean[None, :]
        squares = tl.load(at + channels, mask=mask, other=0.0).to(tl.float64)
        sums += tl.where(mask, squares + delta * delta * count[:, None], 0.0)
    tl.store(mean_ptr + channel, mean.to(mean_ptr.dtype.element_ty), mask=valid)
    tl.store(var_ptr + channel, (tl.sum(sums, 0) / rows).to(var_ptr.dtype.element_ty), mask=valid)


def merge_moments(partial: Tensor, slab: int, rows: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """mean and biased variance of `rows` pixels from (slabs, 2, C): the mean and squared deviations of each slab.

    Slabs are merged in float64 (Chan, Golub, LeVeque 1979); results have `dtype`, by default that of the slabs.
    """
    parts, _, channels = partial.shape
    mean, var = (torch.empty(channels, dtype=dtype or partial.dtype, device=partial.device) for _ in range(2))
    rows_of_parts, width = _tile(parts)
    merge_moments_kernel[(triton.cdiv(channels, width),)](
        partial, mean, var, parts, slab, rows, channels, PARTS=rows_of_parts, CHANNELS=width, enable_fp_fusion=False
    )
    return mean, var


@Kernel
@triton.jit(do_not_specialize=["parts"])
def sum_partials_kernel(partial_ptr, out_ptr, parts, size, PARTS: tl.constexpr, ELEMENTS: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    valid = element < size
    sums = tl.zeros((PARTS, ELEMENTS), partial_ptr.dtype.element_ty)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS).to(tl.int64)
        mask = (part < parts)[:, None] & valid[None, :]
        sums += tl.load(partial_ptr + part[:, None] * size + element[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + element, tl.sum(sums, 0).to(out_ptr.dtype.element_ty), mask=valid)


def sum_partials(partial: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over the first axis of a contiguous tensor, in a fixed order; in the tensor's own dtype by default."""
    out = torch.empty(partial.shape[1:], dtype=dtype or partial.dtype, device=partial.device)
    parts, elements = _tile(partial.shape[0])
    sum_partials_kernel[(triton.cdiv(out.numel(), elements),)](
        partial, out, partial.shape[0], out.numel(), PARTS=parts, ELEMENTS=elements, enable_fp_fusion=False
    )
    return out
