"""The derivatives of the units that hold a convolution: conv_norm, and conv_norm_act, which closes a residual block.

Between units an activation travels raw, as the convolution wrote it, with what normalises it: see
:class:`resfuse.raw.Raw`. The next reader normalises while it loads, so nothing normalised is stored, in either
direction.

Formulas: the derivatives of conv_stats and finalize. Here M is the number of pixels, a the activated input, dz the
gradient before the ReLU. A 1x1 convolution that folds is :mod:`resfuse.autograd_folding`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resfuse import ops, reference
from resfuse.autograd import (
    _cast,
    _differentiate,
    _kept,
    _laid_out_as,
    _masked,
    _reached,
    _recorded,
    _through_moments,
)
from resfuse.ownership import owns
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters
from resfuse.raw import (
    Pairs,
    Raw,
    Statistics,
    conv_bias_gradient,
    count,
    geometry,
    scale_shift,
    zero_with_gradient,
)


def _convolve(
    x: Raw, weight: Tensor, conv_bias: Tensor | None, bn: BatchNorm2dParameters, pairs: Pairs, relu: bool, backend: str
) -> tuple[Tensor, Statistics]:
    """conv(act(x)) without its bias, and what normalises it."""
    y, mean, var = ops.of(backend).conv_stats(x.x, x.affine, x.mean, weight, relu, *pairs, bn.training)
    if bn.training:
        return y, Statistics.of_batch(mean, var, count(y), bn, conv_bias, backend)
    return y, Statistics.of_running(bn, conv_bias, backend)


class ConvNormFunction(torch.autograd.Function):
    """(y, affine, y_mean[, x]) = conv_stats and finalize in one node; see :func:`reference.conv_norm`.

    With (grad_bias, grad_scale) = grad_affine: grad_mean = -scale*grad_bias and grad_var = -invstd^2*scale*grad_scale/2
    join grad_y where the backward convolutions load it: dY = grad_y + grad_mean/M + 2*grad_var/M * (y - y_mean).

    `through`: x is also returned, for a shortcut, so that the shortcut's gradient is added where grad_x is written.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        affine: Tensor | None,
        mean: Tensor | None,
        weight: Tensor,
        conv_bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        bn: BatchNorm2dParameters,
        pairs: Pairs,
        relu: bool,
        through: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        y, statistics = _convolve(Raw(x, affine, mean), weight, conv_bias, bn, pairs, relu, backend)
        y_affine = statistics.affine(bn)
        ctx.save_for_backward(x, affine, mean, weight, _kept(conv_bias), bn_weight, _kept(bn_bias), y, *statistics[:2])
        ctx.options, ctx.backend, ctx.conv_bias = (bn.training, bn.eps, pairs, relu), backend, _reached(conv_bias)
        ctx.mark_non_differentiable(statistics.mean)
        ctx.set_materialize_grads(False)
        return (y, y_affine, statistics.mean, *([x.view_as(x)] if through else []))

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_affine: Tensor | None, _: None, grad_through: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        recorded = _recorded(grad_y, grad_affine, grad_through)
        overwrites = not recorded and not torch.compiler.is_compiling()
        owned = overwrites and grad_through is not None and owns(grad_through)
        saved = ctx.saved_tensors
        x, affine, mean, weight, conv_bias, bn_weight, bn_bias, y, y_mean, var = saved
        training, eps, pairs, relu = ctx.options
        grad_y = torch.zeros_like(y) if grad_y is None else grad_y
        grad_affine = y_mean.new_zeros(2, y_mean.shape[0]) if grad_affine is None else grad_affine
        if recorded:
            grads = _conv_norm_double_backward(ctx, saved, grad_y, grad_affine, grad_through)
            return (*grads[:2], None, *grads[2:], *[None] * 5)
        kernels = ops.of(ctx.backend)
        grad_mean, grad_var, grad_weight_bn = kernels.finalize_backward(
            grad_affine[1], grad_affine[0], var, bn_weight, eps
        )
        given, grad_through = grad_through, None if grad_through is None else _laid_out_as(grad_through, x)
        wants_x, wants_affine, _, need_weight, *_ = ctx.needs_input_grad
        need_x = wants_x or wants_affine
        arguments = (
            _laid_out_as(grad_y, y), y if training else None, None, y_mean if training else None, grad_mean, grad_var,
            False, x, affine, mean, weight, relu, *pairs, grad_through,
        )  # fmt: skip
        if need_x and (owned or (overwrites and grad_through is not given)):  # what is not given was made here
            grad_x = grad_through
            grad_weight, sums = kernels.conv_stats_backward_(*arguments, need_weight)
        else:
            grad_x, grad_weight, sums = kernels.conv_stats_backward(*arguments, need_x, need_weight)
        return (
            grad_x if wants_x else None,
            sums if affine is not None else None,
            None,
            grad_weight if need_weight else None,
            conv_bias_gradient(conv_bias, training, grad_affine[0], var, bn_weight, eps),
            _cast(grad_weight_bn, bn_weight),
            _cast(grad_affine[0], bn_bias),
            *[None] * 5,
        )


