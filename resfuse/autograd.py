"""The derivatives: one torch.autograd.Function for each unit, around the private operators.

Each backward runs the analytic formula through the operators. When it is itself recorded (create_graph=True), it
differentiates :mod:`resfuse.reference` instead, so higher derivatives are right, not silently zero.

Inputs have been checked, cast and laid out by :mod:`resfuse.functional`. Running statistics are never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resfuse import ops, reference
from resfuse.parameters import BatchNorm2dParameters


def _recorded() -> bool:
    """Whether the running backward is itself being differentiated."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _differentiate(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grads: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of function(*inputs), differentiable again; None for inputs that are None or need no gradient."""
    wanted = [i for i in inputs if i is not None and i.requires_grad]
    if not wanted:
        return [None for _ in inputs]
    with torch.enable_grad(), torch.autocast(wanted[0].device.type, enabled=False):
        outputs = function(*inputs)
        pairs = zip(*(((v,) if isinstance(v, Tensor) else v) for v in (outputs, grads)), strict=True)
        outputs, grads = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if i is not None and i.requires_grad else None for i in inputs]


def _graph_is_kept() -> bool:
    """Whether the running backward keeps what was saved (retain_graph=True); True where torch does not say."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or keeps()


def _laid_out_as(grad: Tensor, x: Tensor) -> Tensor:
    """grad in x's memory order and dtype, as the kernels read them side by side."""
    if grad.stride() == x.stride() and grad.dtype == x.dtype:
        return grad
    return torch.empty_like(x).copy_(grad)


def _through_moments(
    grad_out: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    out: Tensor | None,
    out_mean: Tensor | None,
) -> Tensor:
    """The whole gradient of an output whose moments were handed on: that of its readers and that of its moments.

    grad_out + grad_mean/M + 2*grad_var/M * (out - mean), in one pass.
    """
    if grad_mean is None and grad_var is None:
        assert grad_out is not None
        return grad_out
    assert out is not None and out_mean is not None
    grad_mean, grad_var = (torch.zeros_like(out_mean) if g is None else g.contiguous() for g in (grad_mean, grad_var))
    if grad_out is None:
        return ops.moments_backward(grad_mean, grad_var, out, out_mean)
    one, zero = torch.ones_like(out_mean), torch.zeros_like(out_mean)
    grad_out = _laid_out_as(grad_out, out)
    return ops.scale_shift_act_backward_apply(
        grad_out, out, one, zero, out_mean, grad_mean, grad_var, *[None] * 6, False
    )[0]  # fmt: skip


def _cast(grad: Tensor, parameter: Tensor | None) -> Tensor | None:
    """A parameter's gradient in the parameter's dtype."""
    return None if parameter is None else grad.to(parameter.dtype)


def _masked(grad: Tensor, out: Tensor) -> Tensor:
    """relu's gradient: grad where out > 0 or NaN, else 0, also for an infinite grad."""
    return torch.where(out.detach() <= 0, 0, grad)


class AddReLUFunction(torch.autograd.Function):
    """out = relu(x + residual). Both gradients are grad_out where out > 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor) -> Tensor:
        out = ops.add_relu(x, residual)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        (out,) = ctx.saved_tensors
        if _recorded():
            return (_masked(grad_out, out),) * 2
        return (ops.add_relu_backward(_laid_out_as(grad_out, out), out),) * 2


class MomentsFunction(torch.autograd.Function):
    """(mean, var) of x. grad_x = (grad_mean + 2 * grad_var * (x - mean)) / M."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = ops.moments(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor | None:
        x, mean = ctx.saved_tensors
        if _recorded():
            return _differentiate(reference.moments, [x], (grad_mean, grad_var))[0]
        return ops.moments_backward(grad_mean.contiguous(), grad_var.contiguous(), x, mean)


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
    ) -> tuple[Tensor, Tensor]:
        running = (running_mean, running_var, num_batches_tracked)
        scale, shift = ops.finalize(mean, var, count, weight, bias, *running, momentum, eps)
        ctx.save_for_backward(mean, var, weight, bias)
        ctx.eps = eps
        return scale, shift

    @staticmethod
    def backward(ctx: Any, grad_scale: Tensor, grad_shift: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, weight, bias = ctx.saved_tensors
        if _recorded():
            grads = _differentiate(
                lambda mean, var, weight, bias: reference.finalize(mean, var, weight, bias, ctx.eps),
                [mean, var, weight, bias],
                (grad_scale, grad_shift),
            )
            return (*grads, *[None] * 6)
        centered = grad_scale - mean * grad_shift
        grad_mean, grad_var, grad_weight = ops.finalize_backward(
            centered, grad_shift.contiguous(), var, weight, ctx.eps
        )
        return (grad_mean, grad_var, _cast(grad_weight, weight), _cast(grad_shift, bias), *[None] * 6)


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
    ) -> Tensor:
        out = ops.scale_shift_act(x, scale, shift, residual, residual_scale, residual_shift, relu)
        raw = residual if residual_scale is not None else None
        kept_mask = out if relu and residual is not None and raw is None else None
        ctx.save_for_backward(x, scale, shift, raw, residual_scale, residual_shift, kept_mask)
        ctx.relu, ctx.has_residual = relu, residual is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, raw, raw_scale, raw_shift, out = ctx.saved_tensors
        if _recorded():
            return _scale_shift_act_double_backward(ctx, grad_out)
        grad_out = _laid_out_as(grad_out, x)
        zero = torch.zeros_like(scale)
        raw_zero = None if raw is None else zero
        sums, dz = ops.scale_shift_act_backward_reduce(
            grad_out, x, scale, shift, zero, raw, raw_scale, raw_shift, raw_zero, out, ctx.relu
        )
        masked = out is not None  # dz already is the masked gradient
        grad_x, grad_raw = ops.scale_shift_act_backward_apply(
            dz if masked else grad_out, x, scale, shift, zero, None, None,
            raw, raw_scale, raw_shift, raw_zero, None, None, ctx.relu and not masked,
        )  # fmt: skip
        if raw is not None:
            return grad_x, sums[1], sums[0], grad_raw, sums[2], sums[0], None
        grad_residual = (dz if masked else grad_out) if ctx.has_residual else None
        return grad_x, sums[1], sums[0], grad_residual, None, None, None


