"""The fused subclass of :mod:`resfuse.models.units`' residual unit, in every order of its normalisations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv2d

from resfuse import functional, guards, nn
from resfuse._calls import convolved_dtype
from resfuse.guards import Parts
from resfuse.models.units import ORDERS, ResidualUnit
from resfuse.parameters import Moments


class FusedResidualUnit(nn.HandsOn, ResidualUnit):
    """ResidualUnit, fused: what stands behind the last convolution says of which compositions it is made.

    Nothing: a pre-activation unit, whose sum is normalised by its readers; the unit's own exit is one of them.
    BN: a chain whose last pass adds the shortcut. BN and ReLU: a plain chain, and the addition.
    """

    @classmethod
    def parts_of(cls, block: Any) -> Parts:
        names = (*block.entry, *block.path, *block.exit)
        convs, norms = (tuple(name for name in names if name.startswith(kind)) for kind in ("conv", "bn"))
        return Parts(convs, norms, ("relu",))

    @classmethod
    def why_stock_children(cls, block: Any) -> str | None:
        if block.order not in _COMPOSITIONS:
            return f"resfuse composes no unit of {block.order}"
        downsample = block.downsample
        if not block.clean and type(downsample) is Conv2d:
            if (reason := guards.why_not_conv(downsample, "downsample")) is not None:
                return reason
        elif not block.clean and "bn" in "".join(block.entry):
            return f"downsample is a {type(downsample).__name__}, and what it reads is never stored"
        return super().why_stock_children(block)

    def run(self, x: Tensor, moments: Moments | None, wanted: bool) -> tuple[Tensor, Moments | None]:
        # under autocast the sum with a wider x is as wide as x, in stock
        if self.why_stock(x) is not None or x.dtype != convolved_dtype(x.device.type, x.dtype):
            return self._stock_forward(x), None
        return _COMPOSITIONS[self.order](self, x, moments, wanted)

    def _through_downsample(self, x: Tensor) -> Tensor:
        downsample: Any = self.downsample
        return x if downsample is None else downsample(x)

    def _preactivated(self, x: Tensor, moments: Moments | None, wanted: bool) -> tuple[Tensor, Moments | None]:
        """conv relu bn ... conv, and the addition, whose moments its reader needs: another unit, or this one's exit."""
        children: Any = self._modules
        parts, backend = self.parts_of(self), self._resfuse_backend
        convs = [nn.conv_parameters(children[name]) for name in parts.convs]
        norms: list[Any] = [nn.batch_norm_parameters(children[name]) for name in parts.norms]
        closing = norms.pop() if self.exit else None
        if len(norms) < len(convs):
            norms.insert(0, None)  # x is read as it is, so its moments are of no use
            moments = None
        if not self.clean and type(self.downsample) is Conv2d:
            shortcut: Any = nn.conv_parameters(self.downsample)
        else:
            shortcut = self._through_downsample(x)
        if closing is not None:
            wanted = closing.training
        found = functional.preact_block(
            x, list(zip(norms, convs, strict=True)), shortcut, moments=moments, return_moments=wanted, backend=backend
        )
        out, moments = found if wanted else (found, None)
        if closing is None:
            return out, moments
        return functional.bn_act(out, closing, moments=moments, backend=backend), None

    def _normalised(self, x: Tensor, moments: Moments | None, wanted: bool) -> tuple[Tensor, Moments | None]:
        """bn conv ... relu bn conv relu: the pass that normalises adds the shortcut, too."""
        entered = torch.relu(x) if self.entry else x
        projection = None if self.clean else nn.projection_parameters(self.downsample)
        shortcut = projection or self._through_downsample(x if self.clean else entered)
        choice: Any = {"backend": self._resfuse_backend, "folding": self._resfuse_folding}
        layers = self._fused_layers()
        return functional.conv_bn_act_chain(entered, layers, shortcut, last_activation="identity", **choice), None

    def closing_layers(self) -> dict[str, Any]:
        composition = _COMPOSITIONS[self.order]
        if composition is FusedResidualUnit._preactivated:
            return {}
        in_chain = composition is FusedResidualUnit._normalised and not self.clean
        return self._closing_layers(self.downsample if in_chain else None)

    def _activated(self, x: Tensor, moments: Moments | None, wanted: bool) -> tuple[Tensor, Moments | None]:
        """relu bn conv ..., and the addition, which is a projection's last pass if there is one."""
        choice: Any = {"backend": self._resfuse_backend}
        out = functional.conv_bn_act_chain(x, self._fused_layers(), folding=self._resfuse_folding, **choice)
        projection = None if self.clean else nn.projection_parameters(self.downsample)
        if projection is None:
            return out + self._through_downsample(x), None
        return functional.conv_bn_act(x, *projection, out, activation="identity", **choice), None


_COMPOSITIONS = {
    ORDERS["full_preact"]: FusedResidualUnit._preactivated,
    ORDERS["bn_after_add"]: FusedResidualUnit._preactivated,
    ORDERS["relu_only_preact"]: FusedResidualUnit._normalised,
    ORDERS["relu_before_add"]: FusedResidualUnit._activated,
}

FUSED = {ResidualUnit: FusedResidualUnit}
