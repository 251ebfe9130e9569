"""DenseNet: every layer reads the concatenation of all before it, in the order BN, ReLU, convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.models.builder import Builder
from resfuse.models.checkpointing import recomputed
from resfuse.models.parts import check_length, check_positive_int, check_probability, conv1x1, conv3x3, initialise


class DenseLayer(nn.Module):
    """``dropout(conv2(relu2(norm2(conv1(relu1(norm1(concatenated)))))))``: a 1x1, then a 3x3 convolution.

    Args:
        inplanes (int): channels of all inputs together.
        growth_rate (int): channels of the output.
        bn_size (int): the 1x1 convolution has ``bn_size * growth_rate`` channels.
        drop_rate (float): probability that a value of the output is dropped.
        memory_efficient (bool): recompute the concatenation and what follows it up to conv1 in backward.

    Shape:
        a list of (N, C_i, H, W) to (N, growth_rate, H, W).
    """

    def __init__(self, inplanes: int, growth_rate: int, bn_size: int, drop_rate: float, memory_efficient: bool) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = nn.BatchNorm2d(inplanes)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv1x1(inplanes, width)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, growth_rate)
        self.drop_rate = drop_rate
        self.memory_efficient = memory_efficient

    def _squeeze(self, *features: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))

    def forward(self, features: list[Tensor]) -> Tensor:
        if self.memory_efficient:
            squeezed = recomputed(self._squeeze, *features, modules=(self.norm1,))
        else:
            squeezed = self._squeeze(*features)
        out = self.conv2(self.relu2(self.norm2(squeezed)))
        return F.dropout(out, self.drop_rate, self.training) if self.drop_rate > 0 else out


class DenseBlock(nn.ModuleDict):
    """Layers of which each reads the block's input and all outputs before it; returns them all, concatenated.

    Args:
        count (int): number of layers.
        inplanes (int): channels of the input.
        growth_rate, bn_size, drop_rate, memory_efficient: as :class:`DenseLayer`.

    Shape:
        (N, inplanes, H, W) to (N, inplanes + count * growth_rate, H, W).
    """

    def __init__(
        self, count: int, inplanes: int, growth_rate: int, bn_size: int, drop_rate: float, memory_efficient: bool
    ) -> None:
        super().__init__()
        for i in range(count):
            layer = DenseLayer(inplanes + i * growth_rate, growth_rate, bn_size, drop_rate, memory_efficient)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """BN, ReLU, 1x1 convolution and 2x2 average pool between two blocks."""

    def __init__(self, inplanes: int, outplanes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.conv = conv1x1(inplanes, outplanes)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)


class DenseFeatures(nn.Sequential):
    """Stem, four blocks with transitions between them, and the last normalisation; arguments as :class:`DenseNet`."""

    def __init__(
        self,
        growth_rate: int,
        block_config: Sequence[int],
        num_init_features: int,
        bn_size: int,
        drop_rate: float,
        memory_efficient: bool,
    ) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, num_init_features, kernel_size=7, stride=2, padding=3, bias=False)
        self.norm0 = nn.BatchNorm2d(num_init_features)
        self.relu0 = nn.ReLU(inplace=True)
        self.pool0 = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = num_init_features
        for i, count in enumerate(block_config, 1):
            check_positive_int(f"block_config[{i - 1}]", count)
            block = DenseBlock(count, channels, growth_rate, bn_size, drop_rate, memory_efficient)
            self.add_module(f"denseblock{i}", block)
            channels += count * growth_rate
            if i < len(block_config):
                self.add_module(f"transition{i}", Transition(channels, channels // 2))
                channels //= 2
        self.norm5 = nn.BatchNorm2d(channels)


class DenseNet(nn.Module):
    """DenseNet-BC: dense blocks of bottleneck layers, transitions that halve channels and size, linear layer.

    Parameter names, initialisation and the order of random draws are torchvision's.

    Args:
        growth_rate (int): channels that each layer adds.
        block_config (Sequence[int]): number of layers in each of the four blocks.
        num_init_features (int): channels of the stem.
        bn_size (int): a layer's 1x1 convolution has ``bn_size * growth_rate`` channels.
        drop_rate (float): probability that a value of a layer's output is dropped.
        num_classes (int): outputs of the linear layer.
        memory_efficient (bool): recompute each layer's concatenation in backward instead of keeping it; running
            statistics are updated once all the same.

    Shape:
        (N, 3, H, W) to (N, num_classes).

    Raises:
        TypeError: a count that is not an int, a drop_rate that is no number.
        ValueError: a count below 1, a sequence of the wrong length, a drop_rate outside [0, 1].

    Source: Huang et al., Densely Connected Convolutional Networks, 2016.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        for argument in ("growth_rate", "num_init_features", "bn_size", "num_classes"):
            check_positive_int(argument, locals()[argument])
        check_length("block_config", block_config, 4)
        check_probability("drop_rate", drop_rate)
        self.features = DenseFeatures(
            growth_rate, block_config, num_init_features, bn_size, drop_rate, memory_efficient
        )
        self.classifier = nn.Linear(self.features.norm5.num_features, num_classes)
        initialise(self, mode="fan_in")
        nn.init.zeros_(self.classifier.bias)

    def _activated(self, x: Tensor) -> Tensor:
        return F.relu(self.features(x), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(self._activated(x), (1, 1)), 1))


BUILDERS = {
    "densenet121": Builder(DenseNet, {"growth_rate": 32, "block_config": (6, 12, 24, 16), "num_init_features": 64}),
}
