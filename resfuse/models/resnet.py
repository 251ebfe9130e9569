"""ImageNet ResNets of post-activation order (conv, BN, ReLU) and their blocks, in stock torch modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.models.weights import WeightsSource, build

NormLayer = Callable[[int], nn.Module]
"""Makes a normalisation layer for a number of channels, such as ``nn.BatchNorm2d``."""


class BasicBlock(nn.Module):
    r"""Two 3x3 convolutions with a shortcut: ``relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x))``.

    Attribute names, their order and the arguments are those of torchvision's block.

    Args:
        inplanes (int): channels of the input.
        planes (int): channels of both convolutions and of the output.
        stride (int): stride of the first convolution.
        downsample (nn.Module | None): the shortcut's module where the shape changes; None is the identity.
        groups (int), base_width (int): must be 1 and 64, there for the signature of :class:`Bottleneck`.
        dilation (int): must be 1.
        norm_layer (Callable[[int], nn.Module] | None): makes bn1 and bn2; None is ``nn.BatchNorm2d``.

    Shape:
        (N, inplanes, H, W) to (N, planes, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: groups or base_width other than 1 and 64.
        NotImplementedError: dilation other than 1.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, figure 5 left.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock must have groups 1 and base width 64, got {groups} and {base_width}")
        if dilation != 1:
            raise NotImplementedError(f"BasicBlock must have dilation 1, got {dilation}")
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    r"""1x1, 3x3 and expanding 1x1 convolutions with a shortcut.

    ``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + downsample(x))``. The stride sits on the 3x3 convolution
    ("v1.5"), where the original has it on the first 1x1. Attribute names, their order and the arguments are those of
    torchvision's block.

    Args:
        inplanes (int): channels of the input.
        planes (int): the stage's width; the output has ``4 * planes`` channels, the 3x3 convolution
            ``int(planes * base_width / 64) * groups``.
        stride (int): stride of the 3x3 convolution.
        downsample (nn.Module | None): the shortcut's module where the shape changes; None is the identity.
        groups (int): groups of the 3x3 convolution.
        base_width (int): width of one group where ``planes`` is 64.
        dilation (int): dilation of the 3x3 convolution.
        norm_layer (Callable[[int], nn.Module] | None): makes bn1, bn2 and bn3; None is ``nn.BatchNorm2d``.

    Shape:
        (N, inplanes, H, W) to (N, 4 * planes, ceil(H / stride), ceil(W / stride)).

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, figure 5 right.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64)) * groups
        self.conv1 = _conv1x1(inplanes, width)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = _conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet for images: stem, four stages of blocks, global average pool, linear layer.

    Parameter names, initialisation and the order of random draws are torchvision's: the same seed gives the same bits,
    and checkpoints move both ways.

    Args:
        block (type[BasicBlock] | type[Bottleneck]): class of all blocks.
        layers (Sequence[int]): number of blocks in each of the four stages.
        num_classes (int): outputs of the linear layer.
        zero_init_residual (bool): start the last norm weight of every block at zero, so that each block begins as
            ``relu(shortcut(x))``.
        groups (int): groups of the 3x3 convolutions (:class:`Bottleneck` only).
        width_per_group (int): width of one group in the first stage (:class:`Bottleneck` only).
        replace_stride_with_dilation (Sequence[bool] | None): for stages 2, 3 and 4, dilate instead of striding
            (:class:`Bottleneck` only); None is never.
        norm_layer (Callable[[int], nn.Module] | None): makes every normalisation layer, which keeps the initialisation
            it makes; None is ``nn.BatchNorm2d``.

    Shape:
        (N, 3, H, W) to (N, num_classes).

    Raises:
        TypeError: a count that is not an int.
        ValueError: a count below 1, a sequence of the wrong length, or an option that the block does not have.
        NotImplementedError: dilation with :class:`BasicBlock`.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, table 1.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("num_classes", num_classes)
        check_positive_int("groups", groups)
        check_positive_int("width_per_group", width_per_group)
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        _check_length("replace_stride_with_dilation", dilate, 3)
        _check_length("layers", layers, 4)
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        make_block = partial(block, groups=groups, base_width=width_per_group, norm_layer=norm)
        stages = _make_stages(make_block, block.expansion, layers, dilate, norm)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialise(self, zero_init_residual)

    def _stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self._stem(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _make_stages(
    make_block: Callable[..., nn.Module],
    expansion: int,
    layers: Sequence[int],
    replace_stride: Sequence[bool],
    norm: NormLayer,
) -> list[nn.Sequential]:
    stages = []
    inplanes, dilation = 64, 1
    for index, (count, dilate) in enumerate(zip(layers, (False, *replace_stride), strict=True)):
        check_positive_int(f"layers[{index}]", count)
        planes, stride = 64 * 2**index, 1 if index == 0 else 2
        outplanes, first_dilation = planes * expansion, dilation
        if dilate:
            stride, dilation = 1, dilation * stride
        downsample = None
        # the projection is made before the block: the order of random draws is part of the contract
        if stride != 1 or inplanes != outplanes:
            downsample = nn.Sequential(_conv1x1(inplanes, outplanes, stride), norm(outplanes))
        blocks = [make_block(inplanes, planes, stride, downsample, dilation=first_dilation)]
        blocks += [make_block(outplanes, planes, dilation=dilation) for _ in range(1, count)]
        stages.append(nn.Sequential(*blocks))
        inplanes = outplanes
    return stages


def initialise(model: nn.Module, zero_init_residual: bool) -> None:
    """Draw He-normal weights (fan-out) for every convolution, in order of registration; biases and norms stay.

    Args:
        model (nn.Module): a network of :class:`BasicBlock` or :class:`Bottleneck`.
        zero_init_residual (bool): also set the last norm weight of every block to zero.

    Raises:
        ValueError: ``zero_init_residual`` with norm layers that have no weight.

    Source: He et al., Delving Deep into Rectifiers, 2015; Goyal et al., Accurate, Large Minibatch SGD, 2017.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if not zero_init_residual:
        return
    for module in model.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            last_norm = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            weight = getattr(last_norm, "weight", None)
            if weight is None:
                raise ValueError(f"zero_init_residual must be False where norm_layer has no weight, got {last_norm}")
            nn.init.zeros_(weight)


def check_positive_int(argument: str, value: object) -> None:
    """Raise TypeError unless ``value`` is an int, ValueError unless it is at least 1.

    Args:
        argument (str): the name that the error gives.
        value (object): what the caller passed; bool does not count as int.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, got {value}")


def _check_length(argument: str, value: Sequence[object], length: int) -> None:
    if not isinstance(value, Sequence):
        raise TypeError(f"{argument} must be a sequence of {length} elements, got {value!r}")
    if len(value) != length:
        raise ValueError(f"{argument} must have {length} elements, got {value!r}")


def _conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride=stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def _conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False)


def resnet18(*, weights: WeightsSource | None = None, num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """Build ResNet-18, basic blocks (2, 2, 2, 2); arguments as :func:`get_model` and :class:`ResNet`."""
    return _resnet(BasicBlock, (2, 2, 2, 2), weights, num_classes, kwargs)


def resnet34(*, weights: WeightsSource | None = None, num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """Build ResNet-34, basic blocks (3, 4, 6, 3); arguments as :func:`get_model` and :class:`ResNet`."""
    return _resnet(BasicBlock, (3, 4, 6, 3), weights, num_classes, kwargs)


def resnet50(*, weights: WeightsSource | None = None, num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """Build ResNet-50, bottlenecks (3, 4, 6, 3); arguments as :func:`get_model` and :class:`ResNet`."""
    return _resnet(Bottleneck, (3, 4, 6, 3), weights, num_classes, kwargs)


def resnet101(*, weights: WeightsSource | None = None, num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """Build ResNet-101, bottlenecks (3, 4, 23, 3); arguments as :func:`get_model` and :class:`ResNet`."""
    return _resnet(Bottleneck, (3, 4, 23, 3), weights, num_classes, kwargs)


def resnet152(*, weights: WeightsSource | None = None, num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """Build ResNet-152, bottlenecks (3, 8, 36, 3); arguments as :func:`get_model` and :class:`ResNet`."""
    return _resnet(Bottleneck, (3, 8, 36, 3), weights, num_classes, kwargs)


def _resnet(
    block: type[BasicBlock] | type[Bottleneck],
    layers: Sequence[int],
    weights: WeightsSource | None,
    num_classes: int,
    options: dict[str, Any],
) -> ResNet:
    return build(ResNet, block, layers, weights=weights, options={"num_classes": num_classes, **options})
