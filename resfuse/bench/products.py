"""Counts of the values that units with a convolution move, and what bytes and operations predict for the 1x1 ones.

Two counts of an activation. `touched`: what the mathematics must move, each value once. `loaded`: what a kernel's
instructions load or store, for programs side by side read the same, once for each block of output channels and tap;
only the first of them is predicted to reach memory, the others the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from resfuse.backends import folds_from
from resfuse.bench.roofline import PASSES
from resfuse.bench.shapes import conv_shapes
from resfuse.choices import Conv, rule

_PIVOT_PIXELS = 64  # that second_moments looks at beforehand


class Traffic(NamedTuple):
    """Values of one activation that a kernel touches and that it loads, or stores."""

    touched: int
    loaded: int


class Layer(NamedTuple):
    """A convolution of images of a size."""

    conv: Conv
    images: int
    height: int
    width: int

    def _axis(self, i: int) -> tuple[int, int, int]:
        """Of one axis: rows of the output, positions of the input that are read, and reads of one by the other."""
        c, size = self.conv, (self.height, self.width)[i]
        kernel, stride, padding, dilation = c.kernel[i], c.stride[i], c.padding[i], c.dilation[i]
        rows = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        reads = [row * stride - padding + tap * dilation for row in range(rows) for tap in range(kernel)]
        inside = [at for at in reads if 0 <= at < size]
        return rows, len(set(inside)), len(inside)

    def _over_images(self, which: int) -> int:
        return self.images * self._axis(0)[which] * self._axis(1)[which]

    @property
    def taps(self) -> int:
        return self.conv.kernel[0] * self.conv.kernel[1]

    @property
    def x(self) -> int:
        """Values of the input."""
        return self.images * self.height * self.width * self.conv.channels

    @property
    def pixels(self) -> int:
        """Of the output."""
        return self._over_images(0)

    @property
    def y(self) -> int:
        """Values of the output."""
        return self.pixels * self.conv.out_channels

    @property
    def read(self) -> int:
        """Values of the input that are read."""
        return self._over_images(1) * self.conv.channels

    @property
    def pairs(self) -> int:
        """Pairs of an output pixel and a tap that meet a pixel of the input."""
        return self._over_images(2)

    @property
    def operations(self) -> int:
        """Multiplications and additions of the product."""
        return 2 * self.pixels * self.taps * self.conv.channels // self.conv.groups * self.conv.out_channels


def _once(values: int) -> Traffic:
    return Traffic(values, values)


def conv_stats(layer: Layer, blocks: int) -> dict[str, Traffic]:
    """Forward; `blocks` of output channels of one group."""
    return {"x": Traffic(layer.read, blocks * layer.pairs * layer.conv.channels), "y": _once(layer.y)}


def conv_act(layer: Layer, blocks: int, *, residual: bool = False, branch: Layer | None = None) -> dict[str, Traffic]:
    """The folded product; the branch is read as x is."""
    found = {"x": conv_stats(layer, blocks)["x"], "out": _once(layer.y)}
    if residual:
        found["residual"] = _once(layer.y)
    if branch is not None:
        found["branch"] = conv_stats(branch, blocks)["x"]
    return found


def input_gradient(
    layer: Layer, blocks: int, *, formed: bool, prologue: bool, other: bool = False
) -> dict[str, Traffic]:
    """conv_stats_backward to the input; `blocks` of input channels; dY is `formed` of grad_y and y, or given."""
    gradient = Traffic(layer.y, blocks * layer.pairs * layer.conv.out_channels)
    found = {"grad_y": gradient, "grad_x": _once(layer.x)}
    if formed:
        found["y"] = gradient
    if prologue:
        found["x"] = _once(layer.x)
    if other:
        found["other"] = _once(layer.x)
    return found


def weight_gradient(layer: Layer, out_blocks: int, in_blocks: int, *, formed: bool) -> dict[str, Traffic]:
    """conv_stats_backward to the weight, by blocks of output and of input channels of one group."""
    gradient = Traffic(layer.y, in_blocks * layer.taps * layer.y)
    x = Traffic(layer.read, out_blocks * layer.pairs * layer.conv.channels)
    return {"grad_y": gradient, "x": x, **({"y": gradient} if formed else {})}


def second_moments(layer: Layer, blocks: int) -> dict[str, Traffic]:
    """Pairs of blocks of channels on and above the diagonal: each block is in blocks + 1 of them, or alone in one."""
    pivot = min(_PIVOT_PIXELS, layer.pixels) * layer.conv.channels
    return {"x": Traffic(layer.read, (1 if blocks == 1 else blocks + 1) * layer.read + pivot)}


def expand_weight(layer: Layer, out_blocks: int, in_blocks: int, *, masked: bool) -> dict[str, Traffic]:
    """expand_bn_act_backward_weight: every block of input channels loads grad_out and out, the first writes dz."""
    gradient = Traffic(layer.y, in_blocks * layer.y)
    found = {"grad_out": gradient, "x": Traffic(layer.x, out_blocks * layer.x), "dz": _once(layer.y)}
    return {**found, "out": gradient} if masked else found


def expand_input(layer: Layer, blocks: int, *, prologue: bool) -> dict[str, Traffic]:
    """expand_bn_act_backward_input, by blocks of input channels; x once more in the epilogue behind a prologue."""
    x = Traffic(layer.read, (blocks + prologue) * layer.read)
    return {"dz": Traffic(layer.y, blocks * layer.y), "x": x, "grad_x": _once(layer.read)}


def touched(*units: Mapping[str, Traffic]) -> int:
    """Values that kernels must move."""
    return sum(traffic.touched for unit in units for traffic in unit.values())


class Unit(NamedTuple):
    """What kernels of ours must move and multiply, and what torch's convolution with passes around it must move."""

    name: str
    values: int
    composed: int
    operations: int


