"""What merges the partial results of programs, in a fixed order: moments, and sums over pixels.

A program takes a slab: `slab` consecutive rows (pixels) of a column block. It writes one partial, so that the order of
every sum depends on the shape alone and no atomic is needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.tiles import finite_or_zero

_PARTS, _CHANNELS = 16, 64  # partials and channels that a program loads at once
_ELEMENTS = 512


@triton.jit
def _merge_moments_kernel(
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
    # deviations from the first slab's mean: merging cancels nothing where |mean| >> std
    center = finite_or_zero(tl.load(partial_ptr + channel, mask=valid, other=0.0))
    sums = tl.zeros((PARTS, CHANNELS), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS).to(tl.int64)
        mask = (part < parts)[:, None] & valid[None, :]
        count = tl.minimum(slab, rows - part * slab).to(tl.float32)
        means = tl.load(partial_ptr + part[:, None] * 2 * channels + channel[None, :], mask=mask, other=0.0)
        sums += tl.where(mask, (means - center[None, :]) * count[:, None], 0.0)
    mean = center + tl.sum(sums, 0) / rows
    sums = tl.zeros((PARTS, CHANNELS), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS).to(tl.int64)
        mask = (part < parts)[:, None] & valid[None, :]
        count = tl.minimum(slab, rows - part * slab).to(tl.float32)
        at = partial_ptr + part[:, None] * 2 * channels + channel[None, :]
        delta = tl.load(at, mask=mask, other=0.0) - mean[None, :]
        sums += tl.where(mask, tl.load(at + channels, mask=mask, other=0.0) + delta * delta * count[:, None], 0.0)
    tl.store(mean_ptr + channel, mean, mask=valid)
    tl.store(var_ptr + channel, tl.sum(sums, 0) / rows, mask=valid)


def merge_moments(partial: Tensor, slab: int, rows: int) -> tuple[Tensor, Tensor]:
    """mean and biased variance of `rows` pixels from (slabs, 2, C): the mean and squared deviations of each slab."""
    parts, _, channels = partial.shape
    mean, var = partial.new_empty(channels), partial.new_empty(channels)
    _merge_moments_kernel[(triton.cdiv(channels, _CHANNELS),)](
        partial, mean, var, parts, slab, rows, channels, PARTS=_PARTS, CHANNELS=_CHANNELS, enable_fp_fusion=False
    )
    return mean, var


@triton.jit
def _sum_partials_kernel(partial_ptr, out_ptr, parts, size, PARTS: tl.constexpr, ELEMENTS: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    valid = element < size
    sums = tl.zeros((PARTS, ELEMENTS), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS).to(tl.int64)
        mask = (part < parts)[:, None] & valid[None, :]
        sums += tl.load(partial_ptr + part[:, None] * size + element[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + element, tl.sum(sums, 0).to(out_ptr.dtype.element_ty), mask=valid)


def sum_partials(partial: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum over the first axis of a contiguous float32 tensor, in a fixed order."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    elements = min(_ELEMENTS, max(32, triton.next_power_of_2(triton.cdiv(out.numel(), 128))))
    _sum_partials_kernel[(triton.cdiv(out.numel(), elements),)](
        partial, out, partial.shape[0], out.numel(), PARTS=8, ELEMENTS=elements, enable_fp_fusion=False
    )
    return out
