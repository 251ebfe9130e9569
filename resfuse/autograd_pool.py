"""The derivatives of a stem: normalisation, ReLU and max-pooling as one autograd node, alone or with the convolution.

The rules of :mod:`resfuse.autograd` hold here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resfuse import ops, reference
from resfuse.autograd import _cast, _differentiate, _kept, _reached, _recorded
from resfuse.autograd_conv import _convolve
from resfuse.autograd_norm import Normalized
from resfuse.ownership import owns_saved
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters, Moments, Window
from resfuse.raw import Pairs, Raw, conv_bias_gradient, geometry, zero_with_gradient


def bn_relu_maxpool(
    x: Tensor, bn: BatchNorm2dParameters, window: Window, backend: str, *, owned: bool, moments: Moments | None = None
) -> Tensor:
    """BNReLUMaxPoolFunction where a gradient is needed, else the operators alone.

    owned: x was made for this call and nobody else reads it, so its memory may be used again for its gradient.
    moments: x's, where they are known.
    """
    given = (None, None) if moments is None or not bn.training else moments
    tensors = (x, bn.weight, bn.bias, *given)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return BNReLUMaxPoolFunction.apply(*tensors, bn, window, owned, backend)
    own = Normalized(x, bn, moments, backend)
    return ops.of(backend).scale_shift_relu_maxpool(x, own.scale, own.shift, *window)[0]


def _laid_out_beside(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """grad in x's dtype and the memory order of the indices."""
    if grad.stride() == indices.stride() and grad.dtype == x.dtype:
        return grad
    return torch.empty_like(indices, dtype=x.dtype).copy_(grad)


