"""Convolutions as products of tiles: which pixels a tile reads, and the loop over taps and channels.

One geometry serves all directions. Along an axis, row i of a product with tap t reads the source at
``i*step + start + t*tap_step`` and stands for ``i*result_step + result_start`` of the result. Forward that is the
convolution; the gradient to its input, whose rows would meet only every stride-th tap, is one product for each of the
stride's phases, in which every tap counts.

Activations are (pixels, channels) matrices, channels_last; weights (K, R, S, C / groups), contiguous, in the
activation's dtype. Pixels are counted in int32 (launchers check them), offsets in int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.launch import check_image
from resfuse._triton.tiles import dot, normalized

MAX_PIXELS = 2**31 - 2**12  # a tile's rows may reach beyond the last pixel


class Axis(NamedTuple):
    """One spatial axis of a product; as a kernel's argument, its numbers by name."""

    rows: int
    source: int  # size of what is read
    step: int
    start: int
    taps: int
    tap_step: int
    weight_start: int  # tap t is the weight's weight_start + t*weight_step
    weight_step: int
    result: int  # size of what is written
    result_step: int
    result_start: int

    @property
    def is_identity(self) -> bool:
        """Whether row i reads row i, once, and is row i of the result."""
        same = self.rows == self.source == self.result
        return same and self.taps == 1 and self[2:4] == (1, 0) and self[9:] == (1, 0)


