"""Modules: drop-in layers that own their parameters, and fused blocks that borrow those of a stock block.

No mathematics: a module collects its parameters and calls :mod:`resfuse.functional`. A fused block is a stock block
whose class was swapped for a subclass with one of the mixins below; its children stay the same objects under the same
names. At each call it asks :func:`why_stock` whether the fusion would be seen (a hook, a replaced child, a tracer, a
device without kernels), and where it would, runs the stock forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module
from torch.nn.modules.batchnorm import _NormBase

from resfuse import backends, functional
from resfuse._checks import check_activation_name, check_eps, check_momentum, check_window
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters


def conv_parameters(conv: nn.Conv2d) -> Conv2dParameters:
    """The parameters of a convolution module."""
    return Conv2dParameters(conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def batch_norm_parameters(bn: nn.BatchNorm2d | BNAct2d) -> BatchNorm2dParameters:
    """The parameters of a normalisation module for this call, as torch.nn.BatchNorm2d decides them.

    Batch statistics in training, and in eval where there are no running ones; running statistics are updated only in
    training with track_running_stats, and not where gradient checkpointing computes a forward pass again: once a step.
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
        bn = batch_norm_parameters(self)
        return functional.bn_act(x, bn, residual, activation=self.activation, backend=self.backend)

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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        reason = why_stock(self, x, self.backend, ("conv",), ("bn",), ())
        if reason is not None:
            return self._stock_forward(x, residual)
        conv, bn = conv_parameters(self.conv), batch_norm_parameters(self.bn)
        return functional.conv_bn_act(x, conv, bn, residual, activation=self.activation, backend=self.backend)

    def _stock_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        z = self.bn(self.conv(x))
        if residual is not None:
            z = z + residual
        return torch.relu(z) if self.activation == "relu" else z

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}" + _backend_repr(self.backend)


def _backend_repr(backend: str | None) -> str:
    return "" if backend is None else f", backend={backend!r}"


def _why_not_child(child: nn.Module | None, name: str, wanted: type[nn.Module]) -> str | None:
    """Why a child cannot be replaced by a fused call: its type is not exactly `wanted`, or something hooks its call."""
    if type(child) is not wanted:
        return f"{name} is a {type(child).__name__}, not a {wanted.__name__}"
    if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
        return f"{name} has a hook"
    if "forward" in child.__dict__:
        return f"{name} has its own forward"
    return None


def _why_not_conv(conv: nn.Module | None, name: str) -> str | None:
    reason = _why_not_child(conv, name, nn.Conv2d)
    if reason is None and conv.padding_mode != "zeros":  # type: ignore[union-attr]
        return f"{name} pads with {conv.padding_mode!r}, not zeros"  # type: ignore[union-attr]
    return reason


def _why_not_norm(bn: nn.Module | None, name: str) -> str | None:
    reason = _why_not_child(bn, name, nn.BatchNorm2d)
    if reason is not None:
        return reason
    assert isinstance(bn, nn.BatchNorm2d)
    if not bn.eps > 0 or not (bn.momentum is None or 0 <= bn.momentum <= 1):
        return f"{name} has eps {bn.eps} and momentum {bn.momentum}"  # stock computes with any number
    return None


def why_stock_children(
    block: nn.Module, convs: tuple[str, ...], norms: tuple[str, ...], activations: tuple[str, ...]
) -> str | None:
    """Why a block's children keep it from being fused; None where they do not."""
    children = block._modules
    for name in convs:
        if (reason := _why_not_conv(children.get(name), name)) is not None:
            return reason
    for name in norms:
        if (reason := _why_not_norm(children.get(name), name)) is not None:
            return reason
    for name in activations:
        if (reason := _why_not_child(children.get(name), name, nn.ReLU)) is not None:
            return reason
    return _why_not_projection(children.get("downsample"))


def _is_projection(downsample: nn.Module | None) -> bool:
    """Whether the shortcut is a Sequential of a convolution and a batch normalisation."""
    return (
        type(downsample) is nn.Sequential
        and len(downsample) == 2
        and type(downsample[0]) is nn.Conv2d
        and type(downsample[1]) is nn.BatchNorm2d
    )


def _why_not_projection(downsample: nn.Module | None) -> str | None:
    if downsample is None or not _is_projection(downsample):
        return None  # a shortcut of any other kind is called as it is
    conv, bn = downsample._modules["0"], downsample._modules["1"]
    return (
        _why_not_child(downsample, "downsample", nn.Sequential)
        or _why_not_conv(conv, "downsample.0")
        or _why_not_norm(bn, "downsample.1")
    )


def _why_not_pool(pool: object, x: Tensor, backend: str | None) -> str | None:
    """Why the stem's maxpool is called as it is, after the fused rest."""
    reason = _why_not_child(pool, "maxpool", nn.MaxPool2d)  # type: ignore[arg-type]
    if reason is not None:
        return reason
    assert isinstance(pool, nn.MaxPool2d)
    if pool.dilation not in (1, (1, 1)) or pool.ceil_mode or pool.return_indices:
        return "maxpool dilates, rounds up or returns indices"
    try:
        check_window(pool.kernel_size, pool.stride, pool.padding)
    except (TypeError, ValueError) as error:
        return f"maxpool: {error}"
    return backends.missing("bn_relu_maxpool", backend or "native", x.device.type, x.dtype)


