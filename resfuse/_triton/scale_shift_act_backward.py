"""The backward of scale_shift_act in Triton, and of the stem's pool, in two passes over x.

    reduce: sum dz, sum dz*(x - mean), sum dz*(r - mean_r); an identity residual's gradient dz is written on the way.
    apply:  grad_x = dz*scale + grad_mean/M + 2*grad_var/M*(x - mean), the last two where scale came from x's moments,
            and a raw residual's gradient likewise in the same pass.
dz is grad_out where the unit was active. Without a residual, or with a raw one, the mask is that of the recomputed
pre-activation; with an identity residual it is that of the kept output. Behind a pool, grad_out is gathered.
Accesses per element: reduce reads two or three and writes none or one; apply reads two or three, writes one or two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.kernel import Kernel
from resfuse._triton.merge import sum_partials
from resfuse._triton.pool import Window, check_pooled, gathered, walk_with_pool
from resfuse._triton.scale_shift_act import load_tile, optional_vector, preactivation
from resfuse._triton.tiles import active_gradient
from resfuse._triton.walk import Walk, accumulate_dtype, beside, check_vectors, own_block, places, vector, walk_over

Vector = Tensor | None
_NO_POOL = (None, 1, 1, 1)


@triton.jit
def incoming(
    grad_ptr,
    indices_ptr,
    at,
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
    """grad_out of a tile, or what the windows over it hand back."""
    if indices_ptr is None:
        dz = load_tile(grad_ptr, at, inside, like)
    else:
        dz = gathered(
            grad_ptr, indices_ptr, begin, channel, inside, channels, plane, width, pooled_height, pooled_width, like,
            WINDOW, CHANNELS_LAST, BLOCK_M,
        )  # fmt: skip
    return dz


@Kernel
@triton.jit(do_not_specialize=["pixels", "width", "pooled_height", "pooled_width"])
def reduce_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    raw_ptr,
    raw_scale_ptr,
    raw_shift_ptr,
    raw_mean_ptr,
    out_ptr,  # the kept output, and where dz goes
    dz_ptr,
    partial_ptr,  # (slabs, 2 or 3, channels)
    pixels,
    channels,
    plane,
    slab,
    indices_ptr,
    width,
    pooled_height,
    pooled_width,
    WINDOW: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part, channel, valid = own_block(channels, BLOCK_C)
    scale = vector(scale_ptr, channel, valid)
    shift = vector(shift_ptr, channel, valid)
    mean = vector(mean_ptr, channel, valid)
    raw_scale = optional_vector(raw_scale_ptr, channel, valid, scale)
    raw_shift = optional_vector(raw_shift_ptr, channel, valid, shift)
    raw_mean = optional_vector(raw_mean_ptr, channel, valid, mean)
    RESIDUAL: tl.constexpr = 0 if raw_ptr is None else 2
    first = part * slab
    end = tl.minimum(first + slab, pixels)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), scale.dtype)
    sum_x = tl.zeros((BLOCK_M, BLOCK_C), scale.dtype)
    sum_raw = tl.zeros((BLOCK_M, BLOCK_C), scale.dtype)
    for step in range(0, slab // BLOCK_M):
        begin = first + step * BLOCK_M
        inside = (begin + tl.arange(0, BLOCK_M) < end)[:, None] & valid[None, :]
        at = places(begin, channel, channels, plane, CHANNELS_LAST, BLOCK_M)
        dz = incoming(
            grad_ptr, indices_ptr, at, begin, channel, inside, channels, plane, width, pooled_height, pooled_width,
            scale, WINDOW, CHANNELS_LAST, BLOCK_M,
        )  # fmt: skip
        x = load_tile(x_ptr, at, inside, scale)
        raw = load_tile(raw_ptr, at, inside, scale)
        if out_ptr is not None:
            dz = active_gradient(dz, load_tile(out_ptr, at, inside, scale), True)
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        else:
            dz = active_gradient(dz, preactivation(x, scale, shift, raw, raw_scale, raw_shift, RESIDUAL), RELU)
        # what lies outside has a gradient of 0, and 0*(0 - mean) may be NaN
        sum_dz += dz
        sum_x += tl.where(inside, dz * (x - mean), 0.0)
        if raw_ptr is not None:
            sum_raw += tl.where(inside, dz * (raw - raw_mean), 0.0)
    TERMS: tl.constexpr = 2 if raw_ptr is None else 3
    sums_ptr = partial_ptr + part * TERMS * channels + channel
    tl.store(sums_ptr, tl.sum(sum_dz, 0), mask=valid)
    tl.store(sums_ptr + channels, tl.sum(sum_x, 0), mask=valid)
    if raw_ptr is not None:
        tl.store(sums_ptr + 2 * channels, tl.sum(sum_raw, 0), mask=valid)


@triton.jit
def gradient_through(dz, x, scale, mean, grad_mean_ptr, grad_var_ptr, channel, valid, pixels):
    """dz*scale + grad_mean/M + 2*grad_var/M * (x - mean), as far as there are gradients of the moments."""
    grad = dz * scale
    if grad_mean_ptr is not None:
        constant = vector(grad_mean_ptr, channel, valid) / pixels
        slope = 2 * vector(grad_var_ptr, channel, valid) / pixels
        grad += constant + slope * (x - mean)
    return grad


@Kernel
@triton.jit(do_not_specialize=["pixels", "width", "pooled_height", "pooled_width"])
def apply_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    grad_mean_ptr,
    grad_var_ptr,
    raw_ptr,
    raw_scale_ptr,
    raw_shift_ptr,
    raw_mean_ptr,
    raw_grad_mean_ptr,
    raw_grad_var_ptr,
    grad_x_ptr,
    grad_raw_ptr,
    pixels,
    channels,
    plane,
    slab,
    indices_ptr,
    width,
    pooled_height,
    pooled_width,
    WINDOW: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part, channel, valid = own_block(channels, BLOCK_C)
    scale = vector(scale_ptr, channel, valid)
    shift = vector(shift_ptr, channel, valid)
    mean = vector(mean_ptr, channel, valid)
    raw_scale = optional_vector(raw_scale_ptr, channel, valid, scale)
    raw_shift = optional_vector(raw_shift_ptr, channel, valid, shift)
    raw_mean = optional_vector(raw_mean_ptr, channel, valid, mean)
    RESIDUAL: tl.constexpr = 0 if raw_ptr is None else 2
    begin = part * slab
    inside = (begin + tl.arange(0, BLOCK_M) < pixels)[:, None] & valid[None, :]
    at = places(begin, channel, channels, plane, CHANNELS_LAST, BLOCK_M)
    dz = incoming(
        grad_ptr, indices_ptr, at, begin, channel, inside, channels, plane, width, pooled_height, pooled_width,
        scale, WINDOW, CHANNELS_LAST, BLOCK_M,
    )  # fmt: skip
    x = load_tile(x_ptr, at, inside, scale)
    raw = load_tile(raw_ptr, at, inside, scale)
    dz = active_gradient(dz, preactivation(x, scale, shift, raw, raw_scale, raw_shift, RESIDUAL), RELU)
    grad = gradient_through(dz, x, scale, mean, grad_mean_ptr, grad_var_ptr, channel, valid, pixels)
    tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if raw_ptr is not None:
        grad = gradient_through(
            dz, raw, raw_scale, raw_mean, raw_grad_mean_ptr, raw_grad_var_ptr, channel, valid, pixels
        )
        tl.store(grad_raw_ptr + at, grad.to(grad_raw_ptr.dtype.element_ty), mask=inside)


def _check_vectors(x: Tensor, own: Sequence[Vector], raw: Sequence[Vector]) -> None:
    """`own` and `raw` follow x and the raw residual in an operator's arguments; the latter, first of `raw`, is none."""
    names = ("scale", "shift", "mean", "grad_mean", "grad_var")
    check_vectors(x, **dict(zip(names, own, strict=False)))
    check_vectors(x, **{f"residual_{name}": vector for name, vector in zip(names, raw[1:], strict=False)})


