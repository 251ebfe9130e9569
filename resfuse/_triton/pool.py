"""scale_shift_relu_maxpool in Triton: out = maxpool(relu(x*scale + shift)), the tail of the stem, and its gathering.

Forward reads x once from memory, and again from cache where windows overlap; it writes out and, as one byte, each
window's arg-max in row-major order. Values are rounded to x's dtype: ties are decided on what a stock pool would see.
The first maximum wins, the last NaN wins over everything, and padding never wins. In backward a pixel looks at the
windows that cover it, in order, so no two programs meet: `gathered`, in the passes of scale_shift_act_backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.configs import POOL_BYTES
from resfuse._triton.kernel import Kernel
from resfuse._triton.tiles import activate
from resfuse._triton.walk import Walk, check_vectors, own_block, vector, walk_over


class Window(NamedTuple):
    """A pool's windows, a compile-time argument: six numbers, so that loops over a window unroll."""

    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    padding_height: int
    padding_width: int

    def pooled(self, x: Tensor) -> tuple[int, int]:
        """Height and width of what x is pooled to."""
        height = (x.shape[2] + 2 * self.padding_height - self.kernel_height) // self.stride_height + 1
        return height, (x.shape[3] + 2 * self.padding_width - self.kernel_width) // self.stride_width + 1

    @staticmethod
    def of(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Window:
        """The windows of a pool that x is large enough for."""
        for size, kernel, step, pad in zip(x.shape[2:], kernel_size, stride, padding, strict=True):
            if not (kernel > 0 and step > 0 and 0 <= pad <= kernel // 2 and kernel <= size + 2 * pad):
                raise RuntimeError(f"resfuse: no pool has kernel_size {kernel}, stride {step}, padding {pad} on {size}")
        if kernel_size[0] * kernel_size[1] > 256:
            raise RuntimeError("resfuse: a window must have at most 256 positions")
        return Window(*kernel_size, *stride, *padding)


@triton.jit
def image_and_pixel(begin, plane, BLOCK_M: tl.constexpr):
    """Image and position within its plane of BLOCK_M pixels from `begin` on, counted over all images."""
    within = (begin % plane).to(tl.int32) + tl.arange(0, BLOCK_M)
    return begin // plane + within // plane, within % plane


@triton.jit
def place_in(image, pixel, channel, channels, plane, CHANNELS_LAST: tl.constexpr):
    """Where pixels of images, of planes of this size, have these channels."""
    if CHANNELS_LAST:
        at = (image * plane + pixel)[:, None] * channels + channel[None, :]
    else:
        at = (image * channels * plane + pixel)[:, None] + channel[None, :] * plane
    return at


@Kernel
@triton.jit(do_not_specialize=["pixels", "height", "width", "pooled_width"])
def pool_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    indices_ptr,
    pixels,  # pooled ones
    channels,
    plane,
    slab,
    height,
    width,
    pooled_width,
    WINDOW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part, channel, valid = own_block(channels, BLOCK_C)
    scale = vector(scale_ptr, channel, valid)
    shift = vector(shift_ptr, channel, valid)
    begin = part * slab
    inside = (begin + tl.arange(0, BLOCK_M) < pixels)[:, None] & valid[None, :]
    image, pixel = image_and_pixel(begin, plane, BLOCK_M)
    top = pixel // pooled_width * WINDOW[2] - WINDOW[4]
    left = pixel % pooled_width * WINDOW[3] - WINDOW[5]
    most = tl.full((BLOCK_M, BLOCK_C), float("-inf"), scale.dtype)
    selected = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    HEIGHT: tl.constexpr = WINDOW[0]
    WIDTH: tl.constexpr = WINDOW[1]
    for row in range(HEIGHT):
        y = top + row
        for tap in tl.static_range(WIDTH):
            x = left + tap
            seen = inside & ((y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
            at = place_in(image, y * width + x, channel, channels, height * width, CHANNELS_LAST)
            value = tl.load(x_ptr + at, mask=seen, other=0.0)
            z = activate(value.to(scale.dtype) * scale + shift, True).to(value.dtype).to(scale.dtype)
            wins = seen & ((z > most) | (z != z))
            most = tl.where(wins, z, most)
            selected = tl.where(wins, row * WIDTH + tap, selected)
    at = place_in(image, pixel, channel, channels, plane, CHANNELS_LAST)
    tl.store(out_ptr + at, most.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(indices_ptr + at, selected.to(tl.uint8), mask=inside)


@triton.jit
def first_covering(at, kernel: tl.constexpr, stride: tl.constexpr, padding: tl.constexpr):
    """The first window that covers a position."""
    return tl.where(at + padding < kernel, 0, (at + padding - kernel) // stride + 1)


@triton.jit
def gathered(
    grad_ptr,
    indices_ptr,
    begin,
    channel,
    inside,
    channels,
    plane,
    width,
    pooled_height,
    pooled_width,
    like,
    WINDOW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The gradients of the windows that selected each pixel of a tile, summed, in the dtype of `like`."""
    image, pixel = image_and_pixel(begin, plane, BLOCK_M)
    y = pixel // width
    x = pixel % width
    top = first_covering(y, WINDOW[0], WINDOW[2], WINDOW[4])
    left = first_covering(x, WINDOW[1], WINDOW[3], WINDOW[5])
    total = tl.zeros(inside.shape, like.dtype)
    ROWS: tl.constexpr = (WINDOW[0] + WINDOW[2] - 1) // WINDOW[2]  # windows that may cover a pixel
    COLUMNS: tl.constexpr = (WINDOW[1] + WINDOW[3] - 1) // WINDOW[3]
    for v in tl.static_range(ROWS):
        row = top + v
        begins_at = row * WINDOW[2] - WINDOW[4]
        for h in tl.static_range(COLUMNS):
            column = left + h
            starts_at = column * WINDOW[3] - WINDOW[5]
            covers = (row < pooled_height) & (begins_at <= y) & (column < pooled_width) & (starts_at <= x)
            seen = inside & covers[:, None]
            number = (y - begins_at) * WINDOW[1] + (x - starts_at)
            within = row * pooled_width + column
            at = place_in(image, within, channel, channels, pooled_height * pooled_width, CHANNELS_LAST)
            selected = tl.load(indices_ptr + at, mask=seen, other=0).to(tl.int32)
            grad = tl.load(grad_ptr + at, mask=seen, other=0.0).to(like.dtype)
            total += tl.where(seen & (selected == number[:, None]), grad, 0.0)
    return total


def scale_shift_relu_maxpool(
    x: Tensor, scale: Tensor, shift: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    window = Window.of(x, kernel_size, stride, padding)
    check_vectors(x, scale=scale, shift=shift)
    height, width = window.pooled(x)
    order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    shape = (*x.shape[:2], height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)
    indices = torch.empty_like(out, dtype=torch.uint8)
    if out.numel() > 0:
        walk = walk_with_pool(out, x)
        sizes = (*walk.sizes, x.shape[2], x.shape[3], width)
        pool_kernel[walk.grid](x, scale, shift, out, indices, *sizes, WINDOW=tuple(window), **walk.options)
    return out, indices


def walk_with_pool(x: Tensor, like: Tensor, *, reduces: bool = False) -> Walk:
    """The walk over x in the memory order of `like`: of what is dense in both orders, a pool may be in one alone."""
    walk = walk_over(x, reduces=reduces, tile_bytes=POOL_BYTES)
    return walk._replace(channels_last=not like.is_contiguous(), plane=x.shape[2] * x.shape[3])


def check_pooled(pooled: Tensor, x: Tensor, window: Window, dtype: torch.dtype, name: str) -> None:
    """pooled lies beside x as the operator's own outputs do."""
    if pooled.dtype != dtype or pooled.device != x.device:
        raise RuntimeError(f"resfuse: {name} has the wrong dtype or device")
    if pooled.shape != (*x.shape[:2], *window.pooled(x)):
        raise RuntimeError(f"resfuse: {name} must have the pooled shape")
    order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    if not pooled.is_contiguous(memory_format=order):
        raise RuntimeError(f"resfuse: {name} must have x's memory order")
