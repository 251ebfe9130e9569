"""The main loop of a 1x1 convolution: a tile of pixels times a matrix, with the prologue on the loaded tile."""

from __future__ import annotations

import triton
import triton.language as tl

from resfuse._triton.tiles import dot, normalized


@triton.jit
def pixels_read(
    row,
    height_out,
    width_out,
    height,
    width,
    stride_height: tl.constexpr,
    stride_width: tl.constexpr,
):
    """The input pixel that output pixel `row` of a strided 1x1 convolution reads; pixels are counted over all images."""
    pixel = row.to(tl.int64)
    if stride_height * stride_width > 1:
        line = pixel // width_out
        image = line // height_out
        pixel = (image * height + line % height_out * stride_height) * width + pixel % width_out * stride_width
    return pixel


@triton.jit
def multiply(
    accumulator,  # (BLOCK_M, BLOCK_N), float32
    x_ptr,  # (pixels, channels)
    pixel,
    pixel_valid,
    affine_ptr,
    mean_ptr,
    matrix_ptr,  # element (channel, column) at channel*row_stride + column*column_stride
    row_stride,
    column_stride,
    column,
    column_valid,
    channels,
    RELU: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides channels
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """accumulator + act((x - mean)*scale + bias) matrix, over the channels of a tile's pixels."""
    x_rows = x_ptr + pixel[:, None] * channels
    columns = matrix_ptr + column[None, :] * column_stride
    for begin in range(0, channels, BLOCK_K):
        channel = begin + tl.arange(0, BLOCK_K)
        if EVEN:
            x = tl.load(x_rows + channel[None, :], mask=pixel_valid[:, None], other=0.0)
            matrix = tl.load(columns + channel[:, None] * row_stride, mask=column_valid[None, :], other=0.0)
        else:
            inside = channel < channels
            x = tl.load(x_rows + channel[None, :], mask=pixel_valid[:, None] & inside[None, :], other=0.0)
            matrix = tl.load(
                columns + channel[:, None] * row_stride, mask=column_valid[None, :] & inside[:, None], other=0.0
            )
        if affine_ptr is not None:
            x = normalized(x, affine_ptr, mean_ptr, channel, channel < channels, channels, RELU).to(x.dtype)
        accumulator = dot(x, matrix, accumulator, PRECISION)
    return accumulator
