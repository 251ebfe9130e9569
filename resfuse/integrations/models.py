"""Fused subclasses of the blocks and networks of :mod:`resfuse.models`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Conv2d

from resfuse import functional, guards, nn
from resfuse.guards import Parts
from resfuse.models import BasicBlock, BNReLU, Bottleneck, CifarResNet, HighwayBlock, PlainBlock, ResNet
from resfuse.parameters import Moments


class FusedBasicBlock(nn.FusedBasicBlock, BasicBlock):
    """BasicBlock, fused."""


class FusedBottleneck(nn.FusedBottleneck, Bottleneck):
    """Bottleneck, fused."""


class FusedPlainBlock(nn.FusedBlock, PlainBlock):
    """PlainBlock, fused."""

    fused_parts = nn.FusedBasicBlock.fused_parts

    def forward(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super().forward(x)
        return functional.conv_bn_act_chain(x, self._fused_layers(), backend=self._resfuse_backend)


class FusedHighwayBlock(nn.FusedBlock, HighwayBlock):
    """HighwayBlock whose transform and projection are fused; its gate, and what it mixes, stay stock."""

    fused_parts = nn.FusedBasicBlock.fused_parts

    @classmethod
    def stretches_of(cls, block: Any) -> list[list[Conv2d]]:
        return [[block.conv1, block.conv2]]

    def _transformed(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super()._transformed(x)
        return functional.conv_bn_act_chain(x, self._fused_layers(), backend=self._resfuse_backend)

    def _carried(self, x: Tensor) -> Tensor:
        projection = nn.projection_parameters(self.downsample)
        if projection is None or self.why_stock(x) is not None:
            return super()._carried(x)
        return functional.conv_bn_act(x, *projection, activation="identity", backend=self._resfuse_backend)


class FusedBNReLU(nn.HandsOn, BNReLU):
    """BNReLU, fused."""

    fused_parts = Parts((), ("bn",), ("relu",))

    def run(self, x: Tensor, moments: Moments | None, wanted: bool) -> tuple[Tensor, Moments | None]:
        if self.why_stock(x) is not None:
            return self._stock_forward(x), None
        bn: Any = self.bn
        return functional.bn_act(x, nn.batch_norm_parameters(bn), moments=moments, backend=self._resfuse_backend), None


class FusedResNet(nn.FusedStem, ResNet):
    """ResNet with a fused stem."""

    def _stem(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super()._stem(x)
        return self.fused_pooled_stem(x)


class FusedCifarResNet(nn.FusedStem, CifarResNet):
    """CifarResNet with a fused stem, whose units hand their moments on, across stages and into the tail."""

    def _stem(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super()._stem(x)
        return self.fused_stem(x)

    def _body(self, x: Tensor) -> Tensor:
        if guards.why_stock_call(x) is not None:
            return super()._body(x)
        moments = None
        for part in (self.layer1, self.layer2, self.layer3, self.tail):
            if part is not None:
                x, moments = nn.run(part, x, moments)
        return x


FUSED = {
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    PlainBlock: FusedPlainBlock,
    HighwayBlock: FusedHighwayBlock,
    BNReLU: FusedBNReLU,
    ResNet: FusedResNet,
    CifarResNet: FusedCifarResNet,
}
