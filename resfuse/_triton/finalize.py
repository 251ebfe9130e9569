"""finalize in Triton: batch moments and affine parameters become two vectors, scale and shift; and its backward.

    scale = weight / sqrt(var + eps),  shift = bias - mean*scale
and, where running statistics are given, they and their counter are updated in place, on the device. All work is of
length C, in float64; each vector has its own dtype and stride.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse._triton.kernel import Kernel
from resfuse._triton.walk import accumulate_dtype

_BLOCK = 256


def _bits(value: float) -> int:
    """A float64 as an integer: Triton passes a Python float as float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _strided(vector: Tensor | None) -> tuple[Tensor | None, int]:
    return vector, 1 if vector is None else vector.stride(0)


@triton.jit
def _double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _widened(value):
    """A value of any floating dtype in float64; 16 bits by way of 32, which every conversion knows."""
    return value if value.dtype == tl.float64 else value.to(tl.float32).to(tl.float64)


@triton.jit
def _read(pointer, stride, channel, valid, otherwise: tl.constexpr):
    """A vector's values in float64; `otherwise` where there is none."""
    if pointer is None:
        value = tl.full(channel.shape, otherwise, tl.float64)
    else:
        value = _widened(tl.load(pointer + channel * stride, mask=valid, other=otherwise))
    return value


@triton.jit
def _update(pointer, stride, channel, valid, value, factor):
    """running <- (1 - factor)*running + factor*value, as torch.nn.BatchNorm2d: 1 replaces, 0 keeps."""
    at = pointer + channel * stride
    running = _widened(tl.load(at, mask=valid, other=0.0))
    updated = (1 - factor) * running + factor * value
    if pointer.dtype.element_ty != tl.float64:
        updated = updated.to(tl.float32)  # 16 bits are reached by way of 32, as in csrc
    tl.store(at, updated.to(pointer.dtype.element_ty), mask=valid)


@Kernel
@triton.jit(do_not_specialize=["momentum", "eps", "unbiased"])
def finalize_kernel(
    mean_ptr,
    mean_stride,
    var_ptr,
    var_stride,
    weight_ptr,
    weight_stride,
    bias_ptr,
    bias_stride,
    running_mean_ptr,
    running_mean_stride,
    running_var_ptr,
    running_var_stride,
    batches_ptr,
    scale_ptr,
    shift_ptr,
    channels,
    unbiased,  # count/(count - 1), momentum and eps as the bits of float64
    momentum,
    eps,
    UPDATE: tl.constexpr,
    CUMULATIVE: tl.constexpr,  # batches_ptr counts this batch already: factor = 1/batches
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = channel < channels
    mean = _read(mean_ptr, mean_stride, channel, valid, 0.0)
    var = _read(var_ptr, var_stride, channel, valid, 0.0)
    invstd = 1 / tl.sqrt(var + _double(eps))
    scale = _read(weight_ptr, weight_stride, channel, valid, 1.0) * invstd
    shift = _read(bias_ptr, bias_stride, channel, valid, 0.0) - mean * scale
    tl.store(scale_ptr + channel, scale.to(scale_ptr.dtype.element_ty), mask=valid)
    tl.store(shift_ptr + channel, shift.to(shift_ptr.dtype.element_ty), mask=valid)
    if UPDATE:
        factor = _double(momentum)
        if CUMULATIVE:
            factor = 1 / tl.load(batches_ptr).to(tl.float64)
        _update(running_mean_ptr, running_mean_stride, channel, valid, mean, factor)
        _update(running_var_ptr, running_var_stride, channel, valid, var * _double(unbiased), factor)


@Kernel
@triton.jit(do_not_specialize=["eps"])
def finalize_backward_kernel(
    grad_centered_ptr,
    grad_centered_stride,
    grad_shift_ptr,
    grad_shift_stride,
    var_ptr,
    var_stride,
    weight_ptr,
    weight_stride,
    grad_mean_ptr,
    grad_var_ptr,
    grad_weight_ptr,
    channels,
    eps,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = channel < channels
    grad_centered = _read(grad_centered_ptr, grad_centered_stride, channel, valid, 0.0)
    grad_shift = _read(grad_shift_ptr, grad_shift_stride, channel, valid, 0.0)
    invstd = 1 / tl.sqrt(_read(var_ptr, var_stride, channel, valid, 0.0) + _double(eps))
    scale = _read(weight_ptr, weight_stride, channel, valid, 1.0) * invstd
    grad_var = -0.5 * invstd * invstd * scale * grad_centered
    tl.store(grad_mean_ptr + channel, (-scale * grad_shift).to(grad_mean_ptr.dtype.element_ty), mask=valid)
    tl.store(grad_var_ptr + channel, grad_var.to(grad_var_ptr.dtype.element_ty), mask=valid)
    tl.store(grad_weight_ptr + channel, (invstd * grad_centered).to(grad_weight_ptr.dtype.element_ty), mask=valid)


def _check(like: Tensor, **vectors: Tensor | None) -> None:
    for name, vector in vectors.items():
        if vector is not None and (vector.shape != like.shape or vector.device != like.device):
            raise RuntimeError(f"resfuse: {name} must be of shape {tuple(like.shape)} and on {like.device}")


def finalize(
    mean: Tensor,
    var: Tensor,
    count: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check(mean, var=var, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if num_batches_tracked is not None:
        if num_batches_tracked.dtype != torch.int64 or num_batches_tracked.numel() != 1:
            raise RuntimeError("resfuse: num_batches_tracked must be one int64")
        num_batches_tracked.add_(1)  # before the kernel, whose programs may read it
    scale, shift = (torch.empty(mean.shape, dtype=accumulate_dtype(mean.dtype), device=mean.device) for _ in range(2))
    vectors = (mean, var, weight, bias, running_mean, running_var)
    unbiased = count / (count - 1) if count > 1 else 1.0
    # an empty batch is counted and leaves the running statistics alone: there is nothing to average in
    if mean.numel() > 0:
        finalize_kernel[(triton.cdiv(mean.numel(), _BLOCK),)](
            *(argument for vector in vectors for argument in _strided(vector)),
            num_batches_tracked,
            scale,
            shift,
            mean.numel(),
            _bits(unbiased),
            _bits(momentum or 0.0),
            _bits(eps),
            UPDATE=running_mean is not None and running_var is not None and count > 0,
            CUMULATIVE=momentum is None and num_batches_tracked is not None,
            BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )
    return scale, shift


def finalize_backward(
    grad_centered: Tensor, grad_shift: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(var, grad_centered=grad_centered, grad_shift=grad_shift, weight=weight)
    dtype = accumulate_dtype(grad_shift.dtype)
    grad_mean, grad_var, grad_weight = (torch.empty(var.shape, dtype=dtype, device=var.device) for _ in range(3))
    if var.numel() > 0:
        finalize_backward_kernel[(triton.cdiv(var.numel(), _BLOCK),)](
            *(argument for vector in (grad_centered, grad_shift, var, weight) for argument in _strided(vector)),
            grad_mean,
            grad_var,
            grad_weight,
            var.numel(),
            _bits(eps),
            BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )
    return grad_mean, grad_var, grad_weight
