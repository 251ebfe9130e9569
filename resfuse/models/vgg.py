"""VGG networks with batch normalisation: chains of 3x3 convolutions without shortcuts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from resfuse.models.builder import Builder
from resfuse.models.parts import check_length, check_positive_int, check_probability, initialise


class VGGFeatures(nn.Sequential):
    """Five stages of 3x3 convolutions, each with BN and ReLU, and a 2x2 max-pool that ends each stage.

    Args:
        layers (Sequence[int]): number of convolutions in each stage.
        widths (Sequence[int]): their channels.

    Shape:
        (N, 3, H, W) to (N, widths[-1], H // 32, W // 32).
    """

    def __init__(self, layers: Sequence[int], widths: Sequence[int] = (64, 128, 256, 512, 512)) -> None:
        check_length("layers", layers, 5)
        check_length("widths", widths, 5)
        modules: list[nn.Module] = []
        channels = 3
        for index, (count, width) in enumerate(zip(layers, widths, strict=True)):
            check_positive_int(f"layers[{index}]", count)
            for _ in range(count):
                # a bias before BN does nothing in training, but checkpoints have it
                modules += nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
                channels = width
            modules.append(nn.MaxPool2d(kernel_size=2, stride=2))
        super().__init__(*modules)


class VGG(nn.Module):
    """VGG with batch normalisation: features, pool to 7x7, three linear layers with dropout.

    Parameter names, initialisation and the order of random draws are torchvision's.

    Args:
        layers (Sequence[int]): number of convolutions in each of the five stages.
        num_classes (int): outputs of the last linear layer.
        dropout (float): probability that a hidden value of the classifier is dropped.

    Shape:
        (N, 3, H, W), H and W at least 32, to (N, num_classes).

    Raises:
        TypeError: a count that is not an int.
        ValueError: a count below 1, or a sequence of the wrong length.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014.
    """

    def __init__(self, layers: Sequence[int], num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        check_positive_int("num_classes", num_classes)
        check_probability("dropout", dropout)
        self.features = VGGFeatures(layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        sizes = (512 * 7 * 7, 4096, 4096, num_classes)
        linears = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes)]
        hidden = [part for linear in linears[:-1] for part in (linear, nn.ReLU(inplace=True), nn.Dropout(dropout))]
        self.classifier = nn.Sequential(*hidden, linears[-1])
        initialise(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


BUILDERS = {
    "vgg16_bn": Builder(VGG, {"layers": (2, 2, 3, 3, 3)}),
    "vgg19_bn": Builder(VGG, {"layers": (2, 2, 4, 4, 4)}),
}
