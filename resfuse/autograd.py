"""The derivatives: one torch.autograd.Function for each unit, around the private operators.

Each backward runs the analytic formula through the operators. When it is itself recorded (create_graph=True), it
differentiates :mod:`resfuse.reference` instead, so higher derivatives are right, not silently zero.

Inputs have been checked, cast and laid out by :mod:`resfuse.functional`. Running statistics are never saved.
`backend` names the operators' overload, "native" or "triton": see :func:`resfuse.ops.of`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resfuse import ops, reference


def _recorded(*grads: Tensor | None) -> bool:
    """Whether the running backward is itself being differentiated, or given batches of gradients (is_grads_batched):
    torch has to see every operation of either."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or any(g is not None and _is_batched(g) for g in grads)


def _differentiate(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grads: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of function(*inputs), differentiable again; None for inputs that are None or need no gradient."""
    with torch.enable_grad():
        # aliases: one input may have been computed from another, and that way is not this node's
        inputs = [i.view_as(i) if i is not None and i.requires_grad else i for i in inputs]
    wanted = [i for i in inputs if i is not None and i.requires_grad]
    if not wanted:
        return [None for _ in inputs]
    with torch.enable_grad(), torch.autocast(wanted[0].device.type, enabled=False):
        outputs = function(*inputs)
        pairs = zip(*(((v,) if isinstance(v, Tensor) else v) for v in (outputs, grads)), strict=True)
        outputs, grads = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if i is not None and i.requires_grad else None for i in inputs]


def _is_batched(grad: Tensor) -> bool:
    """Whether this is a batch of gradients, as torch.autograd.grad(..., is_grads_batched=True) hands it on."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def _laid_out_as(grad: Tensor, x: Tensor) -> Tensor:
    """grad in x's memory order and dtype, as the kernels read them side by side."""
    if grad.stride() == x.stride() and grad.dtype == x.dtype:
        return grad
    return torch.empty_like(x).copy_(grad)


def _beside(x: Tensor, grad_out: Tensor) -> Tensor:
    """Memory of grad_out's size for an output of x's dtype, channels_last."""
    return torch.empty(grad_out.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _through_moments(
    grad_out: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    out: Tensor | None,
    out_mean: Tensor | None,
    *,
    backend: str,
) -> Tensor:
    """The whole gradient of an output whose moments were handed on: that of its readers and that of its moments.

    grad_out + grad_mean/M + 2*grad_var/M * (out - mean), in one pass. `out` is None where its moments were not wanted.
    """
    if grad_out is not None and grad_mean is None and grad_var is None:
        return grad_out
    assert out is not None and out_mean is not None
    grad_mean, grad_var = (torch.zeros_like(out_mean) if g is None else g.contiguous() for g in (grad_mean, grad_var))
    if _recorded(grad_out, grad_mean, grad_var):
        through = _differentiate(reference.moments, [out], (grad_mean, grad_var))[0]
        assert through is not None
        return through if grad_out is None else grad_out + through
    if grad_out is None:
        return ops.of(backend).moments_backward(grad_mean, grad_var, out, out_mean)
    one, zero = torch.ones_like(out_mean), torch.zeros_like(out_mean)
    grad_out = _laid_out_as(grad_out, out)
    return ops.of(backend).scale_shift_act_backward_apply(
        grad_out, out, one, zero, out_mean, grad_mean, grad_var, *[None] * 6, False
    )[0]  # fmt: skip


def _cast(grad: Tensor, parameter: Tensor | None) -> Tensor | None:
    """A parameter's gradient in the parameter's dtype."""
    return None if parameter is None else grad.to(parameter.dtype)


def _kept(bias: Tensor | None) -> Tensor | None:
    """A copy of a bias for backward, which may change before that, as stock does not keep it: an optimizer's step."""
    if bias is None or torch.compiler.is_compiling():  # a compiled backward keeps what it reads, and this it does not
        return bias
    return bias.detach().clone().requires_grad_(bias.requires_grad)


def _reached(conv_bias: Tensor | None) -> Tensor | None:
    """A convolution's bias itself, which gradients of gradients reach beside frozen statistics. Its value is not read:
    it may change before that."""
    return None if torch.compiler.is_compiling() else conv_bias


def _masked(grad: Tensor, out: Tensor) -> Tensor:
    """relu's gradient: grad where out > 0 or NaN, else 0, also for an infinite grad."""
    return torch.where(out.detach() <= 0, 0, grad)


class AddReLUFunction(torch.autograd.Function):
    """out = relu(x + residual). Both gradients are grad_out where out > 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, backend: str) -> Tensor:
        out = ops.of(backend).add_relu(x, residual)
        ctx.save_for_backward(out)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        (out,) = ctx.saved_tensors
        if _recorded(grad_out):
            grad = _masked(grad_out, out)
        else:
            grad = ops.of(ctx.backend).add_relu_backward(_laid_out_as(grad_out, out), out)
        return grad, grad, None


class MomentsFunction(torch.autograd.Function):
    """(mean, var) of x. grad_x = (grad_mean + 2 * grad_var * (x - mean)) / M."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        mean, var = ops.of(backend).moments(x)
        ctx.save_for_backward(x, mean)
        ctx.backend = backend
        return mean, var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, None]:
        x, mean = ctx.saved_tensors
        if _recorded(grad_mean, grad_var):
            return _differentiate(reference.moments, [x], (grad_mean, grad_var))[0], None
        return ops.of(ctx.backend).moments_backward(grad_mean.contiguous(), grad_var.contiguous(), x, mean), None


class FinalizeFunction(torch.autograd.Function):
    """(scale, shift) from mean, var, weight and bias.

    With t = grad_scale - mean * grad_shift and invstd = 1 / sqrt(var + eps):
    grad_bias = grad_shift, grad_weight = invstd * t, grad_mean = -scale * grad_shift,
    grad_var = -invstd^2 * scale * t / 2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        count: int,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        running = (running_mean, running_var, num_batches_tracked)
        scale, shift = ops.of(backend).finalize(mean, var, count, weight, bias, *running, momentum, eps)
        ctx.save_for_backward(mean, var, weight, _kept(bias))
        ctx.eps, ctx.backend = eps, backend
        return scale, shift

    @staticmethod
    def backward(ctx: Any, grad_scale: Tensor, grad_shift: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, weight, bias = ctx.saved_tensors
        if _recorded(grad_scale, grad_shift):
            grads = _differentiate(
                lambda mean, var, weight, bias: reference.finalize(mean, var, weight, bias, ctx.eps),
                [mean, var, weight, bias],
                (grad_scale, grad_shift),
            )
            return (*grads, *[None] * 7)
        centered = grad_scale - mean * grad_shift
        grad_mean, grad_var, grad_weight = ops.of(ctx.backend).finalize_backward(
            centered, grad_shift.contiguous(), var, weight, ctx.eps
        )
        return (grad_mean, grad_var, _cast(grad_weight, weight), _cast(grad_shift, bias), *[None] * 7)


class ScaleShiftActFunction(torch.autograd.Function):
    """out = act(x*scale + shift + r), r absent, residual, or residual*residual_scale + residual_shift.

    With dz = grad_out where the unit was active: grad_x = dz * scale, grad_scale = sum dz * x, grad_shift = sum dz;
    grad_residual = dz, or like x's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        residual_scale: Tensor | None,
        residual_shift: Tensor | None,
        relu: bool,
        backend: str,
    ) -> Tensor:
        out = ops.of(backend).scale_shift_act(x, scale, shift, residual, residual_scale, residual_shift, relu)
        raw = residual if residual_scale is not None else None
        kept_mask = out if relu and residual is not None and raw is None else None
        ctx.save_for_backward(x, scale, shift, raw, residual_scale, residual_shift, kept_mask)
        ctx.relu, ctx.has_residual, ctx.backend = relu, residual is not None, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, raw, raw_scale, raw_shift, out = ctx.saved_tensors
        if _recorded(grad_out):
            return _scale_shift_act_double_backward(ctx, grad_out)
        grad_out = _laid_out_as(grad_out, x)
        kernels, zero = ops.of(ctx.backend), torch.zeros_like(scale)
        raw_zero = None if raw is None else zero
        sums, dz = kernels.scale_shift_act_backward_reduce(
            grad_out, x, scale, shift, zero, raw, raw_scale, raw_shift, raw_zero, out, ctx.relu
        )
        masked = out is not None  # dz already is the masked gradient
        grad_x, grad_raw = kernels.scale_shift_act_backward_apply(
            dz if masked else grad_out, x, scale, shift, zero, None, None,
            raw, raw_scale, raw_shift, raw_zero, None, None, ctx.relu and not masked,
        )  # fmt: skip
        if raw is not None:
            return grad_x, sums[1], sums[0], grad_raw, sums[2], sums[0], None, None
        grad_residual = (dz if masked else grad_out) if ctx.has_residual else None
        return grad_x, sums[1], sums[0], grad_residual, None, None, None, None


def _scale_shift_act_double_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, raw, raw_scale, raw_shift, out = ctx.saved_tensors
    dz = grad_out if out is None else _masked(grad_out, out)
    activation = "relu" if ctx.relu and out is None else "identity"

    def forward(x: Tensor, scale: Tensor, shift: Tensor, raw: Any, raw_scale: Any, raw_shift: Any) -> Tensor:
        return reference.scale_shift_act(x, scale, shift, raw, raw_scale, raw_shift, activation)

    grads = _differentiate(forward, [x, scale, shift, raw, raw_scale, raw_shift], dz)
    if raw is None and ctx.has_residual:
        grads[3] = dz
    return (*grads, None, None)
