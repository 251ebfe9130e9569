"""The derivative of batch normalisation with residual and activation, a node that is three units; and of a sum.

Moments travel with activations: an activation's writer may hand on its moments, and its reader may be given them, so
that no pass is made for statistics alone.
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
    _recorded,
    _through_moments,
)
from resfuse.ownership import owns_saved
from resfuse.parameters import BatchNorm2dParameters, Moments


class Normalized:
    """What normalises one activation: its moments, taken here if not given, or the running statistics."""

    def __init__(self, x: Tensor, bn: BatchNorm2dParameters, moments: Moments | None, backend: str) -> None:
        kernels = ops.of(backend)
        self.training, self.eps = bn.training, bn.eps
        self.mean: Tensor
        self.var: Tensor
        if bn.training:
            if moments is None:
                moments = Moments(*(kernels.moments(x) if x.numel() > 0 else reference.empty_moments(x)))
            self.mean, self.var = moments
            count = x.shape[0] * x.shape[2] * x.shape[3]
            running: tuple[Tensor | None, ...] = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
        else:
            # copies: saved for backward, while the running statistics may change in place
            assert bn.running_mean is not None and bn.running_var is not None
            dtype = ops.accumulate_dtype(x.dtype)
            self.mean, self.var = bn.running_mean.to(dtype, copy=True), bn.running_var.to(dtype, copy=True)
            count, running = 0, (None, None, None)
        self.scale, self.shift = kernels.finalize(
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
    backend: str,
    *,
    owned: bool,
    moments: Moments | None = None,
    return_moments: bool = False,
) -> Any:
    """BNActFunction where a gradient is needed, else the operators alone.

    owned: x and a raw residual were made for this call and nobody else reads them, so their memory may be used again:
    for the output where no gradient is needed, else for their own gradients.
    moments: x's, where they are known. return_moments: (out, mean, var) instead of out.
    """
    raw_weight, raw_bias = (None, None) if residual_bn is None else (residual_bn.weight, residual_bn.bias)
    given = (None, None) if moments is None or not bn.training else moments
    tensors = (x, bn.weight, bn.bias, residual, raw_weight, raw_bias, *given)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return BNActFunction.apply(*tensors, bn, residual_bn, relu, owned, return_moments, backend)
    kernels = ops.of(backend)
    branch = Normalized(x, bn, moments, backend)
    raw = Normalized(residual, residual_bn, None, backend) if residual is not None and residual_bn is not None else None
    raw_affine = (None, None) if raw is None else (raw.scale, raw.shift)
    if return_moments:
        return kernels.scale_shift_act_moments(x, branch.scale, branch.shift, residual, *raw_affine, relu)
    if owned and not torch.compiler.is_compiling():
        kernels.scale_shift_act_(x, branch.scale, branch.shift, residual, *raw_affine, relu)
        return x
    return kernels.scale_shift_act(x, branch.scale, branch.shift, residual, *raw_affine, relu)


class BNActFunction(torch.autograd.Function):
    """out = act(BN(x) + r), r absent, residual, or BN_r(residual): moments, finalize and scale_shift_act in one node;
    optionally the moments of out.

    The chain of the three backwards, with the gradient through the moments added in the pass that writes grad_x:
    grad_x = dz * scale + (grad_mean + 2 * grad_var * (x - mean)) / M. Three nodes would write and read grad_x thrice.
    A frozen batch normalisation (training False) has no gradient through its statistics; moments that were given get
    theirs themselves.
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
        mean: Tensor | None,
        var: Tensor | None,
        bn: BatchNorm2dParameters,
        residual_bn: BatchNorm2dParameters | None,
        relu: bool,
        owned: bool,
        return_moments: bool,
        backend: str,
    ) -> Any:
        branch = Normalized(x, bn, None if mean is None or var is None else Moments(mean, var), backend)
        raw = None
        if residual is not None and residual_bn is not None:
            raw = Normalized(residual, residual_bn, None, backend)
        raw_affine = (None, None) if raw is None else (raw.scale, raw.shift)
        arguments = (x, branch.scale, branch.shift, residual, *raw_affine, relu)
        out_mean = out_var = None
        if return_moments:
            out, out_mean, out_var = ops.of(backend).scale_shift_act_moments(*arguments)
        else:
            out = ops.of(backend).scale_shift_act(*arguments)
        kept_mask = out if relu and residual is not None and raw is None else None
        raw_saved = (None,) * 5 if raw is None else (residual, *raw.saved())
        kept = (kept_mask, *((out, out_mean) if return_moments else (None, None)))
        ctx.save_for_backward(
            x, weight, _kept(bias), residual_weight, _kept(residual_bias), *branch.saved(), *raw_saved, *kept
        )  # fmt: skip
        ctx.relu, ctx.has_residual, ctx.owned, ctx.given = relu, residual is not None, owned, mean is not None
        ctx.branches = (branch.training, branch.eps), None if raw is None else (raw.training, raw.eps)
        ctx.backend = backend
        ctx.set_materialize_grads(not return_moments)
        return (out, out_mean, out_var) if return_moments else out

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_out_mean: Tensor | None = None, grad_out_var: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad_out = _through_moments(grad_out, grad_out_mean, grad_out_var, *saved[-2:], backend=ctx.backend)
        if _recorded(grad_out):
            return _bn_act_double_backward(ctx, saved, grad_out)
        x, weight, bias, raw_weight, raw_bias, mean, var, scale, shift, *others = saved
        raw, raw_mean, raw_var, raw_scale, raw_shift, out, *_ = others
        del saved, others
        overwrites = ctx.owned and owns_saved(x, raw)
        (training, eps), raw_branch = ctx.branches
        kernels, grad_out = ops.of(ctx.backend), _laid_out_as(grad_out, x)
        sums, dz = kernels.scale_shift_act_backward_reduce(
            grad_out, x, scale, shift, mean, raw, raw_scale, raw_shift, raw_mean, out, ctx.relu
        )
        grad_mean, grad_var, grad_weight = kernels.finalize_backward(sums[1], sums[0], var, weight, eps)
        through = (grad_mean, grad_var) if training and not ctx.given else (None, None)
        raw_through: Any = (None, None)
        raw_parameters: Any = (None, None)
        if raw_branch is not None:
            *raw_moments, grad = kernels.finalize_backward(sums[2], sums[0], raw_var, raw_weight, raw_branch[1])
            raw_through = raw_moments if raw_branch[0] else raw_through
            raw_parameters = _cast(grad, raw_weight), _cast(sums[0].clone(), raw_bias)  # two parameters share no memory
        if out is not None:
            grad_out = dz  # already the masked gradient
        grad_x, grad_residual = _activation_gradients(
            ctx, overwrites, grad_out, x, scale, shift, mean, *through,
            raw, raw_scale, raw_shift, raw_mean, *raw_through, ctx.relu and out is None,
        )  # fmt: skip
        if raw is None:
            grad_residual = grad_out if ctx.has_residual else None
        return (
            grad_x,
            _cast(grad_weight, weight),
            _cast(sums[0], bias),
            grad_residual,
            *raw_parameters,
            *((grad_mean, grad_var) if ctx.given else (None, None)),
            *[None] * 6,
        )


