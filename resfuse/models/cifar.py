"""CIFAR ResNets: 6n+2 layers of basic blocks on small images, with parameter-free shortcuts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resfuse.models.resnet import BasicBlock, NormLayer, check_positive_int, initialise
from resfuse.models.weights import WeightsSource, build


class ZeroPadShortcut(nn.Module):
    """Shortcut option A: take every ``stride``-th pixel and append channels of zeros; no parameters.

    ``out[n, c, h, w] = x[n, c, stride * h, stride * w]`` for ``c < in_channels``, else 0.

    Args:
        in_channels (int): channels of the input.
        out_channels (int): channels of the output, at least ``in_channels``.
        stride (int): distance of the pixels kept, in both directions.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)), any dtype and strides.

    Raises:
        TypeError: an argument that is not an int.
        ValueError: an argument below 1, ``out_channels < in_channels``, or an input of other channels.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, section 3.3.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        check_positive_int("in_channels", in_channels)
        check_positive_int("out_channels", out_channels)
        check_positive_int("stride", stride)
        if out_channels < in_channels:
            raise ValueError(f"out_channels must be at least in_channels {in_channels}, got {out_channels}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape (N, {self.in_channels}, H, W), got {tuple(x.shape)}")
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, 0, self.out_channels - self.in_channels))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class CifarResNet(nn.Module):
    """ResNet for small images: 3x3 stem, three stages of n basic blocks, global average pool, linear layer.

    The stages have 16, 32 and 64 channels; the second and third start with stride 2 and a :class:`ZeroPadShortcut`.
    Convolutions are He-normal (fan-out), the linear layer keeps torch's initialisation.

    Args:
        depth (int): number of weighted layers, 6n+2 with n >= 1.
        num_classes (int): outputs of the linear layer.
        in_channels (int): channels of the images.
        zero_init_residual (bool): start the last norm weight of every block at zero, so that each block begins as
            ``relu(shortcut(x))``.
        norm_layer (Callable[[int], nn.Module] | None): makes every normalisation layer, which keeps the initialisation
            it makes; None is ``nn.BatchNorm2d``.

    Shape:
        (N, in_channels, H, W) to (N, num_classes).

    Raises:
        TypeError: a count that is not an int.
        ValueError: a count below 1, or a depth that is not 6n+2.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, section 4.2.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        zero_init_residual: bool = False,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("depth", depth)
        check_positive_int("num_classes", num_classes)
        check_positive_int("in_channels", in_channels)
        count, remainder = divmod(depth - 2, 6)
        if count < 1 or remainder:
            raise ValueError(f"depth must be 6n+2 with n >= 1 (8, 14, 20, ...), got {depth}")
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(in_channels, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = norm(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _make_stage(16, 16, count, norm)
        self.layer2 = _make_stage(16, 32, count, norm)
        self.layer3 = _make_stage(32, 64, count, norm)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        initialise(self, zero_init_residual)

    def _stem(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self._stem(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _make_stage(inplanes: int, planes: int, count: int, norm: NormLayer) -> nn.Sequential:
    if inplanes == planes:
        first = BasicBlock(inplanes, planes, norm_layer=norm)
    else:
        first = BasicBlock(inplanes, planes, 2, ZeroPadShortcut(inplanes, planes, stride=2), norm_layer=norm)
    return nn.Sequential(first, *(BasicBlock(planes, planes, norm_layer=norm) for _ in range(1, count)))


def cifar_resnet20(*, weights: WeightsSource | None = None, num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Build the CIFAR ResNet-20; arguments as :func:`get_model` and :class:`CifarResNet`."""
    return _cifar_resnet(20, weights, num_classes, kwargs)


def cifar_resnet32(*, weights: WeightsSource | None = None, num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Build the CIFAR ResNet-32; arguments as :func:`get_model` and :class:`CifarResNet`."""
    return _cifar_resnet(32, weights, num_classes, kwargs)


def cifar_resnet44(*, weights: WeightsSource | None = None, num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Build the CIFAR ResNet-44; arguments as :func:`get_model` and :class:`CifarResNet`."""
    return _cifar_resnet(44, weights, num_classes, kwargs)


def cifar_resnet56(*, weights: WeightsSource | None = None, num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Build the CIFAR ResNet-56; arguments as :func:`get_model` and :class:`CifarResNet`."""
    return _cifar_resnet(56, weights, num_classes, kwargs)


def cifar_resnet110(*, weights: WeightsSource | None = None, num_classes: int = 10, **kwargs: Any) -> CifarResNet:
    """Build the CIFAR ResNet-110; arguments as :func:`get_model` and :class:`CifarResNet`."""
    return _cifar_resnet(110, weights, num_classes, kwargs)


def _cifar_resnet(depth: int, weights: WeightsSource | None, num_classes: int, options: dict[str, Any]) -> CifarResNet:
    return build(CifarResNet, depth, weights=weights, options={"num_classes": num_classes, **options})
