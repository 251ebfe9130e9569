"""The block of a highway network, for comparison: a shortcut with a gate that has parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resfuse.models.parts import NormLayer
from resfuse.models.resnet import PlainBlock


class HighwayBlock(PlainBlock):
    """A plain block H and its input, mixed: ``H(x) * t + downsample(x) * (1 - t)`` with ``t = sigmoid(gate(x))``.

    Args:
        inplanes (int): channels of the input.
        planes (int): channels of the output.
        stride (int): stride of the first convolution and of the gate.
        downsample (nn.Module | None): the shortcut's module where the shape changes; None is the identity.
        norm_layer (Callable[[int], nn.Module] | None): makes bn1 and bn2; None is ``nn.BatchNorm2d``.
        gate_bias (float): where the 1x1 gate's bias starts; negative, so that the block begins by carrying its input.

    Shape:
        (N, inplanes, H, W) to (N, planes, ceil(H / stride), ceil(W / stride)).

    Source: Srivastava et al., Highway Networks, 2015; the 1x1 gate is that of He et al., Identity Mappings in Deep
    Residual Networks, 2016, section 3.1, exclusive gating.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        norm_layer: NormLayer | None = None,
        gate_bias: float = -3.0,
    ) -> None:
        super().__init__(inplanes, planes, stride, norm_layer=norm_layer)
        self.downsample = downsample
        self.gate = nn.Conv2d(inplanes, planes, 1, stride=stride)
        assert self.gate.bias is not None
        nn.init.constant_(self.gate.bias, gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        return self._transformed(x) * gate + self._carried(x) * (1 - gate)

    def _transformed(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def _carried(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def zero_residual(self) -> None:
        """Raise ValueError: the gate's bias says how a highway begins."""
        raise ValueError("zero_init_residual must be False in a highway network: its gate begins nearly closed")
