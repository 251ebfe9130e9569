"""Modules: drop-in layers that own their parameters, and fused blocks that borrow those of a stock block.

No mathematics: a module collects its parameters and calls :mod:`resfuse.functional`. A fused block is a stock block
whose class was swapped for a subclass with one of the mixins below; its children stay the same objects under the same
names. At each call it asks :mod:`resfuse.guards` whether the fusion would be seen (a hook, a replaced child, a tracer,
a device without kernels), and where it would, runs the stock forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from resfuse import functional, guards
from resfuse._calls import autocasts
from resfuse._checks import check_activation_name, check_eps, check_momentum
from resfuse.guards import Parts
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters, Moments


def conv_parameters(conv: nn.Conv2d) -> Conv2dParameters:
    """The parameters of a convolution module."""
    return Conv2dParameters(conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def batch_norm_parameters(bn: nn.BatchNorm2d | BNAct2d) -> BatchNorm2dParameters:
    """The parameters of a normalisation module for this call, as torch.nn.BatchNorm2d decides them.

    Batch statistics in training, and in eval where there are no running ones; running statistics are updated only in
    training with track_running_stats, and not by a forward pass inside a backward pass, which is taken for one that
    gradient checkpointing computes again: statistics are updated once a step.
    """
    training, running_mean, running_var = bn.training, bn.running_mean, bn.running_var
    tracked = training and bn.track_running_stats and not _recomputes()
    if training and not tracked:
        running_mean = running_var = None
    use_batch = training or running_mean is None
    batches = bn.num_batches_tracked if tracked else None
    return BatchNorm2dParameters(running_mean, running_var, bn.weight, bn.bias, use_batch, bn.momentum, bn.eps, batches)


def _recomputes() -> bool:
    """Whether this forward pass runs inside a backward pass: gradient checkpointing recomputes what it did not keep."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class AddReLU(nn.Module):
    """relu(x + residual) in one pass. See :func:`resfuse.functional.add_relu`.

    Args:
        backend (str | None): "native", "triton", "reference", or None for the best that serves the call.
    """

    def __init__(self, *, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if guards.why_stock_call(x) is not None:
            return torch.relu(x + residual)
        return functional.add_relu(x, residual, backend=self.backend)

    def extra_repr(self) -> str:
        return "" if self.backend is None else f"backend={self.backend!r}"


class BNAct2d(_NormBase):
    """Batch normalisation, residual and activation: act(BN(x) + residual). See :func:`resfuse.functional.bn_act`.

    Parameters, buffers, their names and the training behaviour are those of :class:`torch.nn.BatchNorm2d`: either
    loads the other's state_dict. It is no subclass of BatchNorm2d, so that convert_sync_batchnorm cannot replace it and
    drop the activation; for the same reason :func:`torch.optim.swa_utils.update_bn` passes over it.

    Args:
        num_features (int): C.
        eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.BatchNorm2d`.
        activation (str): "relu" or "identity".
        backend (str | None): "native", "triton", "reference", or None for the best that serves the call.

    Shape:
        x and residual (N, C, H, W) to (N, C, H, W).

    Raises:
        ValueError: eps is not positive, momentum is not None or in [0, 1], or the activation is unknown.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "relu",
        *,
        backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_activation_name(activation)
        check_eps("eps", eps)
        check_momentum("momentum", momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation = activation
        self.backend = backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if guards.why_stock_call(x) is not None:
            return _activated(_BatchNorm.forward(self, x), residual, self.activation)  # type: ignore[arg-type]
        bn = batch_norm_parameters(self)
        return functional.bn_act(x, bn, residual, activation=self.activation, backend=self.backend)

    def _check_input_dim(self, x: Tensor) -> None:
        if not isinstance(x, torch.fx.Proxy) and x.dim() != 4:
            raise ValueError(f"x must have 4 dimensions, (N, C, H, W), got {x.dim()}")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}" + _backend_repr(self.backend)


class ConvBNAct2d(nn.Module):
    """Convolution, batch normalisation, residual and activation: act(BN(conv(x)) + residual).

    The children are a stock Conv2d named `conv` and a stock BatchNorm2d named `bn`, with their state_dict keys. See
    :func:`resfuse.functional.conv_bn_act`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in
            :class:`torch.nn.Conv2d`; padding None keeps the size of odd kernels at stride 1, bias is off by default.
        eps, momentum: as in :class:`torch.nn.BatchNorm2d`.
        activation (str): "relu" or "identity".
        backend (str | None): "native", "triton", "reference", or None for the best that serves the call.

    Shape:
        x (N, in_channels, H, W) to (N, out_channels, H', W'); residual has the output's shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str = "relu",
        *,
        backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_activation_name(activation)
        check_eps("eps", eps)
        check_momentum("momentum", momentum)
        super().__init__()
        if padding is None:
            padding = dilation * (kernel_size - 1) // 2
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **factory
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, **factory)
        self.activation = activation
        self.backend = backend

    fused_parts = Parts(("conv",), ("bn",))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if guards.why_stock(x, guards.why_stock_children(self, self.fused_parts), self.backend) is not None:
            return self._stock_forward(x, residual)
        conv, bn = conv_parameters(self.conv), batch_norm_parameters(self.bn)
        return functional.conv_bn_act(x, conv, bn, residual, activation=self.activation, backend=self.backend)

    def _stock_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        z = self.bn(self.conv(x))
        if residual is not None and not isinstance(x, torch.fx.Proxy) and autocasts(x.device.type):
            residual = residual.to(z.dtype)  # the result has the convolution's dtype
        return _activated(z, residual, self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}" + _backend_repr(self.backend)


