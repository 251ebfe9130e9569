"""conv_stats_backward: the gradients of conv_stats to its input, its weight and its prologue's vectors.

The launchers of :mod:`resfuse._triton.conv_gradients`, whose header has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resfuse._triton.conv_gradients import input_gradient_kernel, weight_gradient_kernel
from resfuse._triton.gemm import Axis, Product, gradient_axes, packed_weight, product_of
from resfuse._triton.launch import check_image, check_prologue, check_vector, precision
from resfuse._triton.merge import sum_partials
from resfuse._triton.schedule import Schedule, input_schedule, weight_schedule


class OutputGradient(NamedTuple):
    """What dY is formed of, as the kernels take it; without y, grad is dY."""

    grad: Tensor
    y: Tensor | None
    affine: Tensor | None
    mean: Tensor | None
    grad_mean: Tensor | None
    grad_var: Tensor | None
    pixels: float  # of y, M


class Input(NamedTuple):
    """x and what its reader computes."""

    x: Tensor
    affine: Tensor | None
    mean: Tensor | None


def _checked_gradient(
    grad_y: Tensor, y: Tensor | None, affine: Tensor | None, mean: Tensor | None, grad_mean: Tensor | None,
    grad_var: Tensor | None, x: Tensor, product: Product,
) -> OutputGradient:  # fmt: skip
    channels = product.groups * product.out_channels
    shape = (x.shape[0], channels, product.height.rows, product.width.rows)
    check_image(grad_y, "grad_y", like=x, shape=shape)
    pixels = float(product.pixels)
    if y is None:
        return OutputGradient(grad_y, None, None, None, None, None, pixels)
    check_image(y, "y", like=x, shape=shape)
    if mean is None:
        raise ValueError("y needs its mean")
    check_prologue(affine, mean, y, "y_affine")
    for vector, name in ((mean, "y_mean"), (grad_mean, "grad_mean"), (grad_var, "grad_var")):
        if vector is not None:
            check_vector(vector, channels, y.device, name)
    return OutputGradient(grad_y, y, affine, mean, grad_mean, grad_var, pixels)


def _phases(product: Product, x: Tensor, weight: Tensor, geometry: Sequence[Sequence[int]]) -> list[tuple[Axis, Axis]]:
    """The products that together cover every pixel of the input."""
    heights, widths = (
        gradient_axes(x.shape[2 + i], weight.shape[2 + i], *(pair[i] for pair in geometry)) for i in (0, 1)
    )
    return [(height, width) for height in heights for width in widths]


def _input_gradient(
    dy: OutputGradient, source: Input, weight: Tensor, other: Tensor | None, grad_x: Tensor, product: Product,
    phases: list[tuple[Axis, Axis]], y_relu: bool, relu: bool,
) -> Tensor:  # fmt: skip
    """Fills grad_x; returns the sums of dz and dz*(x - mean), empty without a prologue."""
    x, groups = source.x, product.groups
    packed = packed_weight(weight, x.dtype)
    plans: list[tuple[Product, Schedule]] = []
    for height, width in phases:
        part = product._replace(height=height, width=width)
        plans.append((part, input_schedule(part, x.dtype, dy.y is not None, y_relu)))
    slabs = sum(plan.slabs for _, plan in plans)
    partial = None
    if source.affine is not None:
        partial = torch.empty((slabs, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    first = 0
    for part, plan in plans:
        walked = part.flattened() if part.is_pointwise else part
        input_gradient_kernel[plan.blocks, plan.slabs, groups](
            *dy, packed, *source, other, grad_x, partial, walked.images, walked.height, walked.width, weight.shape[3],
            weight.shape[2] * weight.shape[3], plan.tiles, plan.slab_tiles, first,
            product.channels, product.out_channels, groups, Y_RELU=y_relu, RELU=relu, POINTWISE=part.is_pointwise,
            SINGLE=plan.single, PRECISION=precision(x), **plan.options,
        )  # fmt: skip
        first += plan.slabs
    return sum_partials(partial) if partial is not None else torch.empty(0, dtype=torch.float32, device=x.device)


def _weight_gradient(
    dy: OutputGradient, source: Input, weight: Tensor, product: Product, y_relu: bool, relu: bool
) -> Tensor:
    """The gradient of the weight, in its dtype and layout."""
    x = source.x
    plan = weight_schedule(product, x.dtype)
    out, channels, *kernel = weight.shape
    partial = torch.empty((plan.slabs, out, *kernel, channels), dtype=torch.float32, device=weight.device)
    walked = product.flattened() if product.is_pointwise else product
    weight_gradient_kernel[plan.blocks, plan.slabs, product.groups](
        *dy, *source, partial, walked.images, walked.height, walked.width, plan.tiles, plan.slab_tiles,
        product.channels, product.out_channels, product.groups, Y_RELU=y_relu, RELU=relu,
        POINTWISE=product.is_pointwise, PRECISION=precision(x), **plan.options,
    )  # fmt: skip
    return torch.empty_like(weight).copy_(sum_partials(partial, weight.dtype).permute(0, 3, 1, 2))


def _backward(
    grad_y: Tensor, y: Tensor | None, y_affine: Tensor | None, y_mean: Tensor | None, grad_mean: Tensor | None,
    grad_var: Tensor | None, y_relu: bool, x: Tensor, affine: Tensor | None, mean: Tensor | None, weight: Tensor,
    relu: bool, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    other: Tensor | None, grad_x: Tensor | None, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills grad_x, unless it is None; returns (grad_weight, sums), empty where not needed."""
    product = product_of(x, weight, stride, padding, dilation, groups)
    dy = _checked_gradient(grad_y, y, y_affine, y_mean, grad_mean, grad_var, x, product)
    if other is not None:
        check_image(other, "other", like=x, shape=x.shape)
    source = Input(x, affine, mean if affine is not None else None)
    check_prologue(affine, mean, x)
    grad_weight, sums = weight.new_empty(0), torch.empty(0, dtype=torch.float32, device=x.device)
    if need_weight:
        grad_weight = _weight_gradient(dy, source, weight, product, y_relu, relu)
    if grad_x is not None:
        phases = _phases(product, x, weight, (stride, padding, dilation))
        sums = _input_gradient(dy, source, weight, other, grad_x, product, phases, y_relu, relu)
    return grad_weight, sums


