"""Train-time folding: batch normalisation in the weight of a 1x1 convolution before its only product is computed.

The batch statistics of a 1x1 convolution follow from the mean and covariance of its input, so its output before the
residual and the ReLU never exists, in either direction. A projection shortcut is a second branch of the same product.
The formulas are :class:`ExpandNormActFunction`'s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resfuse import ops, reference
from resfuse.autograd import _beside, _cast, _differentiate, _kept, _laid_out_as, _masked, _recorded, _through_moments
from resfuse.ownership import owns
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters
from resfuse.raw import Pairs, Raw, Statistics, count, scale_shift, zero_with_gradient

_UNIT: Pairs = ([1, 1], [0, 0], [1, 1], 1)
_NONE: tuple[None, ...] = (None,) * 9


def _as_image(matrix: Tensor) -> Tensor:
    return matrix[:, :, None, None]


def _gram(grad: Tensor, a: Tensor, stride: list[int], backend: str) -> Tensor:
    """grad^T a in float32, (K, C), over the pixels that a 1x1 convolution of this stride reads of a."""
    like = torch.empty(grad.shape[1], a.shape[1], 1, 1, dtype=torch.float32, device=a.device)
    pairs = (stride, [0, 0], [1, 1], 1)
    return ops.of(backend).conv_stats_backward(
        grad, *_NONE[:5], False, a, None, None, like, False, *pairs, None, False, True
    )[1].flatten(1)  # fmt: skip


class Branch(NamedTuple):
    """One 1x1 convolution with its batch normalisation, folded for its input: act(a) weight^T + shift.

    Beside the input, C-by-C and shorter: what is K by C is computed again in backward.
    """

    x: Tensor
    affine: Tensor | None
    mean: Tensor | None
    weight: Tensor
    conv_bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    var: Tensor
    scale: Tensor
    a_mean: Tensor
    covariance: Tensor  # (C, C)


def _matrix(weight: Tensor) -> Tensor:
    """W, (K, C), float32."""
    return weight.flatten(1).float().contiguous()


def _as_weight(matrix: Tensor, weight: Tensor) -> Tensor:
    """A matrix as a gradient of the weight, with its dtype and strides."""
    if matrix.dtype == weight.dtype and matrix.stride() == weight.stride()[:2]:
        return matrix.as_strided(weight.shape, weight.stride())
    return torch.empty_like(weight).copy_(_as_image(matrix))


_NO_BRANCH: tuple[None, ...] = (None,) * len(Branch._fields)


def fold(
    x: Raw,
    weight: Tensor,
    conv_bias: Tensor | None,
    bn: BatchNorm2dParameters,
    relu: bool,
    stride: list[int],
    backend: str,
) -> tuple[Branch, Tensor, Tensor]:
    """Fold bn into weight for this input, and update the running statistics: :func:`reference.folded_weight`.

    Returns:
        what backward needs, the folded weight, and the shift, taken from that rounded weight, so that the mean of BN's
        output is exact whatever the mean of a.
    """
    a_mean, covariance = ops.of(backend).second_moments(x.x, x.affine, x.mean, relu, stride)
    matrix, kernels = _matrix(weight), ops.of(backend)
    mean, var = kernels.folded_moments(matrix, a_mean, covariance)
    statistics = Statistics.of_batch(mean, var, _pixels_read(x.x, stride), bn, conv_bias, backend)
    bias = None if bn.bias is None else bn.bias.to(matrix.dtype)
    folded, shift = kernels.folded_weight(matrix, statistics.scale, bias, a_mean, x.x)
    branch = Branch(*x, weight, _kept(conv_bias), bn.weight, _kept(bn.bias), var, statistics.scale, a_mean, covariance)
    return branch, folded, shift


def _pixels_read(x: Tensor, stride: list[int]) -> int:
    return x.shape[0] * -(-x.shape[2] // stride[0]) * -(-x.shape[3] // stride[1])


class BranchGradients(NamedTuple):
    """The gradients of a branch's tensors, None where there is no such tensor or nobody asks."""

    x: Tensor | None
    affine: Tensor | None
    weight: Tensor | None
    conv_bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None