def _scale_shift_act_double_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, raw, raw_scale, raw_shift, out = ctx.saved_tensors
    dz = grad_out if out is None else _masked(grad_out, out)
    activation = "relu" if ctx.relu and out is None else "identity"

    def forward(x: Tensor, scale: Tensor, shift: Tensor, raw: Any, raw_scale: Any, raw_shift: Any) -> Tensor:
        return reference.scale_shift_act(x, scale, shift, raw, raw_scale, raw_shift, activation)

    grads = _differentiate(forward, [x, scale, shift, raw, raw_scale, raw_shift], dz)
    if raw is None and ctx.has_residual:
        grads[3] = dz
    return (*grads, None)


class _Normalized:
    """What normalises one activation: its moments or the running statistics, as scale and shift."""

    def __init__(self, x: Tensor, bn: BatchNorm2dParameters) -> None:
        self.training, self.eps = bn.training, bn.eps
        self.mean: Tensor
        self.var: Tensor
        if bn.training:
            self.mean, self.var = ops.moments(x) if x.numel() > 0 else reference.empty_moments(x)
            count = x.shape[0] * x.shape[2] * x.shape[3]
            running: tuple[Tensor | None, ...] = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
        else:
            # copies: saved for backward, while the running statistics may change in place
            assert bn.running_mean is not None and bn.running_var is not None
            dtype = ops.accumulate_dtype(x.dtype)
            self.mean, self.var = bn.running_mean.to(dtype, copy=True), bn.running_var.to(dtype, copy=True)
            count, running = 0, (None, None, None)
        self.scale, self.shift = ops.finalize(
            self.mean, self.var, count, bn.weight, bn.bias, *running, bn.momentum, bn.eps
        )

    def saved(self) -> tuple[Tensor, ...]:
        return self.mean, self.var, self.scale, self.shift