def _activated(z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """act(z + residual), by torch."""
    z = z if residual is None else z + residual
    return torch.relu(z) if activation == "relu" else z


def _backend_repr(backend: str | None) -> str:
    return "" if backend is None else f", backend={backend!r}"


class FusedBlock:
    """What fused blocks share: which children the fused call replaces, and the reasons not to.

    Attributes:
        fused_parts: what :meth:`parts_of` says of every block of the class.
        answers_for: children that :func:`resfuse.explain` does not list beside the block.
        _resfuse_backend, _resfuse_folding: what `fuse` was given.
    """

    fused_parts = Parts()
    answers_for: tuple[str, ...] = ("downsample",)
    _resfuse_backend: str | None = None
    _resfuse_folding: bool | None = None

    @classmethod
    def parts_of(cls, block: Any) -> Parts:
        """The children that the fused call replaces, of a block whose class may still be the stock one."""
        return cls.fused_parts

    @classmethod
    def why_stock_children(cls, block: Any) -> str | None:
        """Why the children of `block` keep it from being fused; None where they do not."""
        return guards.why_stock_children(block, cls.parts_of(block))

    @classmethod
    def why_stock_mode(cls, block: Any) -> str | None:
        """Why `block` runs stock in its present mode, training or eval, though its children could be fused."""
        return None

    def why_stock(self, x: Tensor) -> str | None:
        """Why a call with x runs the stock forward; None where it runs fused."""
        reason = self.why_stock_children(self) or self.why_stock_mode(self)
        return guards.why_stock(x, reason, self._resfuse_backend)

    @classmethod
    def stretches_of(cls, block: Any) -> list[list[nn.Conv2d]]:
        """The convolutions that tile kernels may compute, in lists of those that only serve together."""
        return [[module for module in block.modules() if type(module) is nn.Conv2d]]

    def _fused_layers(self) -> list[tuple[Conv2dParameters, BatchNorm2dParameters]]:
        """The parameters of the convolutions, each with its normalisation."""
        children, parts = self._modules, self.parts_of(self)  # type: ignore[attr-defined]
        return [
            (conv_parameters(children[conv]), batch_norm_parameters(children[bn]))
            for conv, bn in zip(parts.convs, parts.norms, strict=True)
        ]

    def closing_layers(self) -> dict[str, tuple[Conv2dParameters, BatchNorm2dParameters]]:
        """What may fold in training, by the convolution's name: the last layer, and then a projection beside it."""
        return {}

    def _closing_layers(self, downsample: Any) -> dict[str, tuple[Conv2dParameters, BatchNorm2dParameters]]:
        """The layers of a chain that closes with its last one and this shortcut."""
        layers = {self.parts_of(self).convs[-1]: self._fused_layers()[-1]}
        projection = projection_parameters(downsample)
        return layers if projection is None else {**layers, "downsample.0": projection}

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script asks for what to script instead, and puts it into the caller's own containers: a stock block
        # given here would undo fuse behind the caller's back
        raise NotImplementedError(
            "torch.jit.script does not support fused blocks: script resfuse.unfuse(model), "
            "or use torch.jit.trace or torch.export on the fused model"
        )


def projection_parameters(downsample: Any) -> tuple[Conv2dParameters, BatchNorm2dParameters] | None:
    """The parameters of a projection shortcut; None where the module is of another kind and is called as it is."""
    if not guards.is_projection(downsample):
        return None
    return conv_parameters(downsample[0]), batch_norm_parameters(downsample[1])


class FusedResidual(FusedBlock):
    """The forward of a residual block with children conv1, bn1, ..., relu and downsample."""

    def forward(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super().forward(x)  # type: ignore[misc]
        downsample = self._modules.get("downsample")  # type: ignore[attr-defined]
        shortcut = x if downsample is None else projection_parameters(downsample) or downsample(x)
        choice: Any = {"backend": self._resfuse_backend, "folding": self._resfuse_folding}
        return functional.conv_bn_act_chain(x, self._fused_layers(), shortcut, **choice)

    def closing_layers(self) -> dict[str, tuple[Conv2dParameters, BatchNorm2dParameters]]:
        return self._closing_layers(self._modules.get("downsample"))  # type: ignore[attr-defined]


class FusedBasicBlock(FusedResidual):
    """Mixin for a block of two convolutions."""

    fused_parts = Parts(("conv1", "conv2"), ("bn1", "bn2"), ("relu",))


class FusedBottleneck(FusedResidual):
    """Mixin for a block of three convolutions."""

    fused_parts = Parts(("conv1", "conv2", "conv3"), ("bn1", "bn2", "bn3"), ("relu",))


class FusedStem(FusedBlock):
    """Mixin for a network whose stem is conv1, bn1 and relu, and maybe maxpool."""

    fused_parts = Parts(("conv1",), ("bn1",), ("relu",))

    @classmethod
    def stretches_of(cls, block: Any) -> list[list[nn.Conv2d]]:
        return [[block.conv1]]

    def fused_stem(self, x: Tensor) -> Tensor:
        """relu(bn1(conv1(x)))."""
        return functional.conv_bn_act(x, *self._fused_layers()[0], backend=self._resfuse_backend)

    def fused_pooled_stem(self, x: Tensor) -> Tensor:
        """maxpool(relu(bn1(conv1(x))))."""
        return pooled(x, self._fused_layers()[0], self.maxpool, self._resfuse_backend)  # type: ignore[attr-defined]


def pooled(x: Tensor, layer: tuple[Conv2dParameters, BatchNorm2dParameters], pool: Any, backend: str | None) -> Tensor:
    """pool(relu(bn(conv(x)))). A pool that cannot be replaced, such as a hooked one, is called."""
    if guards.why_not_pool(pool, x, backend) is not None:
        return pool(functional.conv_bn_act(x, *layer, backend=backend))
    window = (pool.kernel_size, pool.stride, pool.padding)
    return functional.conv_bn_relu_maxpool(x, *layer, *window, backend=backend)


class HandsOn(FusedBlock):
    """Mixin for a block that takes its input's moments and hands on its output's, where they are known."""

    def forward(self, x: Any) -> Tensor:
        return self.run(x, None, False)[0]

    def _stock_forward(self, x: Any) -> Tensor:
        return super().forward(x)  # type: ignore[misc]

    def run(self, x: Any, moments: Any, wanted: bool) -> tuple[Tensor, Moments | None]:
        """The forward pass of x, whose moments may be given; the output's are returned where `wanted`, if known."""
        raise NotImplementedError


def is_watched(module: nn.Module) -> bool:
    """Whether it would be seen that a module is not called: by a hook, its own forward, or since it was compiled."""
    return guards.why_not_child(module, "", type(module)) is not None


def run(module: nn.Module, x: Any, moments: Any, wanted: bool = True) -> tuple[Tensor, Moments | None]:
    """module(x), with moments handed from block to block where nothing else watches the calls.

    Args:
        module (nn.Module): any; a plain Sequential is gone through, a :class:`HandsOn` is given `moments`, and one that
            is watched is called.
        x (Tensor): its input.
        moments (Moments | None): x's, if known.
        wanted (bool): whether the output's are of use.

    Returns:
        tuple[Tensor, Moments | None]: the output and its moments, if known.
    """
    watched = is_watched(module)
    if not watched and isinstance(module, HandsOn):
        return module.run(x, moments, wanted and module.training)
    if watched or type(module) is not nn.Sequential:
        return module(x), None
    for child in module:
        x, moments = run(child, x, moments, wanted)
    return x, moments
