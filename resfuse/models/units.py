"""Residual units of other orders than a ResNet's: where normalisation and activation stand is data, not code."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from resfuse.models.parts import NormLayer, ZeroPadShortcut, conv1x1, conv3x3, zero_weight


class Order(NamedTuple):
    """What stands in front of a unit's first convolution, behind its last, and behind the addition.

    Each is "", "bn", "relu" or "bn relu"; between two convolutions it is always "bn relu".
    """

    before: str = ""
    behind: str = ""
    after: str = ""


ORIGINAL = "original"
"""The order of :class:`BasicBlock` and :class:`Bottleneck`: conv BN ReLU conv BN, add, ReLU."""

ORDERS = {
    "bn_after_add": Order(after="bn relu"),
    "relu_before_add": Order(behind="bn relu"),
    "relu_only_preact": Order(before="relu", behind="bn"),
    "full_preact": Order(before="bn relu"),
}
"""The other orders, by the name of the unit."""


class ResidualUnit(nn.Module):
    """A residual unit of any order: ``after(behind(conv(... relu(bn(conv(before(x))))))) + downsample(x))``.

    Convolutions and norms are named conv1, bn1, ... in the order in which they are called. Three tuples of children's
    names are what forward runs through: ``entry``, ``path`` and, after the addition, ``exit``.

    Args:
        inplanes (int): channels of the input.
        planes (int): channels of the 3x3 convolutions.
        stride (int): of the first 3x3 convolution, or of the first 1x1.
        downsample (nn.Module | None): the shortcut's module; None is the identity. It and a ZeroPadShortcut read x:
            the shortcut is clean. A projection reads ``before(x)``, as the first convolution does.
        order (Order): where normalisation and activation stand.
        bottleneck (bool): 1x1, 3x3 and a 1x1 to ``4 * planes`` channels, instead of two 3x3.
        stride_in_1x1 (bool): stride in the bottleneck's first 1x1 convolution instead of the 3x3.
        entered (bool): x comes activated from the stem, so ``before`` is left out; see :class:`CifarResNet`.
        norm_layer (Callable[[int], nn.Module] | None): makes the norms; None is ``nn.BatchNorm2d``.

    Shape:
        (N, inplanes, H, W) to (N, planes, ceil(H / stride), ceil(W / stride)), or 4 * planes channels.

    Source: He et al., Identity Mappings in Deep Residual Networks, 2016, figure 4; its code for the projections.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        order: Order,
        bottleneck: bool = False,
        stride_in_1x1: bool = False,
        entered: bool = False,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        if bottleneck:
            strides = (stride, 1) if stride_in_1x1 else (1, stride)
            convs = [conv1x1(inplanes, planes, strides[0]), conv3x3(planes, planes, strides[1])]
            convs.append(conv1x1(planes, 4 * planes))
        else:
            convs = [conv3x3(inplanes, planes, stride), conv3x3(planes, planes)]
        self.order = order
        self.entry = () if entered else self._add(order.before, inplanes, norm)
        path: list[str] = []
        for i, conv in enumerate(convs, 1):
            self.add_module(f"conv{i}", conv)
            last = i == len(convs)
            path += [f"conv{i}", *self._add(order.behind if last else "bn relu", conv.out_channels, norm)]
        self.path = tuple(path)
        self.exit = self._add(order.after, convs[-1].out_channels, norm)
        # where ReLU comes first, its input is also the shortcut's
        self.relu = nn.ReLU(inplace=order.before != "relu")
        self.downsample = downsample
        self.clean = downsample is None or isinstance(downsample, ZeroPadShortcut)

    def _add(self, what: str, channels: int, norm: NormLayer) -> tuple[str, ...]:
        """Add what stands in one place, and name it."""
        if "bn" not in what:
            return tuple(what.split())
        name = f"bn{1 + sum(child.startswith('bn') for child in self._modules)}"
        self.add_module(name, norm(channels))
        return (name, "relu") if "relu" in what else (name,)

    def _run(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        for name in names:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        entered = self._run(self.entry, x)
        shortcut = x if self.clean else entered
        out = self._run(self.path, entered)
        return self._run(self.exit, out + (shortcut if self.downsample is None else self.downsample(shortcut)))

    def zero_residual(self) -> None:
        """Let nothing be added to the shortcut: what ends the residual path gets weight zero."""
        if self.path[-1] == "relu":
            raise ValueError("zero_init_residual must be False where ReLU ends the residual path: at 0 it never learns")
        zero_weight(getattr(self, self.path[-1]))
