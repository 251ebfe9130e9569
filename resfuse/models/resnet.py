"""ImageNet ResNets of post-activation order (conv, BN, ReLU), plain, grouped and wide ones too, and their blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.models.builder import Builder
from resfuse.models.checkpointing import make_stage
from resfuse.models.parts import (
    SHORTCUTS,
    NormLayer,
    check_choice,
    check_length,
    check_positive_int,
    conv1x1,
    conv3x3,
    initialise,
    make_shortcut,
    zero_weight,
)


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
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)

    def zero_residual(self) -> None:
        """Let the block compute ``relu(downsample(x))``: its last norm weight becomes zero."""
        zero_weight(self.bn2)


class PlainBlock(BasicBlock):
    """A basic block without its shortcut: ``relu(bn2(conv2(relu(bn1(conv1(x))))))``.

    Arguments, names and errors are those of :class:`BasicBlock`; ``downsample`` must be None.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, section 3.3, plain network.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: None = None, **options: Any) -> None:
        if downsample is not None:
            raise ValueError(f"downsample must be None in a plain block, got {downsample!r}")
        super().__init__(inplanes, planes, stride, **options)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))

    def zero_residual(self) -> None:
        """Raise ValueError: nothing would pass the block."""
        raise ValueError("zero_init_residual must be False in a plain network, which has no shortcuts")


class Bottleneck(nn.Module):
    r"""1x1, 3x3 and expanding 1x1 convolutions with a shortcut.

    ``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + downsample(x))``. Attribute names, their order and the
    arguments but the last are those of torchvision's block.

    Args:
        inplanes (int): channels of the input.
        planes (int): the stage's width; the output has ``4 * planes`` channels, the 3x3 convolution
            ``int(planes * base_width / 64) * groups``.
        stride (int): stride of the 3x3 convolution, or of the first 1x1.
        downsample (nn.Module | None): the shortcut's module where the shape changes; None is the identity.
        groups (int): groups of the 3x3 convolution.
        base_width (int): width of one group where ``planes`` is 64.
        dilation (int): dilation of the 3x3 convolution.
        norm_layer (Callable[[int], nn.Module] | None): makes bn1, bn2 and bn3; None is ``nn.BatchNorm2d``.
        stride_in_1x1 (bool): stride in the first 1x1 convolution, as the paper; False is torchvision's "v1.5".

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
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64)) * groups
        self.conv1 = conv1x1(inplanes, width, stride if stride_in_1x1 else 1)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, 1 if stride_in_1x1 else stride, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
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

    def zero_residual(self) -> None:
        """Let the block compute ``relu(downsample(x))``: its last norm weight becomes zero."""
        zero_weight(self.bn3)


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
        shortcut (str | None): "A" pads with zeros where a block changes the shape, "B" projects there, "C" projects in
            every block; None is the plain network of :class:`PlainBlock`, which has no shortcuts.
        stride_in_1x1 (bool): where a stage begins, stride in the bottleneck's first 1x1 convolution, as the paper;
            False strides in the 3x3, as torchvision ("v1.5").
        checkpoint_every (int | None): recompute blocks in backward, this many at a time, instead of keeping their
            activations: see :class:`CheckpointedSequential`.

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
        *,
        shortcut: str | None = "B",
        stride_in_1x1: bool = False,
        checkpoint_every: int | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("num_classes", num_classes)
        check_positive_int("groups", groups)
        check_positive_int("width_per_group", width_per_group)
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        check_choice("shortcut", shortcut, (*SHORTCUTS, None))
        check_length("replace_stride_with_dilation", dilate, 3)
        check_length("layers", layers, 4)
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        make_block = choose_block(block, shortcut, stride_in_1x1)
        make_block = partial(make_block, groups=groups, base_width=width_per_group, norm_layer=norm)
        stages = _make_stages(make_block, block.expansion, layers, dilate, shortcut, norm)
        self.layer1, self.layer2, self.layer3, self.layer4 = (make_stage(blocks, checkpoint_every) for blocks in stages)
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


def choose_block(block: type[nn.Module], shortcut: str | None, stride_in_1x1: bool) -> Callable[..., nn.Module]:
    """What makes a network's blocks: `block`, its plain counterpart, or `block` with its stride in the 1x1 convolution.

    Raises:
        ValueError: a block that has no such counterpart.
    """
    if shortcut is None:
        if block is not BasicBlock:
            raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)} with {block.__name__}, got None")
        block = PlainBlock
    if not stride_in_1x1:
        return block
    if not issubclass(block, Bottleneck):
        raise ValueError(f"stride_in_1x1 must be False with {block.__name__}, which has no 1x1 convolutions")
    return partial(block, stride_in_1x1=True)


def _make_stages(
    make_block: Callable[..., nn.Module],
    expansion: int,
    layers: Sequence[int],
    replace_stride: Sequence[bool],
    shortcut: str | None,
    norm: NormLayer,
) -> list[list[nn.Module]]:
    stages = []
    inplanes, dilation = 64, 1
    for index, (count, dilate) in enumerate(zip(layers, (False, *replace_stride), strict=True)):
        check_positive_int(f"layers[{index}]", count)
        planes, stride, block_dilation = 64 * 2**index, 1 if index == 0 else 2, dilation
        if dilate:
            stride, dilation = 1, dilation * stride
        blocks = []
        for _ in range(count):
            # the shortcut is made before the block: the order of random draws is part of the contract
            downsample = make_shortcut(shortcut, inplanes, planes * expansion, stride, norm)
            blocks.append(make_block(inplanes, planes, stride, downsample, dilation=block_dilation))
            inplanes, stride, block_dilation = planes * expansion, 1, dilation
        stages.append(blocks)
    return stages


_BASIC_18, _BASIC_34 = ({"block": BasicBlock, "layers": layers} for layers in ((2, 2, 2, 2), (3, 4, 6, 3)))
_BOTTLENECK_50, _BOTTLENECK_101, _BOTTLENECK_152 = (
    {"block": Bottleneck, "layers": layers} for layers in ((3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3))
)

BUILDERS = {
    "resnet18": Builder(ResNet, _BASIC_18),
    "resnet34": Builder(ResNet, _BASIC_34),
    "resnet50": Builder(ResNet, _BOTTLENECK_50),
    "resnet101": Builder(ResNet, _BOTTLENECK_101),
    "resnet152": Builder(ResNet, _BOTTLENECK_152),
    "plain18": Builder(ResNet, _BASIC_18 | {"shortcut": None}),
    "plain34": Builder(ResNet, _BASIC_34 | {"shortcut": None}),
    "resnext50_32x4d": Builder(ResNet, _BOTTLENECK_50 | {"groups": 32, "width_per_group": 4}),
    "resnext101_32x8d": Builder(ResNet, _BOTTLENECK_101 | {"groups": 32, "width_per_group": 8}),
    "resnext101_64x4d": Builder(ResNet, _BOTTLENECK_101 | {"groups": 64, "width_per_group": 4}),
    "wide_resnet50_2": Builder(ResNet, _BOTTLENECK_50 | {"width_per_group": 128}),
    "wide_resnet101_2": Builder(ResNet, _BOTTLENECK_101 | {"width_per_group": 128}),
}
