"""How memory-bound kernels walk an activation: tiles of pixels by channels, in both layouts and for every C.

A program takes a slab, some consecutive tiles of pixels, of one block of channels. channels_last memory is a matrix of
pixels by channels; in contiguous memory a block is one channel, and its pixels lie in stretches of a plane. How an
activation is cut depends on its shape alone, so that every sum has one order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.configs import PASS_BYTES, REDUCTION_BYTES, Pass, pass_over

_PROGRAMS = 1024  # of a reduction: a few for each of a large GPU's multiprocessors


class Walk(NamedTuple):
    """An activation and how it is cut."""

    pixels: int
    channels: int
    plane: int  # pixels of one, or 1 in channels_last memory, where nobody asks: a kernel for all sizes
    channels_last: bool
    tile: Pass
    slab: int

    @property
    def parts(self) -> int:
        return triton.cdiv(self.pixels, self.slab)

    @property
    def grid(self) -> tuple[int]:
        return (self.parts * triton.cdiv(self.channels, self.tile.channels),)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What a kernel is told about it."""
        return self.pixels, self.channels, self.plane, self.slab

    @property
    def options(self) -> dict[str, object]:
        """Its compile-time arguments. No multiplication and addition contract: a mask has the same bits everywhere."""
        return {
            "CHANNELS_LAST": self.channels_last,
            "BLOCK_M": self.tile.pixels,
            "BLOCK_C": self.tile.channels,
            "num_warps": self.tile.warps,
            "enable_fp_fusion": False,
        }


def walk_over(x: Tensor, *, reduces: bool = False, tile_bytes: int | None = None) -> Walk:
    """The walk over x; `reduces`: programs are fewer and keep sums, else each takes one tile."""
    tile_bytes = tile_bytes or (REDUCTION_BYTES if reduces else PASS_BYTES)
    if x.dim() != 4 or not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        raise RuntimeError(f"resfuse: x must be (N, C, H, W), contiguous or channels_last, got strides {x.stride()}")
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    # what is dense in both orders has one channel, whose pixels lie in a row, or one pixel
    channels_last = not x.is_contiguous() or (channels > 1 and height * width == 1)
    tile = pass_over(pixels, channels, x.element_size(), channels_last=channels_last, tile_bytes=tile_bytes)
    tiles = triton.cdiv(pixels, tile.pixels)
    parts = max(1, _PROGRAMS // triton.cdiv(channels, tile.channels)) if reduces else tiles
    slab = tile.pixels * triton.cdiv(tiles, parts) if pixels > 0 else tile.pixels
    return Walk(pixels, channels, 1 if channels_last else height * width, channels_last, tile, slab)


def _steps(x: Tensor) -> list[int]:
    """The strides that address something: those of dimensions with more than one value."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def beside(x: Tensor, **others: Tensor | None) -> None:
    """Raise unless the others have x's shape, strides, dtype and device: kernels give them x's addresses."""
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != x.dtype or other.device != x.device:
            raise RuntimeError(f"resfuse: {name} must have the first tensor's dtype and device")
        if other.shape != x.shape or (_steps(other) != _steps(x) and other.numel() > 0):
            raise RuntimeError(f"resfuse: {name} must have the first tensor's shape and strides")


def check_vectors(x: Tensor, **vectors: Tensor | None) -> None:
    """Raise unless these are per-channel vectors beside x: kernels read them by the number of a channel."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != x.shape[1:2] or vector.device != x.device or not vector.is_contiguous():
            raise RuntimeError(f"resfuse: {name} must be contiguous of shape {tuple(x.shape[1:2])} and on {x.device}")
        if vector.dtype != accumulate_dtype(x.dtype):
            raise RuntimeError(f"resfuse: {name} must be {accumulate_dtype(x.dtype)}, got {vector.dtype}")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def own_block(channels, BLOCK_C: tl.constexpr):
    """Which slab is this program's, its channels, and which of them there are."""
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    channel = (program % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (program // blocks).to(tl.int64), channel, channel < channels


@triton.jit
def places(begin, channel, channels, plane, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where BLOCK_M pixels from `begin` on, counted over all images, have these channels."""
    step = tl.arange(0, BLOCK_M)
    if CHANNELS_LAST:
        at = (begin + step)[:, None] * channels + channel[None, :]
    else:
        # one division of 64 bits for a tile, the others have 32
        within = (begin % plane).to(tl.int32) + step
        image = begin // plane + within // plane
        at = (image * channels * plane + within % plane)[:, None] + channel[None, :] * plane
    return at


@triton.jit
def vector(pointer, channel, valid):
    """A per-channel vector beside a tile."""
    return tl.load(pointer + channel, mask=valid, other=0.0)[None, :]


@triton.jit
def pivot_of(first):
    """What a channel's deviations are taken from: its first value, near its mean, or 0 beside an Inf or NaN."""
    return tl.where(first - first == 0, first, 0.0)


@triton.jit
def add_to_streams(mean, m2, value, valid, taken):
    """Each lane of a tile is a stream of deviations, `taken` values long before this one: Welford's update."""
    share = 1.0 / tl.full((1, 1), taken + 1, mean.dtype)
    delta = tl.where(valid, value - mean, 0.0)
    finite = delta - delta == 0
    moved = tl.where(finite, mean + delta * share, mean + value)  # a mean of Inf stays that
    return moved, m2 + tl.where(valid, delta * (value - moved), 0.0)


@triton.jit
def merge_streams(mean, m2, count):
    """The mean and the sum of squared deviations of each channel, from lanes of `count` values each (Chan et al.)."""
    total = tl.sum(count, 0)
    center = tl.sum(mean * count[:, None], 0) / total
    delta = mean - center[None, :]
    return center, tl.sum(m2 + delta * delta * count[:, None], 0)


@triton.jit
def store_moments(partial_ptr, pivot, mean, m2, first, end, part, channel, valid, channels, BLOCK_M: tl.constexpr):
    """Merge the lanes of a slab, the pixels [first, end), and store its mean and squared deviations, float64."""
    taken = (end - first - tl.arange(0, BLOCK_M) + BLOCK_M - 1) // BLOCK_M
    mean, m2 = merge_streams(mean, m2, taken.to(m2.dtype))
    out = partial_ptr + part * 2 * channels + channel[None, :]
    tl.store(out, pivot.to(tl.float64) + mean[None, :].to(tl.float64), mask=valid[None, :])
    tl.store(out + channels, m2[None, :].to(tl.float64), mask=valid[None, :])