def _composed(layer: Layer, prologue: bool) -> tuple[int, int]:
    """Values moved by torch's convolution and by its backward, given dY, with passes for a prologue.

    Both read the activated input, which a pass has written; the gradient to it goes through a reduction and a pass.
    """
    activated = PASSES["scale_shift_act", "none"] * layer.x
    through = (PASSES["backward_reduce", "none"] + 2 + 1) * layer.x  # without moments, apply reads two and writes one
    forward, gradients = layer.read + layer.y, (layer.y + layer.x) + (layer.y + layer.read)
    return forward + prologue * activated, gradients + prologue * (activated + through)


def conv_stats_units(layer: Layer, prologue: bool) -> tuple[Unit, Unit]:
    """Forward with moments, and backward with them."""
    forward, backward = _composed(layer, prologue)
    input_side = input_gradient(layer, 1, formed=True, prologue=prologue)
    ours = touched(input_side, weight_gradient(layer, 1, 1, formed=True))
    return (
        Unit("conv_stats", touched(conv_stats(layer, 1)), forward + PASSES["moments", ""] * layer.y, layer.operations),
        Unit("conv_stats_backward", ours, PASSES["backward_apply", "none"] * layer.y + backward, 2 * layer.operations),
    )


def folded_units(layer: Layer) -> tuple[Unit, Unit]:
    """The last convolution of a block with its normalisation, an identity shortcut and ReLU, folded in training.

    The composition does not fold: it keeps the convolution's output, and adds the shortcut in a pass.
    """
    forward, backward = _composed(layer, True)
    forward += (PASSES["moments", ""] + PASSES["scale_shift_act", "identity"]) * layer.y
    backward += (PASSES["backward_reduce", "identity"] + PASSES["backward_apply", "identity"]) * layer.y
    algebra = 2 * layer.pixels * layer.conv.channels**2  # of the covariance, and again of its gradient
    ours = touched(expand_weight(layer, 1, 1, masked=True), expand_input(layer, 1, prologue=True))
    return (
        Unit("folded", touched(second_moments(layer, 1), conv_act(layer, 1, residual=True)), forward,
             layer.operations + algebra),
        Unit("folded backward", ours, backward, 2 * layer.operations + algebra),
    )  # fmt: skip


class Prediction(NamedTuple):
    """One call of a unit: bytes of both ways over the bandwidth, or operations over the peak where that is longer."""

    unit: str
    conv: list[int]
    size: tuple[int, int]
    bytes: int
    composed_bytes: int
    operations: int
    microseconds: float
    composed_microseconds: float


def predict(
    build: Callable[[], nn.Module], input_shape: tuple[int, ...], dtype: torch.dtype, bandwidth: float, peak: float
) -> list[Prediction]:
    """The units of a training step whose 1x1 convolutions the rule gives to our kernels, every shape once.

    Args:
        build (Callable[[], nn.Module]): makes the stock network of bottlenecks.
        input_shape (tuple[int, ...]): (N, C, H, W).
        dtype (torch.dtype): of activations.
        bandwidth (float): bytes per second that a copy reaches, read and written ones counted.
        peak (float): operations per second of the tensor cores in this dtype.

    Returns:
        list[Prediction]: in the order of the forward pass.
    """
    found: dict[tuple[Layer, str], list[Prediction]] = {}
    for shape in conv_shapes(build, input_shape):
        conv = Conv.of(shape.weight, shape.stride, shape.padding, shape.dilation, shape.groups)
        if rule(dtype, conv) != "fused":
            continue
        layer, last = Layer(conv, shape.input[0], *shape.input[2:]), shape.name.endswith("conv3")
        least = folds_from(conv.channels, conv.out_channels)
        folded = last and least is not None and layer.pixels >= least
        units = folded_units(layer) if folded else conv_stats_units(layer, last)
        found[layer, units[0].name] = [_predicted(unit, layer, dtype.itemsize, bandwidth, peak) for unit in units]
    return [prediction for pair in found.values() for prediction in pair]


def _predicted(unit: Unit, layer: Layer, element_size: int, bandwidth: float, peak: float) -> Prediction:
    moved, composed = element_size * unit.values, element_size * unit.composed
    times = (round(1e6 * max(each / bandwidth, unit.operations / peak), 2) for each in (moved, composed))
    size = layer.height, layer.width
    return Prediction(unit.name, layer.conv.as_list(), size, moved, composed, unit.operations, *times)
