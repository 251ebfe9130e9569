"""The derivatives that pre-activation adds: normalisation from moments that were handed on, and conv + residual.

A pre-activation block ends in a sum that nothing normalises: its moments come from the pass that writes it, and the
next block's first convolution normalises it while it loads. The rules of :mod:`resfuse.autograd_conv` hold here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resfuse import ops, reference
from resfuse.autograd import _beside, _cast, _differentiate, _kept, _laid_out_as, _recorded, _through_moments
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters, Moments
from resfuse.raw import Pairs, Raw, Statistics, count, geometry


class ConvAddFunction(torch.autograd.Function):
    """out = conv(a) + r, a = act((x - mean)*scale + bias), r absent or residual; and its moments.

    The closing unit of a pre-activation block: whoever normalises out next needs no pass for its statistics.
    grad_residual = grad_out + grad_mean/M + 2*grad_var/M * (out - mean) is the convolution's incoming gradient, too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        affine: Tensor | None,
        mean: Tensor | None,
        weight: Tensor,
        conv_bias: Tensor | None,
        residual: Tensor | None,
        pairs: Pairs,
        relu_x: bool,
        moments: bool,
        backend: str,
    ) -> Any:
        if conv_bias is None:
            shift = torch.zeros(weight.shape[0], dtype=torch.float32, device=x.device)
        else:
            shift = conv_bias.float()
        options = (residual, None, None, None, None, [1, 1], False, *pairs)
        out, out_mean, out_var = ops.of(backend).conv_act(
            x, affine, mean, relu_x, weight, None, shift, *options, moments
        )
        handed_on = (out, out_mean) if moments else (None, None)
        ctx.save_for_backward(x, affine, mean, weight, _kept(conv_bias), *handed_on)
        ctx.options, ctx.backend = (pairs, relu_x), backend
        ctx.set_materialize_grads(not moments)
        return (out, out_mean, out_var) if moments else out

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_mean: Tensor | None = None, grad_var: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        x, affine, mean, weight, conv_bias, *handed_on = ctx.saved_tensors
        pairs, relu_x = ctx.options
        grad = _through_moments(grad_out, grad_mean, grad_var, *handed_on, backend=ctx.backend)
        wants_x, wants_affine, _, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
        need_x = wants_x or wants_affine
        if _recorded(grad):

            def forward(x: Tensor, affine: Any, weight: Tensor, conv_bias: Any) -> Tensor:
                a = reference.normalized(x, affine, mean, "relu" if relu_x else "identity")
                return reference.conv_stats(a, Conv2dParameters(weight, conv_bias, *pairs))[0]

            grads = _differentiate(forward, [x, affine, weight, conv_bias], grad)
            return (*grads[:2], None, *grads[2:], grad if need_residual else None, *[None] * 4)
        grad = _laid_out_as(grad, _beside(x, grad))
        grad_x, grad_weight, sums = ops.of(ctx.backend).conv_stats_backward(
            grad, *[None] * 5, False, x, affine, mean, weight, relu_x, *pairs, None, need_x, need_weight
        )
        return (
            grad_x if wants_x else None,
            sums if affine is not None else None,
            None,
            grad_weight if need_weight else None,
            _cast(grad.float().sum((0, 2, 3)), conv_bias) if need_bias else None,
            grad if need_residual else None,
            *[None] * 4,
        )


class NormFunction(torch.autograd.Function):
    """What normalises an activation whose moments are known: (affine, mean), see :class:`resfuse.raw.Raw`.

    The moments are the batch's in training, when the running statistics are updated; else those are what counts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor | None,
        var: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        bn: BatchNorm2dParameters,
        pixels: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        if bn.training:
            assert mean is not None and var is not None
            statistics = Statistics.of_batch(mean, var, pixels, bn, None, backend)
        else:
            statistics = Statistics.of_running(bn, None, backend)
        ctx.save_for_backward(statistics.mean, statistics.var, bn_weight, _kept(bn_bias))
        ctx.training, ctx.eps, ctx.backend = bn.training, bn.eps, backend
        constant = statistics.mean.clone() if bn.training else statistics.mean
        ctx.mark_non_differentiable(constant)
        return statistics.affine(bn), constant

    @staticmethod
    def backward(ctx: Any, grad_affine: Tensor, _: None) -> tuple[Tensor | None, ...]:
        mean, var, bn_weight, bn_bias = ctx.saved_tensors
        if _recorded(grad_affine):

            def forward(mean: Tensor, var: Tensor, bn_weight: Any, bn_bias: Any) -> Tensor:
                return reference.affine_beside(mean, var, bn_weight, bn_bias, ctx.eps)

            grads: Any = _differentiate(forward, [mean, var, bn_weight, bn_bias], grad_affine)
        else:
            kernels = ops.of(ctx.backend)
            grads = kernels.finalize_backward(grad_affine[1], grad_affine[0], var, bn_weight, ctx.eps)
            grads = (*grads[:2], _cast(grads[2], bn_weight), _cast(grad_affine[0], bn_bias))
        return (*(grads[:2] if ctx.training else (None, None)), *grads[2:], None, None, None)


def norm(x: Tensor, moments: Moments | None, bn: BatchNorm2dParameters, backend: str) -> Raw:
    """x and what normalises it at its readers."""
    given = (None, None) if moments is None or not bn.training else moments
    return Raw(x, *NormFunction.apply(*given, bn.weight, bn.bias, bn, count(x), backend))


def conv_add(
    x: Raw, conv: Conv2dParameters, residual: Tensor | None, relu_x: bool, backend: str, *, moments: bool
) -> Any:
    """conv(act(x)) + residual, or this and its moments (see ConvAddFunction)."""
    return ConvAddFunction.apply(*x, conv.weight, conv.bias, residual, geometry(conv), relu_x, moments, backend)
