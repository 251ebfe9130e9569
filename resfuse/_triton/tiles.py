"""Device functions on loaded tiles: what a prologue and an epilogue compute, the product, and moments of a tile.

A tile is (pixels, channels), its values float32 once loaded. Kernels that call these are launched with
enable_fp_fusion=False: a mask that backward computes again must have the forward's bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def activate(z, RELU: tl.constexpr):
    """relu(z) with relu(NaN) = NaN, or z."""
    return tl.where(z < 0, 0.0, z) if RELU else z


@triton.jit
def active_gradient(grad, z, RELU: tl.constexpr):
    """The gradient through act: 0 where z is 0 or less; a NaN of z lets it through."""
    return tl.where(z <= 0, 0.0, grad) if RELU else grad


@triton.jit
def scale_and_shift(affine_ptr, mean_ptr, channel, valid, channels):
    """(x - mean)*scale + bias as x*scale + shift; affine is (2, channels): bias, scale."""
    scale = tl.load(affine_ptr + channels + channel, mask=valid, other=0.0)
    bias = tl.load(affine_ptr + channel, mask=valid, other=0.0)
    mean = tl.load(mean_ptr + channel, mask=valid, other=0.0)
    return scale, bias - mean * scale


@triton.jit
def normalized(x, affine_ptr, mean_ptr, channel, valid, channels, RELU: tl.constexpr):
    """act((x - mean)*scale + bias) in float32 of a tile's channels; x itself, float32, where affine is None."""
    a = x.to(tl.float32)
    if affine_ptr is not None:
        scale, shift = scale_and_shift(affine_ptr, mean_ptr, channel, valid, channels)
        a = activate(a * scale[None, :] + shift[None, :], RELU)
    return a


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b, the accumulator float32."""
    if INTERPRETED:  # which takes the bits of a bfloat16 for an integer
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def finite_or_zero(center):
    """A center that deviations can be taken from: that of a channel with an Inf is 0."""
    return tl.where(center - center == 0, center, 0.0)


@triton.jit
def tile_moments(values, valid, count):
    """The mean of each channel over the valid pixels of a tile, and the sum of squared deviations."""
    mean = tl.sum(tl.where(valid[:, None], values, 0.0), 0) / count
    deviation = tl.where(valid[:, None], values - mean[None, :], 0.0)
    return mean, tl.sum(deviation * deviation, 0)


@triton.jit
def merge_moments(count, mean, m2, other_count, other_mean, other_m2):
    """The moments of a union (Chan, Golub, LeVeque 1979); a mean of Inf stays that. csrc/math.h has the same."""
    total = count + other_count
    share = other_count / total
    delta = other_mean - mean
    finite = delta - delta == 0
    merged = tl.where(finite, mean + delta * share, mean + other_mean)
    return total, merged, m2 + other_m2 + delta * delta * (count * share)
