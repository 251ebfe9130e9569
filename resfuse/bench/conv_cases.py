"""The convolutions that are measured as units: `conv_stats`, which normalises what it loads and sums what it stores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse import Conv2dParameters, ops, reference
from resfuse.bench.shapes import ConvShape
from resfuse.bench.unit_cases import Case, Results


class ConvInputs:
    """Operands of one convolution in one dtype; `of` gives the same values in another dtype."""

    x: Tensor
    weight: Tensor
    grad: Tensor
    affine: Tensor
    grad_mean: Tensor
    grad_var: Tensor

    def __init__(self, shape: ConvShape, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        fan_in = math.prod(shape.weight[1:])
        for name, size, spread in (("x", shape.input, 1.0), ("grad", shape.output, 1.0),
                                   ("weight", shape.weight, fan_in**-0.5)):  # fmt: skip
            value = (spread * torch.randn(size, generator=generator)).to(dtype)
            setattr(self, name, value.contiguous(memory_format=torch.channels_last))
        self.affine = torch.randn(2, shape.input[1], generator=generator)
        for name in ("grad_mean", "grad_var"):
            setattr(self, name, torch.randn(shape.output[1], generator=generator))
        self.mean = reference.moments(self.x)[0]

    def of(self, dtype: torch.dtype) -> ConvInputs:
        """Copies to differentiate with respect to; vectors in float32 at least."""
        other = object.__new__(ConvInputs)
        for name, value in vars(self).items():
            wanted = dtype if value.dim() == 4 or dtype == torch.float64 else torch.float32
            setattr(other, name, value.to(wanted, copy=True).requires_grad_())
        return other


def form_of(shape: ConvShape) -> str:
    """How a convolution is called in a row: its kernel, its stride and its groups where these are not 1."""
    stride = f" stride {shape.stride[0]}" if shape.stride[0] > 1 else ""
    groups = f" groups {shape.groups}" if shape.groups > 1 else ""
    return f"{shape.weight[2]}x{shape.weight[3]}{stride}{groups}"


def conv_cases(i: ConvInputs, shape: ConvShape) -> Iterator[Case]:
    """Forward and backward of one convolution; bytes are every operand once, flops those of the products alone."""
    geometry = (shape.stride, shape.padding, shape.dilation, shape.groups)
    values = math.prod(shape.input), math.prod(shape.output), math.prod(shape.weight)
    read, written, weight = (count * i.x.element_size() for count in values)
    products = 2 * math.prod(shape.output) * math.prod(shape.weight[1:])
    more: dict[str, Any] = {"weight": list(shape.weight), "stride": list(shape.stride)}

    def forward(j: ConvInputs) -> Results:
        a = reference.normalized(j.x, j.affine, j.mean.detach())
        return reference.conv_stats(a, Conv2dParameters(j.weight, None, *geometry))

    def backward(j: ConvInputs) -> Results:
        ends, starts = forward(j), (j.grad, j.grad_mean, j.grad_var)
        return torch.autograd.grad(ends, [j.x, j.weight, j.affine], [start.detach() for start in starts])

    def stock() -> Results:
        a = torch.relu_(F.batch_norm(i.x, i.mean, one, i.affine[1], i.affine[0], False, 0.0, 0.0))
        y = F.conv2d(a, i.weight, None, *geometry)
        return (y, *torch.var_mean(y, (0, 2, 3), correction=0)[::-1])

    one, form = torch.ones_like(i.mean), form_of(shape)
    operands = (i.x, i.affine, i.mean, i.weight, True, *geometry)
    y, y_mean, _ = ops.conv_stats(*operands, True)
    yield Case(
        "conv_stats", form, lambda: ops.conv_stats(*operands, True), forward,
        read + written + weight, products, stock, more,
    )  # fmt: skip
    loaded = (i.grad, y, None, y_mean, i.grad_mean, i.grad_var, False)
    yield Case(
        "conv_stats backward", form, lambda: ops.conv_stats_backward(*loaded, *operands, None, True, True), backward,
        2 * read + 2 * written + 2 * weight, 2 * products, None, more,
    )  # fmt: skip
