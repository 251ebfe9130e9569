"""torch's convolution of bfloat16 where the processor has no instructions for it: computed in float32.

torch emulates the products of bfloat16 there, at a fifth of the speed of float32's (docs/performance-log.md). The rules
of :mod:`resfuse.autograd` hold here too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.autograd import _cast, _differentiate, _kept, _recorded

Geometry = tuple[list[int], list[int], list[int], int]
"""stride, padding, dilation, groups."""


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    bias = None if bias is None else bias.float()
    return F.conv2d(x.float(), weight.float(), bias, *geometry).to(x.dtype)


class WideConvolutionFunction(torch.autograd.Function):
    """y = conv(x, weight) + bias, products and sums in float32, rounded once to x's dtype.

    grad_x, grad_weight and grad_bias are those of the float32 convolution, rounded once. Kept are x and weight as they
    came, not their float32 copies.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight, _kept(bias))
        ctx.geometry = geometry
        return _conv(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        if _recorded(grad_y):
            conv = lambda x, weight, bias: _conv(x, weight, bias, ctx.geometry)  # noqa: E731
            return *_differentiate(conv, (x, weight, bias), grad_y), None
        stride, padding, dilation, groups = ctx.geometry
        sizes = None if bias is None else [weight.shape[0]]
        found = torch.ops.aten.convolution_backward(
            grad_y.float(), x.float(), weight.float(), sizes, stride, padding, dilation, False, [0, 0], groups,
            list(ctx.needs_input_grad[:3]),
        )  # fmt: skip
        return *(None if g is None else _cast(g, like) for g, like in zip(found, (x, weight, bias), strict=True)), None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """WideConvolutionFunction where a gradient is needed, else the convolution alone. x has the dtype of the result."""
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
            return WideConvolutionFunction.apply(x, weight, bias, geometry)
        return _conv(x, weight, bias, geometry)
