"""DenseNet, fused: raw activations and their moments are concatenated.

Mixins for the parts of any DenseNet with torchvision's names, and the subclasses for :mod:`resfuse.models.densenet`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv2d

from resfuse import functional, nn
from resfuse.guards import Parts
from resfuse.models.densenet import DenseBlock, DenseFeatures, DenseLayer, DenseNet, Transition
from resfuse.parameters import Moments


class DenseLayerMixin(nn.HandsOn):
    """A dense layer, fused: a pre-activation unit without shortcut, whose input are the raw features, concatenated."""

    fused_parts = Parts(("conv1", "conv2"), ("norm1", "norm2"), ("relu1", "relu2"))
    training: bool

    @classmethod
    def why_stock_children(cls, block: Any) -> str | None:
        if block.memory_efficient:
            return "memory_efficient: what it concatenates is computed again in backward"
        return super().why_stock_children(block)

    @classmethod
    def why_stock_mode(cls, block: Any) -> str | None:
        return "dropout changes its output in training" if block.drop_rate > 0 and block.training else None

    def run(self, x: Tensor | list[Tensor], moments: Moments | None, wanted: bool) -> tuple[Tensor, Moments | None]:
        x = [x] if isinstance(x, Tensor) else x
        if self.why_stock(x[0]) is not None:
            return self._stock_forward(x), None
        features = x[0] if len(x) == 1 else torch.cat(x, 1)
        layers = [(bn, conv) for conv, bn in self._fused_layers()]
        found = functional.preact_block(
            features, layers, moments=moments, return_moments=wanted, backend=self._resfuse_backend
        )
        return found if wanted else (found, None)


class DenseBlockMixin(nn.HandsOn):
    """A dense block that hands moments on: a feature's are taken once, where it is written, not by all its readers."""

    _modules: dict[str, Any]

    @classmethod
    def stretches_of(cls, block: Any) -> list[list[Conv2d]]:
        return []

    def run(self, x: Tensor, moments: Moments | None, wanted: bool) -> tuple[Tensor, Moments | None]:
        if self.why_stock(x) is not None:
            return self._stock_forward(x), None
        features = [x]
        known: list[Moments | Tensor] = [
            x if moments is None else moments
        ]  # of features in order, or what has none yet
        for layer in self._modules.values():
            given = None
            reads = isinstance(layer, DenseLayerMixin) and layer.training and layer.why_stock(x) is None
            if reads and x.numel() > 0:
                given = _concatenated([self._moments(part) for part in known])
                known = [given]
            out, found = nn.run(layer, features, given)
            features.append(out)
            known.append(out if found is None else found)
        handed_on = [part for part in known if isinstance(part, Moments)]
        complete = wanted and len(handed_on) == len(known)
        return torch.cat(features, 1), _concatenated(handed_on) if complete else None

    def _moments(self, part: Moments | Tensor) -> Moments:
        """Moments that were handed on; else they are taken."""
        return part if isinstance(part, Moments) else functional.moments(part, backend=self._resfuse_backend)


def _concatenated(parts: list[Moments]) -> Moments:
    """The moments of a concatenation."""
    if len(parts) == 1:
        return parts[0]
    means, variances = zip(*parts, strict=True)
    return Moments(torch.cat(means), torch.cat(variances))


class TransitionMixin(nn.HandsOn):
    """A transition, fused: a pre-activation unit of one layer, and its pool."""

    pool: Any
    fused_parts = Parts(("conv",), ("norm",), ("relu",))

    @classmethod
    def why_stock_children(cls, block: Any) -> str | None:
        if list(block._modules) != ["norm", "relu", "conv", "pool"]:
            return f"its children are {', '.join(block._modules)}"
        return super().why_stock_children(block)

    def run(self, x: Tensor, moments: Moments | None, wanted: bool) -> tuple[Tensor, Moments | None]:
        if self.why_stock(x) is not None:
            return self._stock_forward(x), None
        conv, bn = self._fused_layers()[0]
        backend = self._resfuse_backend
        out = functional.preact_block(x, [(bn, conv)], moments=moments, return_moments=False, backend=backend)
        return self.pool(out), None


class DenseFeaturesMixin(nn.FusedBlock):
    """A DenseNet's features with a fused stem, whose blocks hand their moments on, up to the last normalisation."""

    fused_parts = Parts(("conv0",), ("norm0", "norm5"), ("relu0",))

    @classmethod
    def why_stock_children(cls, block: Any) -> str | None:
        names = list(block._modules)
        if names[:4] != ["conv0", "norm0", "relu0", "pool0"] or names[-1] != "norm5":
            return f"its children are {', '.join(names)}"
        return super().why_stock_children(block)

    @classmethod
    def stretches_of(cls, block: Any) -> list[list[Conv2d]]:
        return [[block.conv0]]


def run_features(features: Any, x: Tensor, activation: str, backend: str | None) -> Tensor:
    """act(norm5(...)), fused."""
    conv0, norm0, _, pool0, *blocks, norm5 = features._modules.values()
    stem = nn.conv_parameters(conv0), nn.batch_norm_parameters(norm0)
    x, moments = nn.pooled(x, stem, pool0, backend), None
    for block in blocks:
        x, moments = nn.run(block, x, moments)
    bn = nn.batch_norm_parameters(norm5)
    return functional.bn_act(x, bn, activation=activation, moments=moments, backend=backend)


class FusedDenseLayer(DenseLayerMixin, DenseLayer):
    """DenseLayer, fused."""


class FusedDenseBlock(DenseBlockMixin, DenseBlock):
    """DenseBlock, fused."""


class FusedTransition(TransitionMixin, Transition):
    """Transition, fused."""


class FusedDenseFeatures(DenseFeaturesMixin, DenseFeatures):
    """DenseFeatures, fused."""

    def forward(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super().forward(x)
        return run_features(self, x, "identity", self._resfuse_backend)


class FusedDenseNet(nn.FusedBlock, DenseNet):
    """DenseNet whose last normalisation and ReLU are one pass, unless something watches its features."""

    @classmethod
    def why_stock_children(cls, block: Any) -> str | None:
        features = block.features
        if not isinstance(features, DenseFeatures):
            return f"features is a {type(features).__name__}, not a DenseFeatures"
        reason = FusedDenseFeatures.why_stock_children(features)
        return None if reason is None else f"features: {reason}"

    @classmethod
    def stretches_of(cls, block: Any) -> list[list[Conv2d]]:
        return []

    def _activated(self, x: Tensor) -> Tensor:
        features: Any = self.features
        if isinstance(features, FusedDenseFeatures) and not nn.is_watched(features) and features.why_stock(x) is None:
            return run_features(features, x, "relu", features._resfuse_backend)
        return super()._activated(x)


FUSED = {
    DenseLayer: FusedDenseLayer,
    DenseBlock: FusedDenseBlock,
    Transition: FusedTransition,
    DenseFeatures: FusedDenseFeatures,
    DenseNet: FusedDenseNet,
}
