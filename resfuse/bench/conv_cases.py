"""The convolutions that are measured as units, each of which normalises what it loads.

`conv_stats` sums what it stores; `conv_act` adds and activates. Where a 1x1 convolution expands, also its folded form:
`second_moments`, and the composition `expand_bn_act`, which ends a bottleneck in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse import BatchNorm2dParameters, Conv2dParameters, ops, reference
from resfuse.autograd_folding import expand_norm_act
from resfuse.bench.shapes import ConvShape
from resfuse.bench.unit_cases import EPS, Case, Results
from resfuse.raw import Raw

UNITS = ("conv_stats", "conv_stats backward", "conv_act")
EXPANDING = ("second_moments", "expand_bn_act forward", "expand_bn_act backward")


class ConvInputs:
    """Operands of one convolution in one dtype; `of` gives the same values in another dtype."""

    backend: str
    x: Tensor
    weight: Tensor
    grad: Tensor
    affine: Tensor
    grad_mean: Tensor
    grad_var: Tensor
    bn_weight: Tensor
    bn_bias: Tensor
    residual: Tensor

    def __init__(self, shape: ConvShape, dtype: torch.dtype, device: str = "cpu", backend: str = "native") -> None:
        self.backend = backend
        source: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        fan_in = math.prod(shape.weight[1:])
        for name, size, spread in (("x", shape.input, 1.0), ("grad", shape.output, 1.0),
                                   ("weight", shape.weight, fan_in**-0.5)):  # fmt: skip
            value = (spread * torch.randn(size, **source)).to(dtype)
            setattr(self, name, value.contiguous(memory_format=torch.channels_last))
        self.affine = torch.randn(2, shape.input[1], **source)
        for name in ("grad_mean", "grad_var", "bn_weight", "bn_bias"):
            setattr(self, name, torch.randn(shape.output[1], **source))
        residual = torch.randn(shape.output, **source).to(dtype)
        self.residual = residual.contiguous(memory_format=torch.channels_last)
        self.mean = reference.moments(self.x)[0]

    def of(self, dtype: torch.dtype) -> ConvInputs:
        """Copies to differentiate with respect to; vectors in float32 at least."""
        other = object.__new__(ConvInputs)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                wanted = dtype if value.dim() == 4 or dtype == torch.float64 else torch.float32
                value = value.to(wanted, copy=True).requires_grad_()
            setattr(other, name, value)
        return other

    @property
    def candidates(self) -> dict[str, Any]:
        """Who computes both units, ours first: Triton's fused kernel, then torch's convolution between its passes."""
        if self.backend == "native":
            return {"native": ops}
        from resfuse._triton.candidates import CANDIDATES

        return {name: CANDIDATES[name] for name in ("fused", "composed")}


def form_of(shape: ConvShape) -> str:
    """How a convolution is called in a row: its kernel, its stride and its groups where these are not 1."""
    stride = f" stride {shape.stride[0]}" if shape.stride[0] > 1 else ""
    groups = f" groups {shape.groups}" if shape.groups > 1 else ""
    return f"{shape.weight[2]}x{shape.weight[3]}{stride}{groups}"


def units_of(shape: ConvShape) -> tuple[str, ...]:
    """The units that a convolution is measured as."""
    expands = shape.weight[2:] == (1, 1) and set(shape.stride) == {1} and shape.groups == 1
    return UNITS + (EXPANDING if expands and shape.weight[0] > shape.weight[1] else ())


def _loaded(j: ConvInputs) -> Tensor:
    """What the convolution reads, once it is normalised."""
    return reference.normalized(j.x, j.affine, j.mean.detach())


def _stock_loaded(j: ConvInputs) -> Tensor:
    """The same by stock torch operators."""
    return torch.relu_(
        F.batch_norm(j.x, j.mean.detach(), torch.ones_like(j.mean), j.affine[1], j.affine[0], False, 0.0, 0.0)
    )


def conv_cases(i: ConvInputs, shape: ConvShape) -> Iterator[Case]:
    """All rows of one convolution; bytes are every operand once, flops those of the products alone.

    Of Triton's it is the fused kernel, beside the composition, whatever a call would choose.
    """
    yield from _conv_stats(i, shape)
    yield _conv_act(i, shape)
    if EXPANDING[0] in units_of(shape):
        yield _second_moments(i, shape)
        yield from _expand_bn_act(i, shape)


def _more(shape: ConvShape) -> dict[str, Any]:
    """What tells a convolution's rows apart."""
    return {"weight": list(shape.weight), "stride": list(shape.stride)}


def _counts(i: ConvInputs, shape: ConvShape) -> tuple[int, int, int, int]:
    """Bytes of input, output and weight, and the operations of the product."""
    read, written, weight = (math.prod(size) * i.x.element_size() for size in (shape.input, shape.output, shape.weight))
    return read, written, weight, 2 * math.prod(shape.output) * math.prod(shape.weight[1:])


def _conv_act(i: ConvInputs, shape: ConvShape) -> Case:
    geometry = (shape.stride, shape.padding, shape.dilation, shape.groups)
    read, written, weight, products = _counts(i, shape)
    operands = (i.x, i.affine, i.mean, True, i.weight, None, i.bn_bias, *(None,) * 5, (1, 1), True, *geometry, False)

    names = list(i.candidates)[1:]
    ours = [lambda c=c: c.conv_act(*operands)[:1] for c in i.candidates.values()]

    def expected(j: ConvInputs) -> Results:
        return (reference.conv_bias_act(_loaded(j), Conv2dParameters(j.weight, j.bn_bias.to(j.x.dtype), *geometry)),)

    def stock() -> Results:
        return (torch.relu_(F.conv2d(_stock_loaded(i), i.weight, i.bn_bias.to(i.x.dtype), *geometry)),)

    return Case(
        "conv_act", form_of(shape), ours[0], expected, read + written + weight, products, stock, _more(shape),
        dict(zip(names, ours[1:], strict=True)),
    )  # fmt: skip


