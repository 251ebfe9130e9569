"""Fused subclasses of the blocks and networks of :mod:`resfuse.models`."""

from __future__ import annotations

from torch import Tensor

from resfuse import nn
from resfuse.models import BasicBlock, Bottleneck, CifarResNet, ResNet


class FusedBasicBlock(nn.FusedBasicBlock, BasicBlock):
    """BasicBlock, fused."""


class FusedBottleneck(nn.FusedBottleneck, Bottleneck):
    """Bottleneck, fused."""


class FusedResNet(nn.FusedStem, ResNet):
    """ResNet with a fused stem."""

    def _stem(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super()._stem(x)
        return self.fused_pooled_stem(x)


class FusedCifarResNet(nn.FusedStem, CifarResNet):
    """CifarResNet with a fused stem."""

    def _stem(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super()._stem(x)
        return self.fused_stem(x)


FUSED = {
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    ResNet: FusedResNet,
    CifarResNet: FusedCifarResNet,
}