def _branch_gradients(
    branch: Branch,
    dz: Tensor,
    gram: Tensor,
    grad_bias: Tensor,
    eps: float,
    relu: bool,
    stride: list[int],
    need_x: bool,
    need_weight: bool,
    backend: str,
) -> BranchGradients:
    kernels = ops.of(backend)
    grad_bn_weight, grad_matrix, folded, correction, row = kernels.folded_weight_backward(
        gram, grad_bias, _matrix(branch.weight), branch.a_mean, branch.covariance, branch.var, branch.scale, count(dz),
        eps, branch.x, need_x, need_weight,
    )  # fmt: skip
    grad_x = sums = None
    if need_x:
        source = (branch.x, branch.affine, branch.mean)
        grad_x, sums = kernels.expand_bn_act_backward_input(dz, *source, relu, folded, correction, row, stride)
    return BranchGradients(
        grad_x,
        sums if branch.affine is not None else None,
        _as_weight(grad_matrix, branch.weight) if need_weight else None,
        None if branch.conv_bias is None else torch.zeros_like(branch.conv_bias),
        _cast(grad_bn_weight, branch.bn_weight),
        _cast(grad_bias.clone(), branch.bn_bias),  # two parameters share no memory
    )


class ExpandNormActFunction(torch.autograd.Function):
    """out = act(BN(conv(a)) + r) with a 1x1 convolution in training, a = act((x - mean)*scale + bias), and r absent,
    residual, a raw residual normalised, or BN_r(conv_r(shortcut)), a projection; optionally the moments of out.

    With W' = scale*W and M pixels, forward is one product: out = act([a | shortcut] [W' | W'_r]^T + shift + r).
    Backward, for each branch, dz = grad_out where out is active, (grad_bias = sum dz):
        G = dz^T a,  G0 = G - grad_bias a_mean^T        (K, C)
        grad_weight_bn = invstd * rowsum(G0 * W)
        c1 = scale * invstd * grad_weight_bn / M
        grad_W = scale*G0 - c1*M * (W Cov(a))
        Q = W^T diag(c1) W,  da = dz W' - a Q + (a_mean^T Q - (grad_bias/M)^T W')
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
        shortcut: Tensor | None,
        shortcut_weight: Tensor | None,
        shortcut_conv_bias: Tensor | None,
        shortcut_bn_weight: Tensor | None,
        shortcut_bn_bias: Tensor | None,
        bn: BatchNorm2dParameters,
        shortcut_bn: BatchNorm2dParameters | None,
        stride: list[int],
        relu_x: bool,
        relu: bool,
        moments: bool,
        backend: str,
    ) -> Any:
        main, folded, shift = fold(Raw(x, affine, mean), weight, conv_bias, bn, relu_x, [1, 1], backend)
        branch: Any = _NO_BRANCH
        second: tuple[Tensor | None, ...] = (None, None)
        if shortcut is not None:
            assert shortcut_weight is not None and shortcut_bn is not None
            projection = (shortcut_weight, shortcut_conv_bias, shortcut_bn)
            branch, widened, more = fold(Raw(shortcut), *projection, False, stride, backend)
            second, shift = (shortcut, _as_image(widened)), shift + more
        r = (residual, residual_affine, residual_mean)
        out, out_mean, out_var = ops.of(backend).conv_act(
            x, affine, mean, relu_x, _as_image(folded), None, shift, *r, *second, stride, relu, *_UNIT, moments
        )
        # a plain residual is not kept: its gradient is dz, the mask comes from the output
        raw = r if residual_affine is not None else (None, None, None)
        handed_on = (out, out_mean) if moments else (None, None)
        ctx.save_for_backward(*main, *branch, *raw, out if relu else None, *handed_on)
        ctx.options = bn.eps, None if shortcut_bn is None else shortcut_bn.eps, stride, relu_x, relu
        ctx.has_residual, ctx.backend = residual is not None, backend
        ctx.set_materialize_grads(not moments)
        return (out, out_mean, out_var) if moments else out

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_mean: Tensor | None = None, grad_var: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        recorded = _recorded(grad_out, grad_mean, grad_var)
        overwrites = ctx.backend == "native" and not recorded and not torch.compiler.is_compiling()
        owned = overwrites and grad_out is not None and owns(grad_out)
        given, saved = grad_out, ctx.saved_tensors
        grad_out = _through_moments(grad_out, grad_mean, grad_var, *saved[-2:], backend=ctx.backend)
        if recorded:
            return (*_double_backward(ctx, saved, grad_out), *[None] * 7)
        width = len(Branch._fields)
        main, tensors = Branch(*saved[:width]), saved[width:]
        shortcut = Branch(*tensors[:width]) if tensors[0] is not None else None
        raw, out = Raw(*tensors[width : width + 3]), tensors[width + 3]
        eps, shortcut_eps, stride, relu_x, _ = ctx.options
        need = ctx.needs_input_grad
        # the algebra is float32 wherever backward is called
        with torch.autocast(main.x.device.type, enabled=False):
            grad_out = _laid_out_as(grad_out, out if out is not None else _beside(main.x, grad_out))
            arguments = (grad_out, out, main.x, main.affine, main.mean, relu_x)
            if owned or (overwrites and grad_out is not given):  # what is not given was made here
                dz, (gram, grad_bias) = grad_out, ops.expand_bn_act_backward_weight_(*arguments)
            else:
                dz, gram, grad_bias = ops.of(ctx.backend).expand_bn_act_backward_weight(*arguments)
            options: tuple[Any, ...] = (eps, relu_x, [1, 1], any(need[:2]), need[3], ctx.backend)
            own = _branch_gradients(main, dz, gram, grad_bias, *options)
            other: Any = (None,) * len(BranchGradients._fields)
            if shortcut is not None:
                gram = _gram(dz, shortcut.x, stride, ctx.backend)
                options = (shortcut_eps, False, stride, need[10], need[11], ctx.backend)
                other = _branch_gradients(shortcut, dz, gram, grad_bias, *options)
            residual: Any = (dz if ctx.has_residual else None, None)
            if raw.affine is not None:
                residual = _raw_gradients(dz, raw, ctx.backend)
        return (*own[:2], None, *own[2:], *residual, None, other[0], *other[2:], *[None] * 7)


def _raw_gradients(dz: Tensor, raw: Raw, backend: str) -> tuple[Tensor, Tensor]:
    """The gradients of a raw residual and of its affine."""
    kernels, vectors = ops.of(backend), (*scale_shift(raw), raw.mean)
    sums, _ = kernels.scale_shift_act_backward_reduce(dz, raw.x, *vectors, *_NONE[:5], False)
    grad_residual, _ = kernels.scale_shift_act_backward_apply(dz, raw.x, *vectors, *_NONE[:8], False)
    return grad_residual, sums


def _double_backward(ctx: Any, saved: Any, grad_out: Tensor) -> list[Tensor | None]:
    width = len(Branch._fields)
    main, tensors = Branch(*saved[:width]), saved[width:]
    branch, raw, out = tensors[:width], Raw(*tensors[width : width + 3]), tensors[width + 3]
    eps, shortcut_eps, stride, relu_x, relu = ctx.options
    if relu:  # a plain residual is not kept: the mask comes from the output
        grad_out = _masked(grad_out, out)

    def folded(x: Tensor, tensors: Any, eps: float, stride: Any) -> Tensor:
        weight, conv_bias, bn_weight, bn_bias = tensors
        conv = Conv2dParameters(weight, zero_with_gradient(conv_bias, True), stride)
        bn = BatchNorm2dParameters(None, None, bn_weight, bn_bias, True, eps=eps)
        return reference.conv_bn_act(x, conv, bn, activation="identity")

    def forward(x: Tensor, affine: Any, *others: Any) -> Tensor:
        a = reference.normalized(x, affine, main.mean, "relu" if relu_x else "identity")
        z = folded(a, others[:4], eps, 1)
        if others[4] is not None:
            z = z + reference.normalized(others[4], others[5], raw.mean, "identity")
        return z if others[6] is None else z + folded(others[6], others[7:], shortcut_eps, stride)

    inputs = [*main[:2], *main[3:7], raw.x, raw.affine, branch[0], *branch[3:7]]
    grads = _differentiate(forward, inputs, grad_out)
    if ctx.has_residual and raw.x is None:
        grads[6] = grad_out
    return [*grads[:2], None, *grads[2:8], None, *grads[8:]]


def expand_norm_act(
    x: Raw,
    weight: Tensor,
    conv_bias: Tensor | None,
    bn: BatchNorm2dParameters,
    residual: Raw | None,
    shortcut: tuple[Tensor, Conv2dParameters, BatchNorm2dParameters] | None,
    stride: list[int],
    relu_x: bool,
    relu: bool,
    backend: str,
    *,
    moments: bool = False,
) -> Any:
    """act(BN(conv(a)) + r), folded: out, or out and its moments, by :class:`ExpandNormActFunction`."""
    r = (None, None, None) if residual is None else residual
    branch: tuple[Any, ...] = (None,) * 5
    shortcut_bn = None
    if shortcut is not None:
        input_, conv, shortcut_bn = shortcut
        branch = (input_, conv.weight, conv.bias, shortcut_bn.weight, shortcut_bn.bias)
    tensors = (*x, weight, conv_bias, bn.weight, bn.bias, *r, *branch)
    return ExpandNormActFunction.apply(*tensors, bn, shortcut_bn, stride, relu_x, relu, moments, backend)