def _pixels(a: Tensor) -> Tensor:
    return a.permute(0, 2, 3, 1).flatten(0, 2)


def _second_moments(i: ConvInputs, shape: ConvShape) -> Case:
    channels, pixels = shape.input[1], math.prod(shape.input) // shape.input[1]
    read = _counts(i, shape)[0]

    def expected(j: ConvInputs) -> Results:
        a = _pixels(_loaded(j)).to(ops.accumulate_dtype(j.x.dtype))
        return a.mean(0), torch.cov(a.T, correction=0)

    def stock() -> Results:
        a = _pixels(_stock_loaded(i))
        return a.mean(0), torch.cov(a.T, correction=0)

    ours = partial(ops.of(i.backend).second_moments, i.x, i.affine, i.mean, True, (1, 1))
    return Case(
        "second_moments", form_of(shape), ours,
        expected, read + 4 * channels * channels, 2 * pixels * channels * channels, stock, _more(shape),
    )  # fmt: skip


def _expand_bn_act(i: ConvInputs, shape: ConvShape) -> Iterator[Case]:
    """act(BN(conv(a)) + residual), forward with its graph and backward, as a network in training calls it.

    Forward reads the input twice, for its second moments and for the product. Backward reads the input twice, the
    gradient, and the output for its mask; the masked gradient is written and read, the input's gradient written.
    """

    def ours(j: ConvInputs) -> Tensor:
        bn = BatchNorm2dParameters(None, None, j.bn_weight, j.bn_bias, True, 0.1, EPS)
        source, residual = Raw(j.x, j.affine, j.mean.detach()), Raw(j.residual)
        return expand_norm_act(source, j.weight, None, bn, residual, None, [1, 1], True, True, j.backend)

    def exact(j: ConvInputs) -> Tensor:
        return reference.expand_bn_act(_loaded(j), j.weight, j.bn_weight, j.bn_bias, EPS, j.residual)[0]

    def stock(j: ConvInputs) -> Tensor:
        y = F.conv2d(_stock_loaded(j), j.weight)
        return torch.relu_(F.batch_norm(y, None, None, j.bn_weight, j.bn_bias, True, 0.1, EPS) + j.residual)

    def backward(j: ConvInputs, end: Tensor, keep: bool = True) -> Results:
        wanted = [j.x, j.weight, j.affine, j.bn_weight, j.bn_bias, j.residual]
        return torch.autograd.grad(end, wanted, j.grad.detach(), retain_graph=keep)

    read, written, weight, products = _counts(i, shape)
    square = products * shape.weight[1] // shape.weight[0]
    form, more = form_of(shape), _more(shape)
    mine, theirs = i.of(i.x.dtype), i.of(i.x.dtype)
    yield Case(
        "expand_bn_act forward", form, lambda: (ours(mine),), lambda j: (exact(j),),
        2 * read + 2 * written + weight, products + square, lambda: (stock(theirs),), more,
    )  # fmt: skip
    my_end, their_end = ours(mine), stock(theirs)
    yield Case(
        "expand_bn_act backward", form, lambda: backward(mine, my_end), lambda j: backward(j, exact(j), False),
        3 * read + 4 * written + 2 * weight, 2 * products + square, lambda: backward(theirs, their_end), more,
    )  # fmt: skip


def _conv_stats(i: ConvInputs, shape: ConvShape) -> Iterator[Case]:
    """`conv_stats`, forward and backward."""
    geometry = (shape.stride, shape.padding, shape.dilation, shape.groups)
    read, written, weight, products = _counts(i, shape)
    more = _more(shape)

    def forward(j: ConvInputs) -> Results:
        return reference.conv_stats(_loaded(j), Conv2dParameters(j.weight, None, *geometry))

    def backward(j: ConvInputs) -> Results:
        ends, starts = forward(j), (j.grad, j.grad_mean, j.grad_var)
        return torch.autograd.grad(ends, [j.x, j.weight, j.affine], [start.detach() for start in starts])

    def stock() -> Results:
        y = F.conv2d(_stock_loaded(i), i.weight, None, *geometry)
        return (y, *torch.var_mean(y, (0, 2, 3), correction=0)[::-1])

    form = form_of(shape)
    source = (i.x, i.affine, i.mean, i.weight, True, *geometry)
    (_, ours), *others = i.candidates.items()
    y, y_mean, _ = ours.conv_stats(*source, True)
    yield Case(
        "conv_stats", form, partial(ours.conv_stats, *source, True), forward, read + written + weight, products, stock,
        more, {name: partial(other.conv_stats, *source, True) for name, other in others},
    )  # fmt: skip
    loaded = (i.grad, y, None, y_mean, i.grad_mean, i.grad_var, False)
    given = (*loaded, *source, None, True, True)
    yield Case(
        "conv_stats backward", form, partial(ours.conv_stats_backward, *given), backward,
        2 * (read + written + weight), 2 * products, None, more,
        {name: partial(other.conv_stats_backward, *given) for name, other in others},
    )  # fmt: skip
