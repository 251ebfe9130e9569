"""Fused subclasses of torchvision's residual blocks and of its ResNet, whose stem is fused."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models import resnet

from resfuse import nn


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


FUSED = {
    resnet.BasicBlock: FusedBasicBlock,
    resnet.Bottleneck: FusedBottleneck,
    resnet.ResNet: FusedResNet,
}