def bn_act(
    x: Tensor,
    bn: BatchNorm2dParameters,
    residual: Tensor | None,
    residual_bn: BatchNorm2dParameters | None,
    relu: bool,
    *,
    owned: bool,
) -> Tensor:
    """BNActFunction where a gradient is needed, else the operators alone.

    owned: x and a raw residual were made for this call and nobody else reads them, so their memory may be used again:
    for the output where no gradient is needed, else for their own gradients.
    """
    raw_weight, raw_bias = (None, None) if residual_bn is None else (residual_bn.weight, residual_bn.bias)
    tensors = (x, bn.weight, bn.bias, residual, raw_weight, raw_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return BNActFunction.apply(*tensors, bn, residual_bn, relu, owned)
    branch = _Normalized(x, bn)
    raw = _Normalized(residual, residual_bn) if residual is not None and residual_bn is not None else None
    raw_affine = (None, None) if raw is None else (raw.scale, raw.shift)
    if owned and not torch.compiler.is_compiling():
        ops.scale_shift_act_(x, branch.scale, branch.shift, residual, *raw_affine, relu)
        return x
    return ops.scale_shift_act(x, branch.scale, branch.shift, residual, *raw_affine, relu)


class BNActFunction(torch.autograd.Function):
    """out = act(BN(x) + r), r absent, residual, or BN_r(residual): moments, finalize and scale_shift_act in one node.

    The chain of the three backwards, with the gradient through the moments added in the pass that writes grad_x:
    grad_x = dz * scale + (grad_mean + 2 * grad_var * (x - mean)) / M. Three nodes would write and read grad_x thrice.
    A frozen batch normalisation (training False) has no gradient through its statistics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        residual_weight: Tensor | None,
        residual_bias: Tensor | None,
        bn: BatchNorm2dParameters,
        residual_bn: BatchNorm2dParameters | None,
        relu: bool,
        owned: bool,
    ) -> Tensor:
        branch = _Normalized(x, bn)
        raw = _Normalized(residual, residual_bn) if residual is not None and residual_bn is not None else None
        raw_affine = (None, None) if raw is None else (raw.scale, raw.shift)
        out = ops.scale_shift_act(x, branch.scale, branch.shift, residual, *raw_affine, relu)

        kept_mask = out if relu and residual is not None and raw is None else None
        raw_saved = (None,) * 5 if raw is None else (residual, *raw.saved())
        ctx.save_for_backward(x, weight, bias, residual_weight, residual_bias, *branch.saved(), *raw_saved, kept_mask)
        ctx.relu, ctx.has_residual, ctx.owned = relu, residual is not None, owned
        ctx.branches = (branch.training, branch.eps), None if raw is None else (raw.training, raw.eps)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if _recorded():
            return _bn_act_double_backward(ctx, grad_out)
        x, weight, bias, raw_weight, raw_bias, mean, var, scale, shift, *others = ctx.saved_tensors
        raw, raw_mean, raw_var, raw_scale, raw_shift, out = others
        (training, eps), raw_branch = ctx.branches
        grad_out = _laid_out_as(grad_out, x)
        sums, dz = ops.scale_shift_act_backward_reduce(
            grad_out, x, scale, shift, mean, raw, raw_scale, raw_shift, raw_mean, out, ctx.relu
        )
        grad_mean, grad_var, grad_weight = ops.finalize_backward(sums[1], sums[0], var, weight, eps)
        through = (grad_mean, grad_var) if training else (None, None)
        raw_through, grad_raw_weight = (None, None), None
        if raw_branch is not None:
            *raw_moments, grad_raw_weight = ops.finalize_backward(sums[2], sums[0], raw_var, raw_weight, raw_branch[1])
            raw_through = raw_moments if raw_branch[0] else (None, None)

        masked = out is not None  # dz already is the masked gradient
        if masked:
            grad_out = dz
        grad_x = grad_residual = None
        if ctx.needs_input_grad[0] or (raw is not None and ctx.needs_input_grad[3]):
            arguments = (
                grad_out, x, scale, shift, mean, *through,
                raw, raw_scale, raw_shift, raw_mean, *raw_through, ctx.relu and not masked,
            )  # fmt: skip
            if ctx.owned and not torch.compiler.is_compiling() and not _graph_is_kept():
                # x and raw are read for the last time: their memory is in cache and spares a fresh tensor's page faults
                ops.scale_shift_act_backward_apply_(*arguments)
                grad_x, grad_residual = x.detach(), None if raw is None else raw.detach()
            else:
                grad_x, grad_residual = ops.scale_shift_act_backward_apply(*arguments)
        if raw is None:
            grad_residual = grad_out if ctx.has_residual else None
        return (
            grad_x,
            _cast(grad_weight, weight),
            _cast(sums[0], bias),
            grad_residual,
            None if grad_raw_weight is None else _cast(grad_raw_weight, raw_weight),
            None if raw_branch is None else _cast(sums[0].clone(), raw_bias),  # two parameters share no memory
            *[None] * 4,
        )


def _bn_act_double_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, raw_weight, raw_bias, mean, var, _, _, raw, raw_mean, raw_var, _, _, out = ctx.saved_tensors
    own, raw_branch = ctx.branches

    def normalize(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, branch: Any) -> tuple[Tensor, Tensor]:
        mean, var = reference.moments(x) if branch[0] else (mean.detach(), var.detach())
        return reference.finalize(mean, var, weight, bias, branch[1])

    def forward(x: Tensor, weight: Any, bias: Any, raw: Any, raw_weight: Any, raw_bias: Any) -> Tensor:
        scale, shift = normalize(x, weight, bias, mean, var, own)
        raw_scale = raw_shift = None
        if raw is not None:
            raw_scale, raw_shift = normalize(raw, raw_weight, raw_bias, raw_mean, raw_var, raw_branch)
        activation = "relu" if ctx.relu and out is None else "identity"
        return reference.scale_shift_act(x, scale, shift, raw, raw_scale, raw_shift, activation)

    dz = grad_out if out is None else _masked(grad_out, out)
    grads = _differentiate(forward, [x, weight, bias, raw, raw_weight, raw_bias], dz)
    if raw is None and ctx.has_residual:
        grads[3] = dz
    return (*grads, *[None] * 4)