def _conv_norm_double_backward(
    ctx: Any, saved: Any, grad_y: Tensor, grad_affine: Tensor, grad_through: Tensor | None
) -> list[Tensor | None]:
    x, affine, mean, weight, _, bn_weight, bn_bias, _, y_mean, var = saved
    training, eps, pairs, relu = ctx.options

    def forward(
        x: Tensor, affine: Any, weight: Tensor, conv_bias: Any, bn_weight: Any, bn_bias: Any
    ) -> tuple[Tensor, ...]:
        conv = Conv2dParameters(weight, None, *pairs)
        frozen = (None, None) if training else (y_mean, var)
        bn = BatchNorm2dParameters(frozen[0], frozen[1], bn_weight, bn_bias, training, eps=eps)
        y, y_affine, _ = reference.conv_norm(x, affine, mean, conv, bn, "relu" if relu else "identity")
        bias = zero_with_gradient(conv_bias, training)
        if bias is not None:
            y_affine = y_affine + torch.stack([bias * y_affine[1], y_affine[1] * 0])
        return y, y_affine

    grads = _differentiate(forward, [x, affine, weight, ctx.conv_bias, bn_weight, bn_bias], (grad_y, grad_affine))
    if grad_through is not None and grads[0] is not None:
        grads[0] = grads[0] + grad_through
    return grads


