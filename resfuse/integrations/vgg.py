"""VGG's stages of convolutions, fused, in any network that holds them; the subclass for :mod:`resfuse.models.vgg`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Conv2d, MaxPool2d

from resfuse import functional, nn
from resfuse.guards import Parts
from resfuse.models.vgg import VGGFeatures

Stage = tuple[list[tuple[str, ...]], str]
"""The names of each layer's convolution, norm and ReLU, and of the pool that ends the stage."""


def stages_of(block: Any) -> list[Stage]:
    """What the names of the children of a VGG's features stand for; none if they are others."""
    stages: list[Stage] = []
    layers: list[tuple[str, ...]] = []
    names = list(block._modules)
    while names:
        if layers and type(block._modules[names[0]]) is MaxPool2d:
            stages.append((layers, names.pop(0)))
            layers = []
        else:
            layers.append(tuple(names[:3]))
            del names[:3]
    return stages if not layers else []


def run_stages(features: Any, x: Tensor, backend: str | None) -> Tensor:
    """A stage is a chain of activations that travel raw, and a last layer that ends in its pool."""
    children = features._modules
    for names, pool in stages_of(features):
        layers = [(nn.conv_parameters(children[conv]), nn.batch_norm_parameters(children[bn])) for conv, bn, _ in names]
        if len(layers) > 1:
            x = functional.conv_bn_act_chain(x, layers[:-1], backend=backend)
        x = nn.pooled(x, layers[-1], children[pool], backend)
    return x


class FusedVGGFeatures(nn.FusedBlock, VGGFeatures):
    """VGGFeatures, fused."""

    @classmethod
    def parts_of(cls, block: Any) -> Parts:
        layers = [layer for layers, _ in stages_of(block) for layer in layers]
        return Parts(*zip(*layers, strict=True)) if layers else Parts()

    @classmethod
    def why_stock_children(cls, block: Any) -> str | None:
        if not stages_of(block):
            return "its children are not stages of convolution, norm and ReLU that end in a MaxPool2d"
        return super().why_stock_children(block)

    @classmethod
    def stretches_of(cls, block: Any) -> list[list[Conv2d]]:
        convs = [[block._modules[conv] for conv, *_ in layers] for layers, _ in stages_of(block)]
        return [part for stage in convs for part in (stage[:-1], stage[-1:])]  # the last one ends in the pool

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.why_stock(x) is not None else run_stages(self, x, self._resfuse_backend)


FUSED = {VGGFeatures: FusedVGGFeatures}
