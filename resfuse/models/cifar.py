"""Networks for small images of one skeleton: ResNets, plain and pre-activation nets, wide ones, highways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.models.builder import Builder
from resfuse.models.checkpointing import make_stage
from resfuse.models.highway import HighwayBlock
from resfuse.models.parts import (
    SHORTCUTS,
    NormLayer,
    check_choice,
    check_length,
    check_positive_int,
    conv3x3,
    initialise,
    make_shortcut,
)
from resfuse.models.resnet import BasicBlock, Bottleneck, choose_block
from resfuse.models.units import ORDERS, ORIGINAL, ResidualUnit

HIGHWAY = "highway"
UNITS = (ORIGINAL, *ORDERS, HIGHWAY)
"""What a network may be made of: the five orders of the residual unit, and the gated shortcut."""

_STEM_CHANNELS = 16


class BNReLU(nn.Module):
    """``relu(bn(x))``: what follows the last addition of a pre-activation network."""

    def __init__(self, channels: int, norm: NormLayer) -> None:
        super().__init__()
        self.bn = norm(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x))


class CifarResNet(nn.Module):
    """ResNet for small images: 3x3 stem, three stages of n units, global average pool, linear layer.

    The second and third stage start with stride 2. Convolutions are He-normal (fan-out), the linear layer keeps torch's
    initialisation. The stem is conv, BN, ReLU for every unit: in a pre-activation network these BN and ReLU are those
    of the first unit, which both of its paths share, and the last addition is followed by BN and ReLU, or by ReLU alone
    ("relu_only_preact").

    Args:
        depth (int): number of weighted layers, projections and gates not counted: 6n+2, or 9n+2 of bottlenecks.
        num_classes (int): outputs of the linear layer.
        in_channels (int): channels of the images.
        zero_init_residual (bool): start every unit as its shortcut: the last weight of its residual path is zero.
        norm_layer (Callable[[int], nn.Module] | None): makes every normalisation layer, which keeps the initialisation
            it makes; None is ``nn.BatchNorm2d``.
        unit (str): the order of normalisation and activation, one of ``UNITS``: "original", "bn_after_add",
            "relu_before_add", "relu_only_preact", "full_preact"; or "highway".
        shortcut (str | None): "A" pads with zeros where a unit changes the shape, "B" projects there, "C" projects in
            every unit; None is a plain network, without shortcuts ("original" only). A projection is normalised as the
            residual path is, and in a pre-activation unit it reads what the first convolution reads.
        bottleneck (bool): units of 1x1, 3x3 and expanding 1x1 convolutions.
        stride_in_1x1 (bool): a bottleneck strides in its first 1x1 convolution instead of the 3x3.
        widths (Sequence[int]): channels of the 3x3 convolutions in the three stages.
        checkpoint_every (int | None): recompute units in backward, this many at a time, instead of keeping their
            activations: see :class:`CheckpointedSequential`.

    Shape:
        (N, in_channels, H, W) to (N, num_classes).

    Raises:
        TypeError: a count that is not an int.
        ValueError: a count below 1, another depth, an unknown unit or shortcut, or options that exclude each other.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, section 4.2; Identity Mappings in Deep
    Residual Networks, 2016; Zagoruyko and Komodakis, Wide Residual Networks, 2016.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        zero_init_residual: bool = False,
        norm_layer: NormLayer | None = None,
        *,
        unit: str = ORIGINAL,
        shortcut: str | None = "A",
        bottleneck: bool = False,
        stride_in_1x1: bool = False,
        widths: Sequence[int] = (16, 32, 64),
        checkpoint_every: int | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("num_classes", num_classes)
        check_positive_int("in_channels", in_channels)
        check_choice("unit", unit, UNITS)
        check_choice("shortcut", shortcut, (*SHORTCUTS, None))
        check_length("widths", widths, 3)
        count = _units_per_stage(depth, bottleneck)
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(in_channels, _STEM_CHANNELS)
        self.bn1 = norm(_STEM_CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        first, other = _unit_makers(unit, shortcut, bottleneck, stride_in_1x1, norm)
        makers, expansion = chain([first], repeat(other)), 4 if bottleneck else 1
        order = ORDERS.get(unit)
        projection_norm = norm if order is None or "bn" in order.behind else None
        stages = _make_stages(makers, widths, expansion, count, shortcut, projection_norm)
        self.layer1, self.layer2, self.layer3 = (make_stage(units, checkpoint_every) for units in stages)
        channels = widths[2] * expansion
        self.tail = None if order is None else _make_tail(order.before, channels, norm)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, zero_init_residual)

    def _stem(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))

    def _body(self, x: Tensor) -> Tensor:
        for part in (self.layer1, self.layer2, self.layer3, self.tail):
            x = x if part is None else part(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self._body(self._stem(x))), 1))