class ConvNormActFunction(torch.autograd.Function):
    """out = act(BN(conv(a)) + r), a = act((x - mean)*scale + bias), r absent, residual, or a raw residual, normalised;
    optionally the moments of out.

    The convolution's output y is kept, and its gradient is formed where the backward convolutions load y:
    dY = dz*scale + grad_mean/M + 2*grad_var/M * (y - y_mean).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        affine: Tensor | None,
        mean: Tensor | None,
        weight: Tensor,
        conv_bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        residual: Tensor | None,
        residual_affine: Tensor | None,
        residual_mean: Tensor | None,
        bn: BatchNorm2dParameters,
        pairs: Pairs,
        relu_x: bool,
        relu: bool,
        moments: bool,
        backend: str,
    ) -> Any:
        r = Raw(residual, residual_affine, residual_mean)  # type: ignore[arg-type]
        y, statistics = _convolve(Raw(x, affine, mean), weight, conv_bias, bn, pairs, relu_x, backend)
        y_affine = statistics.affine(bn)
        # the shift that backward's kernels compute from y_affine: the same bits, so the same mask
        own = scale_shift(Raw(y, y_affine, statistics.mean))
        raw = r if residual_affine is not None else Raw(None)  # type: ignore[arg-type]
        arguments = (y, *own, residual, *scale_shift(raw), relu)
        if moments:
            out, out_mean, out_var = ops.of(backend).scale_shift_act_moments(*arguments)
        else:
            out, out_mean, out_var = ops.of(backend).scale_shift_act(*arguments), None, None
        kept_mask = out if relu and residual is not None and raw.affine is None else None
        inputs = (x, affine, mean, weight, _kept(conv_bias), bn_weight, _kept(bn_bias), *raw)
        handed_on = (out, out_mean) if moments else (None, None)
        ctx.save_for_backward(*inputs, statistics.var, y, statistics.mean, y_affine, kept_mask, *handed_on)
        ctx.options, ctx.backend = (bn.training, bn.eps, pairs, relu_x, relu), backend
        ctx.conv_bias = _reached(conv_bias)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(not moments)
        return (out, out_mean, out_var) if moments else out

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_mean: Tensor | None = None, grad_var: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad_out = _through_moments(grad_out, grad_mean, grad_var, *saved[-2:], backend=ctx.backend)
        grads: Any = _conv_norm_act_double_backward if _recorded(grad_out) else _conv_norm_act_backward
        x, affine, weight, conv_bias, bn_weight, bn_bias, residual, residual_affine = grads(ctx, saved, grad_out)
        return (
            x, affine, None, weight, conv_bias, bn_weight, bn_bias, residual, residual_affine, None, *[None] * 6
        )  # fmt: skip


def _conv_norm_act_backward(ctx: Any, saved: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, affine, mean, weight, conv_bias, bn_weight, bn_bias, *rest = saved
    raw, (var, y, y_mean, y_affine, out, *_) = Raw(*rest[:3]), rest[3:]
    training, eps, pairs, relu_x, relu = ctx.options
    kernels, grad_out = ops.of(ctx.backend), _laid_out_as(grad_out, y)
    scale, shift = scale_shift(Raw(y, y_affine, y_mean))
    raw_scale, raw_shift = scale_shift(raw)
    sums, dz = kernels.scale_shift_act_backward_reduce(
        grad_out, y, scale, shift, y_mean, raw.x, raw_scale, raw_shift, raw.mean, out, relu
    )
    grad_mean, grad_var, grad_weight_bn = kernels.finalize_backward(sums[1], sums[0], var, bn_weight, eps)
    through = (grad_mean, grad_var) if training else (None, None)
    grad_residual = grad_raw_affine = None
    if raw.affine is not None:
        # both branches share a mask of two activations: one pass writes both gradients
        dz, grad_residual = kernels.scale_shift_act_backward_apply(
            grad_out, y, scale, shift, y_mean, *through,
            raw.x, raw_scale, raw_shift, raw.mean, None, None, relu,
        )  # fmt: skip
        grad_raw_affine, y_affine = torch.stack([sums[0], sums[2]]), None
    elif out is None:
        dz = grad_out
    if ctx.has_residual and raw.affine is None:
        grad_residual = dz
    grad_x, grad_weight, input_sums = kernels.conv_stats_backward(
        dz, None if y_affine is None else y, y_affine, y_mean, *through, relu and out is None, x, affine,
        mean, weight, relu_x, *pairs, None, any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[3],
    )  # fmt: skip
    return (
        grad_x if ctx.needs_input_grad[0] else None,
        input_sums if affine is not None else None,
        grad_weight if ctx.needs_input_grad[3] else None,
        conv_bias_gradient(conv_bias, training, sums[0], var, bn_weight, eps),
        _cast(grad_weight_bn, bn_weight),
        _cast(sums[0], bn_bias),
        grad_residual,
        grad_raw_affine,
    )


def _conv_norm_act_double_backward(ctx: Any, saved: Any, grad_out: Tensor) -> list[Tensor | None]:
    x, affine, mean, weight, _, bn_weight, bn_bias, *rest = saved
    raw, (var, _, y_mean, _, out, *_) = Raw(*rest[:3]), rest[3:]
    training, eps, pairs, relu_x, relu = ctx.options
    frozen = (None, None) if training else (y_mean, var)
    plain = ctx.has_residual and raw.affine is None
    if plain and relu:  # the residual itself is not kept: its gradient and the mask come from the output
        grad_out = _masked(grad_out, out)

    def forward(
        x: Tensor, affine: Any, weight: Tensor, conv_bias: Any, bn_weight: Any, bn_bias: Any, r: Any, r_affine: Any
    ) -> Tensor:
        conv = Conv2dParameters(weight, zero_with_gradient(conv_bias, training), *pairs)
        bn = BatchNorm2dParameters(frozen[0], frozen[1], bn_weight, bn_bias, training, eps=eps)
        a = reference.normalized(x, affine, mean, "relu" if relu_x else "identity")
        z = reference.conv_bn_act(a, conv, bn, activation="identity")
        if r is not None:
            z = z + reference.normalized(r, r_affine, raw.mean, "identity")
        return reference.activate(z, "relu" if relu and not plain else "identity")

    inputs = [x, affine, weight, ctx.conv_bias, bn_weight, bn_bias, raw.x, raw.affine]
    grads = _differentiate(forward, inputs, grad_out)
    if plain:
        grads[6] = grad_out
    return grads


def conv_norm(
    x: Raw, conv: Conv2dParameters, bn: BatchNorm2dParameters, relu: bool, backend: str, *, through: bool = False
) -> tuple[Raw, Tensor]:
    """The raw output of a convolution with what normalises it, and x for a shortcut (see ConvNormFunction)."""
    tensors = (*x, conv.weight, conv.bias, bn.weight, bn.bias)
    found = ConvNormFunction.apply(*tensors, bn, geometry(conv), relu, through, backend)
    return Raw(*found[:3]), found[3] if through else x.x


def conv_norm_act(
    x: Raw,
    conv: Conv2dParameters,
    bn: BatchNorm2dParameters,
    residual: Raw | None,
    relu_x: bool,
    relu: bool,
    backend: str,
    *,
    moments: bool = False,
) -> Any:
    """act(BN(conv(a)) + r) in one node, or this and its moments; frozen and without gradients, in one pass."""
    r = Raw(None) if residual is None else residual  # type: ignore[arg-type]
    tensors = (*x, conv.weight, conv.bias, bn.weight, bn.bias, *r)
    pairs = geometry(conv)
    if bn.training or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return ConvNormActFunction.apply(*tensors, bn, pairs, relu_x, relu, moments, backend)
    statistics = Statistics.of_running(bn, conv.bias, backend)
    found = ops.of(backend).conv_act(
        *x, relu_x, conv.weight, statistics.scale, statistics.shift, *r, None, None, [1, 1], relu, *pairs, moments
    )
    return found if moments else found[0]