def _activation_gradients(ctx: Any, overwrites: bool, *arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of a raw residual, where one is wanted."""
    kernels, x, raw = ops.of(ctx.backend), arguments[1], arguments[7]
    if not (ctx.needs_input_grad[0] or (raw is not None and ctx.needs_input_grad[3])):
        return None, None
    if overwrites:
        # x and raw are read for the last time: their memory is in cache and spares a fresh tensor's page faults
        kernels.scale_shift_act_backward_apply_(*arguments)
        return x.detach(), None if raw is None else raw.detach()
    return kernels.scale_shift_act_backward_apply(*arguments)


def _bn_act_double_backward(ctx: Any, saved: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, raw_weight, raw_bias, *vectors, raw, raw_mean, raw_var, _, _, out, _, _ = saved
    own, raw_branch = ctx.branches

    def normalize(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, branch: Any, given: bool = False) -> Any:
        if not given:
            mean, var = reference.moments(x) if branch[0] else (mean.detach(), var.detach())
        return reference.finalize(mean, var, weight, bias, branch[1])

    def forward(x: Tensor, weight: Any, bias: Any, raw: Any, raw_weight: Any, raw_bias: Any, *moments: Any) -> Tensor:
        scale, shift = normalize(x, weight, bias, moments[0], moments[1], own, ctx.given)
        raw_affine = (None, None)
        if raw is not None:
            raw_affine = normalize(raw, raw_weight, raw_bias, raw_mean, raw_var, raw_branch)
        activation = "relu" if ctx.relu and out is None else "identity"
        return reference.scale_shift_act(x, scale, shift, raw, *raw_affine, activation)

    dz = grad_out if out is None else _masked(grad_out, out)
    grads = _differentiate(forward, [x, weight, bias, raw, raw_weight, raw_bias, *vectors[:2]], dz)
    if raw is None and ctx.has_residual:
        grads[3] = dz
    return (*grads[:6], *(grads[6:] if ctx.given else (None, None)), *[None] * 6)


class AddMomentsFunction(torch.autograd.Function):
    """(out, mean, var) = x + residual and its moments, in one pass.

    Both gradients are grad_out + grad_mean/M + 2*grad_var/M * (out - mean).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones(x.shape[1], dtype=ops.accumulate_dtype(x.dtype), device=x.device)
        affine = (one, torch.zeros_like(one))
        out, mean, var = ops.of(backend).scale_shift_act_moments(x, *affine, residual, None, None, False)
        ctx.save_for_backward(out, mean)
        ctx.has_residual, ctx.backend = residual is not None, backend
        ctx.set_materialize_grads(False)
        return out, mean, var

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None
    ) -> tuple[Tensor, Tensor | None, None]:
        grad = _through_moments(grad_out, grad_mean, grad_var, *ctx.saved_tensors, backend=ctx.backend)
        return grad, grad if ctx.has_residual else None, None