def why_stock_anywhere() -> str | None:
    """Why every block runs stock at present."""
    return "a global module hook is registered" if _torch_module._has_any_global_hook() else None


def why_stock_input(device: str, dtype: torch.dtype, backend: str | None) -> str | None:
    """Why no backend serves activations on this device in this dtype; a requested backend is left to raise."""
    if functional.autocasts(device):
        dtype = torch.get_autocast_dtype(device)
    if backend is None and (reason := backends.missing("bn_act", "native", device, dtype)) is not None:
        return f"no backend serves {dtype} on {device}: {reason}"
    return None


def why_stock(
    block: nn.Module,
    x: Tensor,
    backend: str | None,
    convs: tuple[str, ...],
    norms: tuple[str, ...],
    activations: tuple[str, ...],
) -> str | None:
    """Why this call of a block runs its stock forward; None where it runs fused."""
    if isinstance(x, torch.fx.Proxy):
        return "the model is being traced by torch.fx"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "the model is being exported"
    reason = why_stock_anywhere() or why_stock_children(block, convs, norms, activations)
    return reason or why_stock_input(x.device.type, x.dtype, backend)


class FusedBlock:
    """What fused blocks share: the names of the children that the fused call replaces, and the reasons not to.

    Attributes:
        fused_convs, fused_norms, fused_activations: names of children, in the order of the forward pass.
        _resfuse_backend, _resfuse_folding: what `fuse` was given.
    """

    fused_convs: tuple[str, ...]
    fused_norms: tuple[str, ...]
    fused_activations: tuple[str, ...] = ("relu",)
    _resfuse_backend: str | None = None
    _resfuse_folding: bool | None = None

    def why_stock(self, x: Tensor) -> str | None:
        """Why a call with x runs the stock forward; None where it runs fused."""
        names = (self.fused_convs, self.fused_norms, self.fused_activations)
        return why_stock(self, x, self._resfuse_backend, *names)  # type: ignore[arg-type]

    @classmethod
    def why_stock_children(cls, block: nn.Module) -> str | None:
        """Why the children of `block` keep it from being fused; None where they do not."""
        return why_stock_children(block, cls.fused_convs, cls.fused_norms, cls.fused_activations)

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script asks for what to script instead, and puts it into the caller's own containers: a stock block
        # given here would undo fuse behind the caller's back
        raise NotImplementedError(
            "torch.jit.script does not support fused blocks: script resfuse.unfuse(model), "
            "or use torch.jit.trace or torch.export on the fused model"
        )


class FusedResidual(FusedBlock):
    """The forward of a residual block with children conv1, bn1, ..., relu and downsample."""

    compose: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if self.why_stock(x) is not None:
            return super().forward(x)  # type: ignore[misc]
        children = self._modules  # type: ignore[attr-defined]
        layers: list[Any] = []
        for conv, bn in zip(self.fused_convs, self.fused_norms, strict=True):
            layers += conv_parameters(children[conv]), batch_norm_parameters(children[bn])
        downsample = children.get("downsample")
        shortcut: Any = None
        if downsample is not None:
            if _is_projection(downsample):
                shortcut = conv_parameters(downsample[0]), batch_norm_parameters(downsample[1])
            else:
                shortcut = downsample(x)
        choice: dict[str, Any] = {"backend": self._resfuse_backend}
        if self._resfuse_folding is not None:
            choice["folding"] = self._resfuse_folding
        return self.compose(x, *layers, shortcut, **choice)


class FusedBasicBlock(FusedResidual):
    """Mixin for a block of two convolutions."""

    fused_convs = ("conv1", "conv2")
    fused_norms = ("bn1", "bn2")
    compose = staticmethod(functional.basic_block)


class FusedBottleneck(FusedResidual):
    """Mixin for a block of three convolutions."""

    fused_convs = ("conv1", "conv2", "conv3")
    fused_norms = ("bn1", "bn2", "bn3")
    compose = staticmethod(functional.bottleneck)


class FusedStem(FusedBlock):
    """Mixin for a network whose stem is conv1, bn1 and relu, and maybe maxpool."""

    fused_convs = ("conv1",)
    fused_norms = ("bn1",)

    def fused_stem(self, x: Tensor) -> Tensor:
        """relu(bn1(conv1(x)))."""
        children = self._modules  # type: ignore[attr-defined]
        conv, bn = conv_parameters(children["conv1"]), batch_norm_parameters(children["bn1"])
        return functional.conv_bn_act(x, conv, bn, backend=self._resfuse_backend)

    def fused_pooled_stem(self, x: Tensor) -> Tensor:
        """maxpool(relu(bn1(conv1(x)))). A maxpool that cannot be replaced, such as a hooked one, is called."""
        pool, backend = self.maxpool, self._resfuse_backend  # type: ignore[attr-defined]
        if _why_not_pool(pool, x, backend) is not None:
            return pool(self.fused_stem(x))
        children = self._modules  # type: ignore[attr-defined]
        conv, bn = conv_parameters(children["conv1"]), batch_norm_parameters(children["bn1"])
        window = (pool.kernel_size, pool.stride, pool.padding)
        return functional.conv_bn_relu_maxpool(x, conv, bn, *window, backend=backend)
