"""The parameters of a convolution, a normalisation and a pool as plain values, passed from modules to functions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Size = int | tuple[int, int]
"""One number, or (vertical, horizontal)."""

Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""The kernel_size, stride and padding of a pool, each (vertical, horizontal)."""


class Conv2dParameters(NamedTuple):
    """What :func:`torch.nn.functional.conv2d` takes besides its input.

    Attributes:
        weight: (K, C / groups, kH, kW).
        bias: (K,) or None.
        stride, dilation: one number, or (vertical, horizontal).
        padding: likewise, or "same" or "valid"; pads with zeros.
        groups: number of groups.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1


class Moments(NamedTuple):
    """Per-channel statistics of an activation over N, H and W: (C,), float32, or float64 beside float64.

    Attributes:
        mean: E[x].
        var: E[(x - mean)^2], biased.
    """

    mean: Tensor
    var: Tensor


class BatchNorm2dParameters(NamedTuple):
    """What :func:`torch.nn.functional.batch_norm` takes besides its input, and the batch counter.

    Attributes:
        running_mean, running_var: (C,), or both None for batch statistics that nobody tracks.
        weight, bias: (C,) or None, independently.
        training: normalise with batch statistics, and update the running ones where they are given.
        momentum: weight of this batch in the running statistics; None for the cumulative average, which needs
            num_batches_tracked.
        eps: added to the variance.
        num_batches_tracked: () int64, incremented in training, or None.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float | None = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None