def forward_axis(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
    """Rows are output pixels."""
    if not (stride > 0 and dilation > 0 and padding >= 0 and kernel > 0):
        raise ValueError(
            "stride and dilation must be above 0 and padding no less, "
            f"got stride={stride}, dilation={dilation}, padding={padding}"
        )
    reach = dilation * (kernel - 1) + 1
    if size + 2 * padding < reach:
        raise ValueError(f"the kernel must fit its padded input: it spans {reach} of {size + 2 * padding} pixels")
    out = (size + 2 * padding - reach) // stride + 1
    return Axis(out, size, stride, -padding, kernel, dilation, 0, 1, out, 1, 0)


def gradient_axes(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[Axis]:
    """One for each phase of the input: rows are its pixels phase, phase + stride, ...; the source is the output.

    Tap r of the weight carries output o to input o*stride - padding + r*dilation, so a phase meets those r for which
    phase + padding - r*dilation is a multiple of the stride: the first of them, and every stride / gcd-th after it.
    """
    out = forward_axis(size, kernel, stride, padding, dilation).rows
    every = stride // gcd(stride, dilation)
    axes = []
    for phase in range(min(stride, size)):
        first = next((r for r in range(min(every, kernel)) if (phase + padding - r * dilation) % stride == 0), kernel)
        taps = len(range(first, kernel, every))
        start = (phase + padding - first * dilation) // stride
        rows = len(range(phase, size, stride))
        tap_step = -(every * dilation // stride)
        axes.append(Axis(rows, out, 1, start, taps, tap_step, first, every, size, stride, phase))
    return axes


class Product(NamedTuple):
    """A convolution's shape: what its launchers derive from tensors and arguments."""

    images: int
    channels: int  # of one group
    out_channels: int  # of one group
    groups: int
    height: Axis
    width: Axis

    @property
    def pixels(self) -> int:
        """Rows of the output."""
        return self.images * self.height.rows * self.width.rows

    @property
    def taps(self) -> int:
        """Taps of the weight."""
        return self.height.taps * self.width.taps

    @property
    def is_pointwise(self) -> bool:
        """Whether every output pixel reads the one input pixel at its place."""
        return self.height.is_identity and self.width.is_identity

    def flattened(self) -> Product:
        """A pointwise product as one of a single line."""
        line = forward_axis(self.pixels, 1, 1, 0, 1)
        return self._replace(images=1, height=forward_axis(1, 1, 1, 0, 1), width=line)


def product_of(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Product:
    """The checked shape of conv(x, weight)."""
    check_image(x, "x")
    if weight.dtype not in (x.dtype, torch.float32) or weight.device != x.device:
        raise TypeError(f"weight must be float32 or {x.dtype} on {x.device}, got {weight.dtype} on {weight.device}")
    fits = weight.dim() == 4 and weight.numel() > 0 and groups > 0
    if not fits or weight.shape[0] % groups or x.shape[1] != groups * weight.shape[1]:
        raise ValueError(
            f"weight must be (K, C / groups, kH, kW) with K a multiple of groups, here C = {x.shape[1]} and "
            f"groups = {groups}, got {tuple(weight.shape)}"
        )
    height, width = (
        forward_axis(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1)
    )
    product = Product(x.shape[0], weight.shape[1], weight.shape[0] // groups, groups, height, width)
    if max(product.pixels, x.shape[0] * x.shape[2] * x.shape[3]) > MAX_PIXELS:
        raise ValueError(f"x and the output must have at most {MAX_PIXELS} pixels for products in Triton")
    return product


def packed_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype` whose memory is (K, R, S, C / groups): itself, where it is that already."""
    return weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)


@triton.jit
def tile_rows(tile, images, height, width, POINTWISE: tl.constexpr, BLOCK_M: tl.constexpr):
    """(image, i, j, valid) of a tile's rows; tiles are numbered over all images. POINTWISE: all rows are one image's
    one line, and nothing needs dividing."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if POINTWISE:
        return row * 0, row * 0, row, row < width.rows
    above = row // width.rows
    image = above // height.rows
    return image, above % height.rows, row % width.rows, image < images


@triton.jit
def source_pixels(rows, tap_h, tap_w, height, width):
    """The pixels that a tile's rows read at one tap, int64, and whether they lie in the source."""
    image, i, j, valid = rows
    h = i * height.step + height.start + tap_h * height.tap_step
    w = j * width.step + width.start + tap_w * width.tap_step
    inside = valid & (h >= 0) & (h < height.source) & (w >= 0) & (w < width.source)
    return ((image * height.source + h) * width.source + w).to(tl.int64), inside


@triton.jit
def result_pixels(rows, height, width):
    """The pixels that a tile's rows stand for, int64."""
    image, i, j, _ = rows
    h = i * height.result_step + height.result_start
    w = j * width.result_step + width.result_start
    return ((image * height.result + h) * width.result + w).to(tl.int64)


@triton.jit
def load_activation(
    x_ptr, affine_ptr, mean_ptr, pixel, inside, channel, c_valid, all_channels, RELU: tl.constexpr
):  # fmt: skip
    """A tile of act((x - mean)*scale + bias), or of x where affine is None, in x's dtype; zero outside.

    Padding is zero too: it follows the prologue.
    """
    mask = inside[:, None] & c_valid[None, :]
    x = tl.load(x_ptr + pixel[:, None] * all_channels + channel[None, :], mask=mask, other=0.0)
    if affine_ptr is not None:
        a = normalized(x, affine_ptr, mean_ptr, channel, c_valid, all_channels, RELU)
        x = tl.where(mask, a, 0.0).to(x_ptr.dtype.element_ty)
    return x


@triton.jit
def load_weight(weight_ptr, k, k_valid, tap, taps, c, channels):
    """A tile of the weight at one tap, (c, k): k counts the output channels of all groups, c those of one."""
    at = (k[None, :].to(tl.int64) * taps + tap) * channels + c[:, None]
    return tl.load(weight_ptr + at, mask=k_valid[None, :] & (c < channels)[:, None], other=0.0)


@triton.jit
def convolve(
    acc, x_ptr, affine_ptr, mean_ptr, weight_ptr, rows, k, k_valid, group, groups, channels, height, width,
    RELU: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc plus a tile of a convolution: rows from tile_rows, k output channels of one group."""
    chunks = tl.cdiv(channels, BLOCK_K)
    taps = height.taps * width.taps
    for step in range(0, taps * chunks):
        tap = step // chunks
        c = (step - tap * chunks) * BLOCK_K + tl.arange(0, BLOCK_K)
        pixel, inside = source_pixels(rows, tap // width.taps, tap % width.taps, height, width)
        a = load_activation(
            x_ptr, affine_ptr, mean_ptr, pixel, inside, group * channels + c, c < channels, groups * channels, RELU
        )  # fmt: skip
        acc = dot(a, load_weight(weight_ptr, k, k_valid, tap, taps, c, channels), acc, PRECISION)
    return acc