class BNReLUMaxPoolFunction(torch.autograd.Function):
    """out = maxpool(relu(BN(x))): moments, finalize and scale_shift_relu_maxpool in one node.

    With dz the sum of grad_out over the windows that selected a pixel, where relu was active:
    grad_x = dz * scale + (grad_mean + 2 * grad_var * (x - mean)) / M, as in BNActFunction. Kept are x and one byte for
    each output. A frozen batch normalisation (training False) has no gradient through its statistics; moments that were
    given get theirs themselves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        bn: BatchNorm2dParameters,
        window: Window,
        owned: bool,
        backend: str,
    ) -> Tensor:
        own = Normalized(x, bn, None if mean is None or var is None else Moments(mean, var), backend)
        out, indices = ops.of(backend).scale_shift_relu_maxpool(x, own.scale, own.shift, *window)
        ctx.save_for_backward(x, weight, _kept(bias), indices, *own.saved())
        ctx.training, ctx.eps, ctx.window, ctx.owned = own.training, own.eps, window, owned
        ctx.given, ctx.backend = mean is not None, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if _recorded(grad_out):
            return _double_backward(ctx, grad_out)
        x, weight, bias, indices, mean, var, scale, shift = ctx.saved_tensors
        overwrites = ctx.owned and owns_saved(x)
        kernels, pooled = ops.of(ctx.backend), (_laid_out_beside(grad_out, x, indices), indices, x, scale, shift, mean)
        sums = kernels.scale_shift_relu_maxpool_backward_reduce(*pooled, *ctx.window)
        grad_mean, grad_var, grad_weight = kernels.finalize_backward(sums[1], sums[0], var, weight, ctx.eps)
        through = (grad_mean, grad_var) if ctx.training and not ctx.given else (None, None)
        grad_x = None
        if ctx.needs_input_grad[0]:
            if overwrites:
                # x is read for the last time: its memory spares a fresh tensor's page faults
                kernels.scale_shift_relu_maxpool_backward_apply_(*pooled, *through, *ctx.window)
                grad_x = x.detach()
            else:
                grad_x = kernels.scale_shift_relu_maxpool_backward_apply(*pooled, *through, *ctx.window)
        through = (grad_mean, grad_var) if ctx.given else (None, None)
        return grad_x, _cast(grad_weight, weight), _cast(sums[0], bias), *through, *[None] * 4


def _double_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, _, mean, var, _, _ = ctx.saved_tensors

    def forward(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor) -> Tensor:
        if not ctx.given:
            mean, var = reference.moments(x) if ctx.training else (mean.detach(), var.detach())
        scale, shift = reference.finalize(mean, var, weight, bias, ctx.eps)
        return reference.scale_shift_relu_maxpool(x, scale, shift, *ctx.window)

    grads = _differentiate(forward, [x, weight, bias, mean, var], grad_out)
    return (*grads[:3], *(grads[3:] if ctx.given else (None, None)), *[None] * 4)


def conv_bn_relu_maxpool(
    x: Tensor, conv: Conv2dParameters, bn: BatchNorm2dParameters, window: Window, backend: str
) -> Tensor:
    """ConvBNReLUMaxPoolFunction where a gradient is needed, else the operators alone."""
    tensors = (x, conv.weight, conv.bias, bn.weight, bn.bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return ConvBNReLUMaxPoolFunction.apply(*tensors, bn, geometry(conv), window, backend)
    y, own = _convolve(Raw(x), conv.weight, conv.bias, bn, geometry(conv), False, backend)
    return ops.of(backend).scale_shift_relu_maxpool(y, own.scale, own.shift, *window)[0]


class ConvBNReLUMaxPoolFunction(torch.autograd.Function):
    """out = maxpool(relu(BN(conv(x)))) in one node: conv_stats, finalize and scale_shift_relu_maxpool.

    The convolution sums its own moments. Backward as BNReLUMaxPoolFunction, whose grad_x is the convolution's dY; it is
    written over the convolution's output, which nobody else reads. Kept are x, that output and one byte for each value
    of out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        conv_bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        bn: BatchNorm2dParameters,
        pairs: Pairs,
        window: Window,
        backend: str,
    ) -> Tensor:
        y, own = _convolve(Raw(x), weight, conv_bias, bn, pairs, False, backend)
        out, indices = ops.of(backend).scale_shift_relu_maxpool(y, own.scale, own.shift, *window)
        ctx.save_for_backward(x, weight, _kept(conv_bias), bn_weight, _kept(bn_bias), y, indices, *own)
        ctx.options, ctx.window, ctx.backend = (bn.training, bn.eps, pairs), window, backend
        ctx.conv_bias = _reached(conv_bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, conv_bias, bn_weight, bn_bias, y, indices, mean, var, scale, shift = ctx.saved_tensors
        training, eps, pairs = ctx.options
        if _recorded(grad_out):
            return (*_conv_double_backward(ctx, grad_out), *[None] * 4)
        overwrites = owns_saved(y)
        kernels, pooled = ops.of(ctx.backend), (_laid_out_beside(grad_out, y, indices), indices, y, scale, shift, mean)
        sums = kernels.scale_shift_relu_maxpool_backward_reduce(*pooled, *ctx.window)
        grad_mean, grad_var, grad_weight_bn = kernels.finalize_backward(sums[1], sums[0], var, bn_weight, eps)
        through = (grad_mean, grad_var) if training else (None, None)
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = grad_weight = None
        if need_x or need_weight:
            if overwrites:
                kernels.scale_shift_relu_maxpool_backward_apply_(*pooled, *through, *ctx.window)
                grad_y = y
            else:
                grad_y = kernels.scale_shift_relu_maxpool_backward_apply(*pooled, *through, *ctx.window)
            grad_x, grad_weight, _ = kernels.conv_stats_backward(
                grad_y, *[None] * 5, False, x, None, None, weight, False, *pairs, None, need_x, need_weight
            )
        return (
            grad_x if need_x else None,
            grad_weight if need_weight else None,
            conv_bias_gradient(conv_bias, training, sums[0], var, bn_weight, eps),
            _cast(grad_weight_bn, bn_weight),
            _cast(sums[0], bn_bias),
            *[None] * 4,
        )


def _conv_double_backward(ctx: Any, grad_out: Tensor) -> list[Tensor | None]:
    x, weight, _, bn_weight, bn_bias, _, _, mean, var, _, _ = ctx.saved_tensors
    training, eps, pairs = ctx.options
    frozen = (None, None) if training else (mean, var)

    def forward(x: Tensor, weight: Tensor, conv_bias: Any, bn_weight: Any, bn_bias: Any) -> Tensor:
        conv = Conv2dParameters(weight, zero_with_gradient(conv_bias, training), *pairs)
        y = reference.conv_stats(x, conv)[0]
        bn = BatchNorm2dParameters(frozen[0], frozen[1], bn_weight, bn_bias, training, eps=eps)
        return reference.bn_relu_maxpool(y, bn, *ctx.window)

    return _differentiate(forward, [x, weight, ctx.conv_bias, bn_weight, bn_bias], grad_out)