def conv_stats_backward(
    grad_y: Tensor, y: Tensor | None, y_affine: Tensor | None, y_mean: Tensor | None, grad_mean: Tensor | None,
    grad_var: Tensor | None, y_relu: bool, x: Tensor, affine: Tensor | None, mean: Tensor | None, weight: Tensor,
    relu: bool, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    other: Tensor | None, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_x, grad_weight, sums); what is not needed is empty."""
    grad_x = torch.empty_like(x) if need_x else None
    grad_weight, sums = _backward(
        grad_y, y, y_affine, y_mean, grad_mean, grad_var, y_relu, x, affine, mean, weight, relu, stride, padding,
        dilation, groups, other, grad_x, need_weight,
    )  # fmt: skip
    return x.new_empty(0) if grad_x is None else grad_x, grad_weight, sums


def conv_stats_backward_(
    grad_y: Tensor, y: Tensor | None, y_affine: Tensor | None, y_mean: Tensor | None, grad_mean: Tensor | None,
    grad_var: Tensor | None, y_relu: bool, x: Tensor, affine: Tensor | None, mean: Tensor | None, weight: Tensor,
    relu: bool, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    other: Tensor, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(grad_weight, sums); other becomes grad_x."""
    return _backward(
        grad_y, y, y_affine, y_mean, grad_mean, grad_var, y_relu, x, affine, mean, weight, relu, stride, padding,
        dilation, groups, other, other, need_weight,
    )  # fmt: skip
