"""conv_stats, its backward and conv_act by torch's convolution and Triton's passes around it.

What the convolution reads is materialised by one pass, and what it wrote is read by another. The candidate beside the
fused kernels, with their arguments and results: see :mod:`resfuse.choices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resfuse._triton.gemm import packed_weight, product_of
from resfuse._triton.launch import check_image, check_prologue, check_vector
from resfuse._triton.moments import moments as moments_of
from resfuse._triton.scale_shift_act import scale_shift_act, scale_shift_act_, scale_shift_act_moments
from resfuse._triton.scale_shift_act_backward import (
    scale_shift_act_backward_apply,
    scale_shift_act_backward_reduce,
)

_LAST = torch.channels_last


def _scale_shift(affine: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """(x - mean)*scale + bias as x*scale + shift, the bits that a prologue computes in registers."""
    return affine[1], affine[0] - mean * affine[1]


def _activated(x: Tensor, affine: Tensor | None, mean: Tensor | None, relu: bool) -> Tensor:
    check_prologue(affine, mean, x)
    if affine is None or mean is None:
        return x
    return scale_shift_act(x, *_scale_shift(affine, mean), None, None, None, relu)


def conv_stats(
    x: Tensor, affine: Tensor | None, mean: Tensor | None, weight: Tensor, relu: bool, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, y_mean, y_var), as :func:`resfuse._triton.conv_stats.conv_stats`."""
    product_of(x, weight, stride, padding, dilation, groups)
    a = _activated(x.detach(), affine, mean, relu)
    geometry = (stride, padding, dilation, False, (0, 0), groups)
    y = torch.ops.aten.convolution(a, packed_weight(weight, x.dtype), None, *geometry)
    y = y.contiguous(memory_format=_LAST)
    if not moments:
        nothing = torch.empty(0, dtype=torch.float32, device=x.device)
        return y, nothing, nothing.clone()
    return y, *moments_of(y)


def _output_gradient(
    grad_y: Tensor, y: Tensor | None, affine: Tensor | None, mean: Tensor | None, grad_mean: Tensor | None,
    grad_var: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    """dY = dz*scale + grad_mean/M + 2*grad_var/M * (y - mean); grad_y itself where y is None."""
    if y is None:
        return grad_y
    if mean is None:
        raise ValueError("y needs its mean")
    if (grad_mean is None) != (grad_var is None):
        raise ValueError("grad_mean and grad_var come together")
    check_prologue(affine, mean, y, "y_affine")
    scale, shift = (torch.ones_like(mean), torch.zeros_like(mean)) if affine is None else _scale_shift(affine, mean)
    masked = relu and affine is not None
    return scale_shift_act_backward_apply(
        grad_y, y, scale, shift, mean, grad_mean, grad_var, None, None, None, None, None, None, masked
    )[0]


def _through_prologue(grad_a: Tensor, x: Tensor, affine: Tensor, mean: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """grad_x = dz*scale, and the sums of dz and dz*(x - mean)."""
    scale, shift = _scale_shift(affine, mean)
    sums, _ = scale_shift_act_backward_reduce(grad_a, x, scale, shift, mean, None, None, None, None, None, relu)
    nothing = (None, None, None, None, None, None, None, None)
    return scale_shift_act_backward_apply(grad_a, x, scale, shift, mean, *nothing, relu)[0], sums


def conv_stats_backward(
    grad_y: Tensor, y: Tensor | None, y_affine: Tensor | None, y_mean: Tensor | None, grad_mean: Tensor | None,
    grad_var: Tensor | None, y_relu: bool, x: Tensor, affine: Tensor | None, mean: Tensor | None, weight: Tensor,
    relu: bool, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    other: Tensor | None, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_x, grad_weight, sums), as :func:`resfuse._triton.conv_stats_backward.conv_stats_backward`."""
    product_of(x, weight, stride, padding, dilation, groups)
    dy = _output_gradient(grad_y, y, y_affine, y_mean, grad_mean, grad_var, y_relu)
    grad_x, found, _ = torch.ops.aten.convolution_backward(
        dy, _activated(x.detach(), affine, mean, relu), packed_weight(weight, x.dtype), None, stride, padding, dilation,
        False, (0, 0), groups, (need_x, need_weight, False),
    )  # fmt: skip
    grad_weight = torch.empty_like(weight).copy_(found) if need_weight else weight.new_empty(0)
    sums = torch.empty(0, dtype=torch.float32, device=x.device)
    if not need_x:
        return x.new_empty(0), grad_weight, sums
    grad_x = grad_x.contiguous(memory_format=_LAST)
    if affine is not None and mean is not None:
        grad_x, sums = _through_prologue(grad_x, x, affine, mean, relu)
    return grad_x if other is None else grad_x.add_(other), grad_weight, sums


def conv_stats_backward_(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(grad_weight, sums); arguments end in (..., other, need_weight), and other becomes grad_x."""
    other: Tensor = arguments[-2]
    separate: list[Any] = [*arguments[:-2], None, True, arguments[-1]]
    grad_x, grad_weight, sums = conv_stats_backward(*separate)
    other.add_(grad_x)
    return grad_weight, sums


def conv_act(
    x: Tensor, affine: Tensor | None, mean: Tensor | None, relu_x: bool, weight: Tensor, scale: Tensor | None,
    shift: Tensor, residual: Tensor | None, residual_affine: Tensor | None, residual_mean: Tensor | None,
    branch: Tensor | None, branch_weight: Tensor | None, branch_stride: Sequence[int], relu: bool,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, out_mean, out_var), as :func:`resfuse._triton.conv_act.conv_act`; a branch is that one's alone."""
    if branch is not None:
        raise ValueError("a branch continues the accumulator of the fused kernel")
    channels = weight.shape[0]
    for vector, name in ((shift, "shift"), (scale, "scale")):
        if vector is not None:
            check_vector(vector, channels, x.device, name)
    out, *nothing = conv_stats(x, affine, mean, weight, relu_x, stride, padding, dilation, groups, False)
    raw: tuple[Tensor | None, Tensor | None] = (None, None)
    if residual is not None:
        check_image(residual, "residual", like=x, shape=out.shape)
        check_prologue(residual_affine, residual_mean, residual, "residual_affine")
        if residual_affine is not None and residual_mean is not None:
            raw = _scale_shift(residual_affine, residual_mean)
    own = (torch.ones_like(shift) if scale is None else scale, shift)
    if moments:
        return scale_shift_act_moments(out, *own, residual, *raw, relu)
    scale_shift_act_(out, *own, residual, *raw, relu)  # torch made it, and nobody else has it
    return out, nothing[0], nothing[1]
