"""Fused subclasses of the blocks and networks of :mod:`resfuse.models`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resfuse import functional, nn
from resfuse.models import BasicBlock, BNReLU, Bottleneck, CifarResNet, PlainBlock, ResNet


class FusedBasicBlock(nn.FusedBasicBlock, BasicBlock):
    """BasicBlock, fused."""


class FusedBottleneck(nn.FusedBottleneck, Bottleneck):
    """Bottleneck, fused."""


class FusedPlainBlock(nn.FusedBlock, PlainBlock):
    """PlainBlock, fused."""

    fused_convs = nn.FusedBasicBlock.fused_convs
    fused_norms = nn.FusedBasicBlock.fused_norms

    def forward(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super().forward(x)
        children: Any = self._modules
        for conv, bn in zip(self.fused_convs, self.fused_norms, strict=True):
            layer = nn.conv_parameters(children[conv]), nn.batch_norm_parameters(children[bn])
            x = functional.conv_bn_act(x, *layer, backend=self._resfuse_backend)
        return x


class FusedBNReLU(nn.FusedBlock, BNReLU):
    """BNReLU, fused."""

    fused_convs = ()
    fused_norms = ("bn",)

    def forward(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super().forward(x)
        bn: Any = self.bn
        return functional.bn_act(x, nn.batch_norm_parameters(bn), backend=self._resfuse_backend)


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
    PlainBlock: FusedPlainBlock,
    BNReLU: FusedBNReLU,
    ResNet: FusedResNet,
    CifarResNet: FusedCifarResNet,
}
