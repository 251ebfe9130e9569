"""Fused subclasses of torchvision's ResNets, VGGs and DenseNets, and of their blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Conv2d, Sequential
from torchvision.models import densenet, resnet, vgg

from resfuse import guards, nn
from resfuse.integrations.densenet import (
    DenseBlockMixin,
    DenseFeaturesMixin,
    DenseLayerMixin,
    TransitionMixin,
    run_features,
)
from resfuse.integrations.vgg import FusedVGGFeatures, run_stages


class FusedBasicBlock(nn.FusedBasicBlock, resnet.BasicBlock):
    """torchvision's BasicBlock, fused."""


class FusedBottleneck(nn.FusedBottleneck, resnet.Bottleneck):
    """torchvision's Bottleneck, fused."""


class FusedResNet(nn.FusedStem, resnet.ResNet):
    """torchvision's ResNet with a fused stem."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super()._forward_impl(x)
        x = self.fused_pooled_stem(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class _FusedFeatures(nn.FusedBlock):
    """Mixin for a network whose features are a plain Sequential, which it therefore answers for.

    Attributes:
        fused_features: the fused block that says of such a Sequential what is fused, and why not.
    """

    answers_for = ("features",)
    fused_features: type[nn.FusedBlock]
    features: Any

    @classmethod
    def why_stock_children(cls, block: Any) -> str | None:
        features = block._modules.get("features")
        reason = guards.why_not_child(features, "features", Sequential)
        if reason is None and (inner := cls.fused_features.why_stock_children(features)) is not None:
            return f"features: {inner}"
        return reason

    @classmethod
    def stretches_of(cls, block: Any) -> list[list[Conv2d]]:
        return cls.fused_features.stretches_of(block.features)


class FusedVGG(_FusedFeatures, vgg.VGG):
    """torchvision's VGG with batch normalisation, fused."""

    fused_features = FusedVGGFeatures

    def forward(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super().forward(x)
        x = run_stages(self.features, x, self._resfuse_backend)
        return self.classifier(torch.flatten(self.avgpool(x), 1))


class FusedDenseLayer(DenseLayerMixin, densenet._DenseLayer):
    """torchvision's dense layer, fused."""

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        return super().forward(input)


class FusedDenseBlock(DenseBlockMixin, densenet._DenseBlock):
    """torchvision's dense block, fused."""

    def forward(self, init_features: Tensor) -> Tensor:
        return super().forward(init_features)


class FusedTransition(TransitionMixin, densenet._Transition):
    """torchvision's transition, fused."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class FusedDenseNet(_FusedFeatures, densenet.DenseNet):
    """torchvision's DenseNet, whose stem and last normalisation are fused, and whose blocks hand their moments on."""

    fused_features = DenseFeaturesMixin

    def forward(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super().forward(x)
        out = run_features(self.features, x, "relu", self._resfuse_backend)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


FUSED = {
    resnet.BasicBlock: FusedBasicBlock,
    resnet.Bottleneck: FusedBottleneck,
    resnet.ResNet: FusedResNet,
    vgg.VGG: FusedVGG,
    densenet._DenseLayer: FusedDenseLayer,
    densenet._DenseBlock: FusedDenseBlock,
    densenet._Transition: FusedTransition,
    densenet.DenseNet: FusedDenseNet,
}
