"""An activation that travels raw, as its convolution wrote it, and what normalises it at its reader."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resfuse import ops
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters

Pairs = tuple[list[int], list[int], list[int], int]  # stride, padding and dilation as pairs, and groups


class Raw(NamedTuple):
    """An activation and what its reader computes while loading it: act((x - mean)*scale + bias), or x without affine.

    affine is (2, C), float32: bias and scale. mean is a constant: a change of the true mean moves the bias.
    """

    x: Tensor
    affine: Tensor | None = None
    mean: Tensor | None = None


def as_pair(value: Any) -> list[int]:
    """One number for both axes, or a number for each, as two."""
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def geometry(conv: Conv2dParameters) -> Pairs:
    """stride, padding and dilation as pairs, and groups; padding given by name is resolved."""
    dilation = as_pair(conv.dilation)
    padding: Any = conv.padding
    if padding == "valid":
        padding = 0
    elif padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, conv.weight.shape[2:], strict=True)]
    return as_pair(conv.stride), as_pair(padding), dilation, conv.groups


def count(y: Tensor) -> int:
    """M: values per channel."""
    return y.shape[0] * y.shape[2] * y.shape[3]


def zeros_or(vector: Tensor | None, like: Tensor) -> Tensor:
    """The vector in like's dtype; zeros where it is absent."""
    return torch.zeros_like(like) if vector is None else vector.to(like.dtype)


class Statistics(NamedTuple):
    """What normalises a convolution's output: y_mean without the convolution's bias, which cancels, and var."""

    mean: Tensor
    var: Tensor
    scale: Tensor
    shift: Tensor  # of y: bias - mean*scale

    @staticmethod
    def of_batch(
        mean: Tensor, var: Tensor, count: int, bn: BatchNorm2dParameters, conv_bias: Tensor | None, backend: str
    ) -> Statistics:
        """From the moments of y; the running statistics, which include the convolution's bias, are updated."""
        true_mean = mean if conv_bias is None else mean + conv_bias.to(mean.dtype)
        running = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
        given = (true_mean, var, count, bn.weight, bn.bias)
        scale, shift = ops.of(backend).finalize(*given, *running, bn.momentum, bn.eps)
        if conv_bias is not None:
            shift = shift + conv_bias.to(shift.dtype) * scale
        return Statistics(mean, var, scale, shift)

    @staticmethod
    def of_running(bn: BatchNorm2dParameters, conv_bias: Tensor | None, backend: str) -> Statistics:
        """From copies of the running statistics: saved for backward while they may change in place."""
        assert bn.running_mean is not None and bn.running_var is not None
        mean, var = bn.running_mean.to(torch.float32, copy=True), bn.running_var.to(torch.float32, copy=True)
        if conv_bias is not None:
            mean = mean - conv_bias.to(mean.dtype)
        given = (mean, var, 0, bn.weight, bn.bias)
        scale, shift = ops.of(backend).finalize(*given, None, None, None, bn.momentum, bn.eps)
        return Statistics(mean, var, scale, shift)

    def affine(self, bn: BatchNorm2dParameters) -> Tensor:
        return torch.stack([zeros_or(bn.bias, self.scale), self.scale])


def scale_shift(raw: Raw) -> tuple[Tensor | None, Tensor | None]:
    """(x - mean)*scale + bias as x*scale + shift."""
    if raw.affine is None or raw.mean is None:
        return None, None
    return raw.affine[1], raw.affine[0] - raw.mean * raw.affine[1]


def zero_with_gradient(conv_bias: Tensor | None, training: bool) -> Tensor | None:
    """Zeros in place of a convolution's bias, whose gradient is the bias's: beside batch statistics zero, too."""
    if conv_bias is None:
        return None
    if training:
        return torch.where(torch.zeros_like(conv_bias, dtype=torch.bool), conv_bias, 0)
    return conv_bias - conv_bias.detach()


def conv_bias_gradient(
    conv_bias: Tensor | None, training: bool, grad_bias: Tensor, var: Tensor, bn_weight: Tensor | None, eps: float
) -> Tensor | None:
    """The gradient of a convolution's bias: zero beside batch statistics, which cancel it, else grad_bias*scale."""
    if conv_bias is None:
        return None
    if training:
        return torch.zeros_like(conv_bias)
    scale = torch.rsqrt(var + eps) * (1 if bn_weight is None else bn_weight.to(var.dtype))
    return (grad_bias * scale).to(conv_bias.dtype)
