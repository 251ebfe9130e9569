"""Train-time folding: batch normalisation in the weight of a 1x1 convolution before its only product is computed.

The batch statistics of a 1x1 convolution follow from the mean and covariance of its input, so its output before the
residual and the ReLU never exists, in either direction. The formulas are :class:`ConvNormActFunction`'s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resfuse import ops
from resfuse.autograd import _cast, _laid_out_as
from resfuse.parameters import BatchNorm2dParameters
from resfuse.raw import Pairs, Raw, Statistics, count, scale_shift, zeros_or


class Folded(NamedTuple):
    """Batch normalisation folded into a 1x1 convolution at training time: out = act(a weight^T + shift + r).

    a_mean and product = W Cov(a) are kept for backward. `weight` is rounded to the activation's dtype, and shift is
    taken from the rounded one, so that the mean of BN's output is exact whatever the mean of a.
    """

    statistics: Statistics
    weight: Tensor  # (K, C), scale * W
    shift: Tensor
    a_mean: Tensor
    product: Tensor  # (K, C)


_UNIT: Pairs = ([1, 1], [0, 0], [1, 1])


def _as_image(matrix: Tensor) -> Tensor:
    return matrix[:, :, None, None]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of float32 matrices by the kernel that convolves."""
    shift = a.new_zeros(b.shape[0])
    nothing = (None,) * 3
    return ops.conv_act(_as_image(a), None, None, False, _as_image(b), None, shift, *nothing, False, *_UNIT).flatten(1)


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of float32 matrices by the kernel of weight gradients."""
    like = _as_image(a.new_empty(a.shape[1], b.shape[1]))
    options = (None,) * 5
    return ops.conv_stats_backward(
        _as_image(a), *options, False, _as_image(b), None, None, like, False, *_UNIT, None, False, True
    )[1].flatten(1)


def fold_weight(x: Raw, weight: Tensor, conv_bias: Tensor | None, bn: BatchNorm2dParameters, relu: bool) -> Folded:
    """Fold bn into weight for this input, and update the running statistics: :func:`reference.folded_weight`."""
    a_mean, covariance = ops.second_moments(x.x, x.affine, x.mean, relu)
    matrix = weight.flatten(1).float().contiguous()
    product = _product(matrix, covariance)
    var = (product * matrix).sum(1).clamp_min_(0)  # a sum of rounded terms may fall below
    statistics = Statistics.of_batch((matrix * a_mean).sum(1), var, count(x.x), bn, conv_bias)
    folded = (matrix * statistics.scale[:, None]).to(x.x.dtype)
    shift = zeros_or(bn.bias, a_mean) - (folded.float() * a_mean).sum(1)
    return Folded(statistics, folded, shift, a_mean, product)


def folded_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of ConvNormActFunction where it folded; the algebra is float32 wherever backward is called."""
    with torch.autocast(grad_out.device.type, enabled=False):
        return _folded_gradients(ctx, grad_out)


def _folded_gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, affine, mean, weight, conv_bias, bn_weight, bn_bias, *rest = ctx.saved_tensors
    var, scale, out, folded, a_mean, product = rest[3:]
    raw = Raw(*rest[:3])
    _, eps, _, relu_x, _, _ = ctx.options
    pixels = count(x)
    grad_out = _laid_out_as(grad_out, out if out is not None else _like_output(x, grad_out))
    dz, gram, grad_bias = ops.expand_bn_act_backward_weight(grad_out, out, x, affine, mean, relu_x)
    matrix = weight.flatten(1).float().contiguous()
    invstd = torch.rsqrt(var + eps)
    centered = gram - torch.outer(grad_bias, a_mean)
    grad_weight_bn = invstd * (centered * matrix).sum(1)
    slope = scale * invstd * grad_weight_bn
    grad_weight = None
    if ctx.needs_input_grad[3]:
        grad_weight = torch.addcmul(centered * scale[:, None], product, slope[:, None], value=-1)
        grad_weight = torch.empty_like(weight).copy_(grad_weight[:, :, None, None])
    grad_x = sums = None
    if ctx.needs_input_grad[0]:
        correction = _gram(matrix * (slope / -pixels)[:, None], matrix)  # -Q
        rounded = correction.to(x.dtype).float()
        row = -(rounded * a_mean[:, None]).sum(0) - (folded.float() * (grad_bias / pixels)[:, None]).sum(0)
        grad_x, sums = ops.expand_bn_act_backward_input(dz, x, affine, mean, relu_x, folded, correction, row)
    grad_residual, grad_raw_affine = dz if ctx.has_residual else None, None
    if raw.affine is not None:
        raw_scale, raw_shift = scale_shift(raw)
        vectors = (raw_scale, raw_shift, raw.mean)
        raw_sums, _ = ops.scale_shift_act_backward_reduce(dz, raw.x, *vectors, *[None] * 5, False)
        grad_residual, _ = ops.scale_shift_act_backward_apply(dz, raw.x, *vectors, *[None] * 8, False)
        grad_raw_affine = raw_sums
    return (
        grad_x,
        sums if affine is not None else None,
        grad_weight,
        None if conv_bias is None else torch.zeros_like(conv_bias),
        _cast(grad_weight_bn, bn_weight),
        _cast(grad_bias, bn_bias),
        grad_residual,
        grad_raw_affine,
    )


def _like_output(x: Tensor, grad_out: Tensor) -> Tensor:
    """An activation with the layout and dtype of a folded unit's output."""
    return torch.empty(grad_out.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