def _sums(
    x: Tensor, terms: int, walk: Walk, arguments: Sequence[Vector], pool: Sequence[object], **options: object
) -> Tensor:
    _check_vectors(x, arguments[2:5], arguments[5:9])
    if x.numel() == 0:
        return torch.zeros(terms, walk.channels, dtype=accumulate_dtype(x.dtype), device=x.device)
    partial = torch.empty(walk.parts, terms, walk.channels, dtype=accumulate_dtype(x.dtype), device=x.device)
    reduce_kernel[walk.grid](*arguments, partial, *walk.sizes, *pool, **options, **walk.options)
    return sum_partials(partial)


def scale_shift_act_backward_reduce(
    grad_out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    raw_residual: Vector,
    residual_scale: Vector,
    residual_shift: Vector,
    residual_mean: Vector,
    out: Vector,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    masked = relu and out is not None
    if masked and raw_residual is not None:
        raise RuntimeError("resfuse: the mask of a raw residual is recomputed, not read from out")
    beside(x, grad_out=grad_out, raw_residual=raw_residual, out=out)
    dz = torch.empty_like(x) if masked else x.new_empty(0)
    raw = (raw_residual, residual_scale, residual_shift, residual_mean)
    kept = (out, dz) if masked else (None, None)
    arguments = (grad_out, x, scale, shift, mean, *raw, *kept)
    terms, walk = 2 if raw_residual is None else 3, walk_over(x, reduces=True)
    return _sums(x, terms, walk, arguments, _NO_POOL, WINDOW=None, RELU=relu), dz


def _write_gradients(
    grad_x: Tensor, grad_raw: Vector, tensors: Sequence[Vector], relu: bool, walk: Walk, pool=_NO_POOL, window=None
) -> None:
    """`tensors` are the operator's, in order; grad_x and grad_raw may be x and the raw residual."""
    _check_vectors(grad_x, tensors[2:7], tensors[7:13])
    if grad_x.numel() > 0:
        arguments = (*tensors, grad_x, grad_raw, *walk.sizes, *pool)
        apply_kernel[walk.grid](*arguments, WINDOW=window, RELU=relu, **walk.options)


def scale_shift_act_backward_apply(
    grad_out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    grad_mean: Vector,
    grad_var: Vector,
    raw_residual: Vector,
    residual_scale: Vector,
    residual_shift: Vector,
    residual_mean: Vector,
    residual_grad_mean: Vector,
    residual_grad_var: Vector,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    beside(x, grad_out=grad_out, raw_residual=raw_residual)
    grad_x = torch.empty_like(x)
    grad_raw = None if raw_residual is None else torch.empty_like(x)
    raw = (raw_residual, residual_scale, residual_shift, residual_mean, residual_grad_mean, residual_grad_var)
    tensors = (grad_out, x, scale, shift, mean, grad_mean, grad_var, *raw)
    _write_gradients(grad_x, grad_raw, tensors, relu, walk_over(x))
    return grad_x, x.new_empty(0) if grad_raw is None else grad_raw


def scale_shift_act_backward_apply_(
    grad_out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    grad_mean: Vector,
    grad_var: Vector,
    raw_residual: Vector,
    residual_scale: Vector,
    residual_shift: Vector,
    residual_mean: Vector,
    residual_grad_mean: Vector,
    residual_grad_var: Vector,
    relu: bool,
) -> None:
    beside(x, grad_out=grad_out, raw_residual=raw_residual)
    raw = (raw_residual, residual_scale, residual_shift, residual_mean, residual_grad_mean, residual_grad_var)
    tensors = (grad_out, x, scale, shift, mean, grad_mean, grad_var, *raw)
    _write_gradients(x, raw_residual, tensors, relu, walk_over(x))


def _pool_of(grad_out: Tensor, indices: Tensor, x: Tensor, window: Window) -> tuple[Tensor, int, int, int]:
    check_pooled(grad_out, x, window, x.dtype, "grad_out")
    check_pooled(indices, x, window, torch.uint8, "indices")
    return (indices, x.shape[3], *window.pooled(x))


def scale_shift_relu_maxpool_backward_reduce(
    grad_out: Tensor,
    indices: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    window = Window.of(x, kernel_size, stride, padding)
    pool = _pool_of(grad_out, indices, x, window)
    arguments = (grad_out, x, scale, shift, mean, *[None] * 6)
    return _sums(x, 2, walk_with_pool(x, x, reduces=True), arguments, pool, WINDOW=tuple(window), RELU=True)


def scale_shift_relu_maxpool_backward_apply_(
    grad_out: Tensor,
    indices: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    grad_mean: Vector,
    grad_var: Vector,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> None:
    _write_pooled(x, grad_out, indices, x, (scale, shift, mean, grad_mean, grad_var), kernel_size, stride, padding)


def scale_shift_relu_maxpool_backward_apply(
    grad_out: Tensor,
    indices: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    grad_mean: Vector,
    grad_var: Vector,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    grad_x = torch.empty_like(x)
    _write_pooled(grad_x, grad_out, indices, x, (scale, shift, mean, grad_mean, grad_var), kernel_size, stride, padding)
    return grad_x


def _write_pooled(
    grad_x: Tensor,
    grad_out: Tensor,
    indices: Tensor,
    x: Tensor,
    vectors: Sequence[Vector],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> None:
    window = Window.of(x, kernel_size, stride, padding)
    pool = _pool_of(grad_out, indices, x, window)
    tensors = (grad_out, x, *vectors, *[None] * 6)
    _write_gradients(grad_x, None, tensors, True, walk_with_pool(x, x), pool, tuple(window))