def _make_tail(before: str, channels: int, norm: NormLayer) -> nn.Module | None:
    """What every unit begins with, once more behind the last one."""
    if before == "bn relu":
        return BNReLU(channels, norm)
    return nn.ReLU(inplace=True) if before == "relu" else None


def _units_per_stage(depth: int, bottleneck: bool) -> int:
    check_positive_int("depth", depth)
    layers = 9 if bottleneck else 6
    count, remainder = divmod(depth - 2, layers)
    if count < 1 or remainder:
        examples = ", ".join(str(layers * n + 2) for n in (1, 2, 3))
        raise ValueError(f"depth must be {layers}n+2 with n >= 1 ({examples}, ...), got {depth}")
    return count


def _unit_makers(
    unit: str, shortcut: str | None, bottleneck: bool, stride_in_1x1: bool, norm: NormLayer
) -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    """What makes the network's first unit, and what makes every other."""
    if stride_in_1x1 and not bottleneck:
        raise ValueError("stride_in_1x1 must be False without bottlenecks, whose convolution it is")
    if unit == ORIGINAL:
        make = choose_block(Bottleneck if bottleneck else BasicBlock, shortcut, stride_in_1x1)
        return (partial(make, norm_layer=norm),) * 2
    if shortcut is None:
        raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)} with unit {unit!r}, got None")
    if unit == HIGHWAY:
        if bottleneck:
            raise ValueError(f"unit must be one of {', '.join((ORIGINAL, *ORDERS))} with bottlenecks, got {unit!r}")
        return (partial(HighwayBlock, norm_layer=norm),) * 2
    options: dict[str, Any] = {
        "order": ORDERS[unit],
        "bottleneck": bottleneck,
        "stride_in_1x1": stride_in_1x1,
        "norm_layer": norm,
    }
    return partial(ResidualUnit, entered=True, **options), partial(ResidualUnit, **options)


def _make_stages(
    makers: Iterator[Callable[..., nn.Module]],
    widths: Sequence[int],
    expansion: int,
    count: int,
    shortcut: str | None,
    norm: NormLayer | None,
) -> list[list[nn.Module]]:
    stages = []
    inplanes = _STEM_CHANNELS
    for index, width in enumerate(widths):
        check_positive_int(f"widths[{index}]", width)
        units, stride = [], 1 if index == 0 else 2
        for _ in range(count):
            downsample = make_shortcut(shortcut, inplanes, width * expansion, stride, norm)
            units.append(next(makers)(inplanes, width, stride, downsample))
            inplanes, stride = width * expansion, 1
        stages.append(units)
    return stages


_FULL_PREACT = {"unit": "full_preact"}
_BOTTLENECKS = _FULL_PREACT | {"shortcut": "B", "stride_in_1x1": True}  # as the code published with the paper

BUILDERS = {
    **{f"cifar_resnet{depth}": Builder(CifarResNet, {"depth": depth}) for depth in (20, 32, 44, 56, 110, 1202)},
    **{
        f"cifar_plain{depth}": Builder(CifarResNet, {"depth": depth, "shortcut": None})
        for depth in (20, 32, 44, 56, 110)
    },
    **{f"cifar_highway{depth}": Builder(CifarResNet, {"depth": depth, "unit": HIGHWAY}) for depth in (20, 32, 110)},
    "cifar_preresnet110": Builder(CifarResNet, {"depth": 110}, _FULL_PREACT),
    "cifar_preresnet164": Builder(CifarResNet, {"depth": 164, "bottleneck": True}, _BOTTLENECKS),
    "cifar_preresnet1001": Builder(CifarResNet, {"depth": 1001, "bottleneck": True}, _BOTTLENECKS),
    # its name counts the three projections as layers
    "wrn28_10": Builder(CifarResNet, {"depth": 26, "widths": (160, 320, 640)}, _FULL_PREACT | {"shortcut": "B"}),
}
